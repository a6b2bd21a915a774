"""Maps in NetCDF files: which variables are maps, and one datum at a time out of them. Needs netCDF4.

A datum is one map, or the maps at all times as one (`time=True`), or those of all levels as its channels
(`levels=True`): what climate centres write of GRIB has variables of time, level and member beside latitude and
longitude. Axes are known by their units and standard names; where a file has none, by the usual names.

Files come from strangers:

- A header may claim any size, and a sparse file of kilobytes hold 10^12 cells; so sizes are checked before reading.
- Of a classic file (NetCDF 3) that ends early the library silently reads zeros; so its length is checked against
  its header first.
- The library takes a name with `://` in it for an address to connect to; so it is given absolute paths or bytes.
"""

import contextlib
import io
import math
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nfscale.errors import CallerError
from nfscale.signals.sphere import Origin, SphereMap

MAX_VALUES = 64 << 20
"""Of one map, over its channels: as many as pixels of an image."""

_PIECE_BYTES = 1 << 30
"""Of a compressed piece of a variable, which is unpacked whole even where one map of it is wanted."""
_LONGEST_AXIS = 1 << 20  # of latitudes or longitudes: a step of 40 metres around the globe
_LATITUDE_UNITS = {"degrees_north", "degree_north", "degree_n", "degrees_n", "degreen", "degreesn"}
_LONGITUDE_UNITS = {"degrees_east", "degree_east", "degree_e", "degrees_e", "degreee", "degreese"}
_LATITUDE_NAMES, _LONGITUDE_NAMES = {"lat", "latitude"}, {"lon", "long", "longitude"}
_LEVEL_NAMES = {
    *("level", "levels", "lev", "plev", "pressure", "pressure_level", "isobaricinhpa", "isobaricinpa", "hybrid"),
    *("depth", "height", "altitude", "heightaboveground", "model_level", "theta", "pv"),
}
_LEVEL_STANDARDS = {"air_pressure", "depth", "height", "altitude", "model_level_number", "air_potential_temperature"}
_PRESSURE_UNITS = {"hpa", "pa", "millibar", "millibars", "mbar", "mb", "bar"}
_ABSURD_BYTES = 1 << 50  # behind the end of any file
_CLASSIC_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}  # of a value, by type


def library() -> Any:
    """The netCDF4 package.

    Raises:
        CallerError: if it is not installed.
    """
    try:
        import netCDF4
    except ImportError as error:
        raise CallerError("reading and writing NetCDF needs netCDF4; run `pip install 'nfscale[climate]'`") from error
    return netCDF4


@dataclass(frozen=True)
class Plane:
    """A variable that holds maps, and how its axes lie."""

    name: str
    rows: int
    """Position of the latitude axis among the variable's."""
    columns: int
    others: tuple[int, ...]
    """Positions of the axes along which there are several maps."""
    latitude: str
    """The variable with the rows' latitudes."""
    longitude: str
    lengths: tuple[int, ...]
    """Maps along each of `others`; empty where the variable is one map."""
    time: tuple[int, str] | None = None
    """Position of the axis along which a datum has several times, and the variable with them."""
    level: tuple[int, str] | None = None
    """Position of the axis whose levels are channels of a datum, and the variable with them."""

    @property
    def maps(self) -> int:
        return math.prod(self.lengths)


class MapFile:
    """An open NetCDF file. Variables inside groups are not looked at.

    Raises:
        ValueError: if it is none, or ends before its header says; CallerError without netCDF4.
    """

    def __init__(self, source: Path | bytes, *, latitude: str | None = None, longitude: str | None = None) -> None:
        netcdf4 = library()
        self._named = latitude, longitude
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            _refuse_truncated(stream)
        try:
            where: Any = {"filename": "maps.nc", "memory": source} if isinstance(source, bytes) else {}
            self._file = netcdf4.Dataset(**(where or {"filename": os.fspath(source.absolute())}))  # type: ignore
        except Exception as error:  # whatever the library makes of a damaged file
            raise ValueError(f"not a NetCDF file, or a damaged one ({_told(error)})") from error

    def close(self) -> None:
        self._file.close()

    @cached_property
    def planes(self) -> dict[str, Plane]:
        """The variables that hold maps, by name."""
        found = {}
        for name, variable in self._file.variables.items():
            plane = self._plane(name, variable)
            if plane is not None:
                found[name] = plane
        return found

    def _plane(self, name: str, variable: Any) -> Plane | None:
        if not _is_numeric(variable) or len(variable.dimensions) < 2:
            return None
        rows = self._axis(variable.dimensions, self._named[0], _is_latitude)
        columns = self._axis(variable.dimensions, self._named[1], _is_longitude)
        if rows is None or columns is None or rows[0] == columns[0]:
            return None
        others = tuple(axis for axis in range(len(variable.dimensions)) if axis not in (rows[0], columns[0]))
        lengths = tuple(int(variable.shape[axis]) for axis in others)
        return Plane(name, rows[0], columns[0], others, rows[1], columns[1], lengths)

    def _axis(self, dimensions: Sequence[str], named: str | None, fits: Any) -> tuple[int, str] | None:
        """Which of the dimensions is latitude or longitude, and the variable that says where its cells are."""
        for axis, dimension in enumerate(dimensions):
            along = [n for n, v in self._file.variables.items() if v.dimensions == (dimension,) and v.dtype != str]
            along.sort(key=lambda n, dimension=dimension: n != dimension)
            for name in along:
                if name == named or dimension == named or (named is None and fits(name, self._file.variables[name])):
                    return axis, name
        return None

    def require(self, names: Sequence[str]) -> list[Plane]:
        """The planes of these variables, which are the channels of maps.

        Raises:
            ValueError: if there is no such variable, it holds no maps, or they are not of one grid.
        """
        planes = []
        for name in names:
            if name not in self._file.variables:
                there = ", ".join(map(repr, sorted(self.planes))) or "none at all"
                raise ValueError(f"there is no variable {name!r}; variables with latitude and longitude are {there}")
            if name not in self.planes:
                raise ValueError(
                    f"the variable {name!r} is no map: it has not both latitude and longitude among its dimensions "
                    f"{list(self._file.variables[name].dimensions)}"
                )
            planes.append(self.planes[name])
        first = planes[0]
        for other in planes[1:]:
            mine, theirs = (self._file.variables[one.name].dimensions for one in (first, other))
            if mine != theirs:
                raise ValueError(
                    f"{first.name!r} has the dimensions {list(mine)} and {other.name!r} {list(theirs)}; channels of "
                    "one map have the same"
                )
        return planes

    def together(self, plane: Plane, time: bool = False, levels: bool = False) -> Plane:
        """The plane whose data take in all times, or all levels.

        Raises:
            ValueError: if the variable has no such axis.
        """
        found: dict[str, Any] = {}
        for wanted, key, named in ((time, "time", self._time_of), (levels, "level", self._levels_of)):
            along = [(axis, name) for axis in plane.others if wanted and (name := named(plane, axis)) is not None]
            if wanted and not along:
                there = list(self._file.variables[plane.name].dimensions)
                raise ValueError(f"the variable {plane.name!r} has no axis of {key}s among its dimensions {there}")
            found |= {key: along[0]} if along else {}
        taken = [axis for axis, _ in found.values()]
        kept = [(axis, n) for axis, n in zip(plane.others, plane.lengths, strict=True) if axis not in taken]
        return replace(plane, others=tuple(axis for axis, _ in kept), lengths=tuple(n for _, n in kept), **found)

    def _along(self, plane: Plane, axis: int) -> list[str]:
        """Variables with a number for each place of an axis, the one of its name first."""
        dimension = self._file.variables[plane.name].dimensions[axis]
        along = [n for n, v in self._file.variables.items() if v.dimensions == (dimension,) and _is_numeric(v)]
        return sorted(along, key=lambda name: name != dimension)

    def _time_of(self, plane: Plane, axis: int) -> str | None:
        """The variable with the times along an axis, or None."""
        return next((name for name in self._along(plane, axis) if " since " in (self.text(name, "units") or "")), None)

    def _levels_of(self, plane: Plane, axis: int) -> str | None:
        """The variable with the levels along an axis, or None."""
        return next((name for name in self._along(plane, axis) if self._is_level(name)), None)

    def _is_level(self, name: str) -> bool:
        variable = self._file.variables[name]
        said = {key: str(getattr(variable, key, "")).strip().lower() for key in ("units", "standard_name", "axis")}
        is_named = name.lower() in _LEVEL_NAMES or said["standard_name"] in _LEVEL_STANDARDS
        return is_named or said["axis"] == "z" or said["units"] in _PRESSURE_UNITS or hasattr(variable, "positive")

    def read(self, planes: Sequence[Plane], place: int, missing: float | None = None) -> SphereMap:
        """One datum, by its place among those of these planes: no more is read.

        Args:
            missing: a value that means missing, beside those that the file declares.

        Raises:
            ValueError: in a sentence, if it cannot be read or is too large.
        """
        first = planes[0]
        shape = self._file.variables[first.name].shape
        height, width = int(shape[first.rows]), int(shape[first.columns])
        whole = [one[0] for one in (first.time, first.level) if one is not None]
        several = math.prod(int(shape[axis]) for axis in whole)
        if several * height * width * len(planes) > MAX_VALUES or max(height, width, several) > _LONGEST_AXIS:
            raise ValueError(
                f"too large: {'a map' if not whole else f'{several} maps'} of {height} x {width} cells, at most "
                f"{MAX_VALUES:,} values are read at once"
            )
        if not several * height * width:
            raise ValueError(f"a map without cells: {several} of {height} x {width}")
        for variable in (self._file.variables[plane.name] for plane in planes):
            pieces = variable.chunking()
            if isinstance(pieces, list) and math.prod(pieces) * variable.dtype.itemsize > _PIECE_BYTES:
                raise ValueError(
                    f"too large: {variable.name!r} is stored in pieces of more than {_PIECE_BYTES:,} bytes"
                )
        index: list[Any] = [slice(None)] * len(shape)
        for axis, position in zip(first.others, np.unravel_index(place, first.lengths or (1,)), strict=False):
            index[axis] = int(position)
        with warnings.catch_warnings(), np.errstate(over="ignore"):
            warnings.simplefilter("ignore")  # on attributes that make no sense, which netCDF4 then ignores
            try:
                latitude, longitude = (self._filled(name, slice(None)) for name in (first.latitude, first.longitude))
                found = [self._filled(plane.name, tuple(index)) for plane in planes]
                times = None if first.time is None else self._filled(first.time[1], slice(None))
                levels = None if first.level is None else self._filled(first.level[1], slice(None))
            except Exception as error:  # whatever the library makes of damaged content
                raise ValueError(f"cannot be read from the file: {_told(error)}") from error
            left = sorted([*whole, first.rows, first.columns])  # the axes of what was read
            order = [first.rows, first.columns]
            order = order if first.time is None else [first.time[0], *order]
            order = order if first.level is None else [*order, first.level[0]]
            channels = [one.transpose([left.index(axis) for axis in order]) for one in found]
            channels = [one if first.level is not None else one[..., None] for one in channels]
            values = np.concatenate(channels, axis=-1).astype(np.float32)
        if missing is not None:
            values[np.isclose(values, np.float32(missing), rtol=1e-6, atol=0)] = np.nan
        origin = self._origin(planes, levels)
        names = origin.variables
        if origin.levels is not None:
            names = tuple(f"{name}_{level:g}" for name, level in zip(names, origin.levels, strict=True))
        units = tuple(self.text(name, "units") or "1" for name in origin.variables)
        values = np.ascontiguousarray(values)
        return SphereMap(values, latitude, longitude, names, units, times=times, origin=origin)

    def _origin(self, planes: Sequence[Plane], levels: np.ndarray | None) -> Origin:
        """What the file calls the parts of a datum."""
        first = planes[0]
        dimensions = self._file.variables[first.name].dimensions
        each = 1 if levels is None else len(levels)
        said: dict[str, Any] = {"latitude": first.latitude, "longitude": first.longitude}
        if levels is not None and first.level is not None:
            axis, name = first.level
            said |= {"level": dimensions[axis], "levels": tuple(map(float, levels)) * len(planes)}
            said["level_units"] = self.text(name, "units") or "1"
        if first.time is not None:
            axis, name = first.time
            said |= {"time": dimensions[axis], "time_units": self.text(name, "units")}
            said["calendar"] = self.text(name, "calendar") or "standard"
        return Origin(tuple(plane.name for plane in planes for _ in range(each)), **said)

    def _filled(self, name: str, index: Any) -> np.ndarray:
        """Values in their unit: float64 or float32, NaN where the file says missing."""
        values: Any = np.ma.asarray(self._file.variables[name][index])
        return values.astype(values.dtype if values.dtype == np.float32 else np.float64).filled(np.nan)

    def text(self, name: str, attribute: str) -> str | None:
        """An attribute that is text and says something."""
        value = getattr(self._file.variables[name], attribute, None)
        return value.strip() or None if isinstance(value, str) else None

    def months(self, plane: Plane) -> tuple[int, list[int]] | None:
        """Which of the plane's `others` is time, and the month (1 to 12) at each of its places; None without one."""
        netcdf4 = library()
        for position, axis in enumerate(plane.others):
            name = self._time_of(plane, axis)
            if name is None or plane.lengths[position] > _LONGEST_AXIS:
                continue
            units, calendar = self.text(name, "units"), self.text(name, "calendar") or "standard"
            with warnings.catch_warnings(), contextlib.suppress(Exception):  # no label is better than no data
                warnings.simplefilter("ignore")  # on a year zero, which climatologies count from
                dates = netcdf4.num2date(self._filled(name, slice(None)), units, calendar, has_year_zero=True)
                return position, [int(date.month) for date in np.atleast_1d(dates)]
        return None


def joined(maps: Sequence[SphereMap]) -> SphereMap:
    """Maps of one grid, with names and units, as the channels of one."""
    values = np.concatenate([one.values for one in maps], axis=-1)
    names = tuple(name for one in maps for name in one.names or ())
    units = tuple(unit for one in maps for unit in one.units or ())
    return SphereMap(values, maps[0].latitude, maps[0].longitude, names, units)


def to_bytes(content: SphereMap) -> bytes:
    """A NetCDF file with coordinates, units and names by the CF conventions.

    Variables, levels and times are called what they are called in the file that the maps came from.
    """
    origin = content.origin
    if origin is not None and (content.times is not None or origin.levels is not None):
        return _written(lambda file: _write_as_came(file, content, origin))
    channels = content.values.shape[2]
    names = content.names or (("value",) if channels == 1 else tuple(f"value_{n}" for n in range(channels)))
    units = content.units or ("1",) * channels

    def write(file: Any) -> None:
        _write_grid(file, content, "lat", "lon")
        for channel, unit in enumerate(units):
            name = _variable_name(names[channel], set(file.variables))
            variable = _new_map(file, name, ("lat", "lon"))
            variable.setncatts({"units": unit, "long_name": names[channel]})
            variable[:] = content.values[:, :, channel]

    return _written(write)


def _written(write: Callable[[Any], None]) -> bytes:
    """A file that is filled by a function."""
    with tempfile.TemporaryDirectory(prefix="nfscale-") as folder:
        path = Path(folder) / "maps.nc"
        with library().Dataset(os.fspath(path), "w", format="NETCDF4") as file:
            file.setncatts({"Conventions": "CF-1.8", "source": "decoded from a neural field by nfscale"})
            write(file)
        return path.read_bytes()


def _write_grid(file: Any, content: SphereMap, latitude: str, longitude: str) -> None:
    for name, standard, unit, axis, values in (
        (latitude, "latitude", "degrees_north", "Y", content.latitude),
        (longitude, "longitude", "degrees_east", "X", content.longitude),
    ):
        attributes = {"standard_name": standard, "long_name": standard, "units": unit, "axis": axis}
        _write_axis(file, name, values, attributes)


def _write_axis(file: Any, name: str, values: np.ndarray, attributes: dict[str, str]) -> None:
    file.createDimension(name, len(values))
    variable = file.createVariable(name, "f8", (name,))
    variable.setncatts(attributes)
    variable[:] = values


def _new_map(file: Any, name: str, dimensions: tuple[str, ...]) -> Any:
    return file.createVariable(name, "f4", dimensions, fill_value=np.float32(np.nan), compression="zlib")


def _write_as_came(file: Any, content: SphereMap, origin: Origin) -> None:
    """[time, level, latitude, longitude], of these those that there are."""
    taken: set[str] = set()
    latitude, longitude, time, level = (
        _taking(name, taken) for name in (origin.latitude, origin.longitude, origin.time, origin.level)
    )
    _write_grid(file, content, latitude, longitude)
    dimensions: tuple[str, ...] = ()
    if content.times is not None:
        said = {"units": origin.time_units or "1", "calendar": origin.calendar, "standard_name": "time", "axis": "T"}
        _write_axis(file, time, content.times, said)
        dimensions = (time,)
    levels = None if origin.levels is None else list(dict.fromkeys(origin.levels))
    if levels is not None:
        _write_axis(file, level, np.array(levels), {"units": origin.level_units, "axis": "Z"})
        dimensions = (*dimensions, level)
    for name in dict.fromkeys(origin.variables):
        channels = [place for place, one in enumerate(origin.variables) if one == name]
        variable = _new_map(file, _taking(name, taken), (*dimensions, latitude, longitude))
        variable.setncatts({"units": content.units[channels[0]] if content.units else "1", "long_name": name})
        values = content.values[..., channels]
        variable[:] = values[..., 0] if levels is None else np.moveaxis(values, -1, -3)


def _taking(name: str, taken: set[str]) -> str:
    found = _variable_name(name, taken)
    taken.add(found)
    return found


def _variable_name(name: str, taken: set[str]) -> str:
    """A name that every reader of NetCDF takes, and that no other variable has."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in name)
    plain = plain if plain[:1].isalpha() else f"v_{plain}"
    while plain in taken:
        plain += "_"
    return plain


def _is_numeric(variable: Any) -> bool:
    return getattr(variable.dtype, "kind", "text") in ("i", "u", "f")


def _is_latitude(name: str, variable: Any) -> bool:
    return _is_axis(name, variable, _LATITUDE_UNITS, "latitude", _LATITUDE_NAMES, "y")


def _is_longitude(name: str, variable: Any) -> bool:
    return _is_axis(name, variable, _LONGITUDE_UNITS, "longitude", _LONGITUDE_NAMES, "x")


def _is_axis(name: str, variable: Any, units: set[str], standard: str, names: set[str], axis: str) -> bool:
    """By the unit or the standard name of the CF conventions; where neither is there, by what else says it."""
    said = {key: str(getattr(variable, key, "")).strip().lower() for key in ("units", "standard_name", "axis")}
    if said["standard_name"]:
        return said["standard_name"] == standard
    if said["units"] in units or name.lower() in names:
        return True
    return said["units"].startswith("degree") and said["units"] in ("degree", "degrees") and said["axis"] == axis


def _told(error: BaseException) -> str:
    """What the library says, without the paths it says it of."""
    return " ".join(str(error).split(": '")[0].split())[:200] or type(error).__name__


# --- classic files


class _Header:
    """Numbers and names of a classic file's header, one after the other."""

    def __init__(self, stream: BinaryIO, version: int) -> None:
        self._stream = stream
        self._count, self._offset = (">q" if version == 5 else ">i"), (">i" if version == 1 else ">q")

    def _number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        content = self._stream.read(size)
        if len(content) != size:
            raise ValueError("the file ends within its header")
        return struct.unpack(kind, content)[0]

    def count(self) -> int:
        found = self._number(self._count)
        if found < 0:
            raise ValueError("its header is damaged: a negative length")
        return found

    def records(self) -> int | None:
        """None of a file whose writer did not know."""
        found = self._number(self._count)
        return found if found >= 0 else None

    def offset(self) -> int:
        return self._number(self._offset)

    def tag(self) -> int:
        return self._number(">i")

    def skip(self, size: int) -> None:
        self._stream.seek(-(-min(size, _ABSURD_BYTES) // 4) * 4, os.SEEK_CUR)

    def items(self, tag: int) -> range:
        """Of a list, one turn for each entry; an absent list is empty."""
        found, length = self.tag(), self.count()
        if found not in (0, tag) or (found == 0 and length):
            raise ValueError("its header is damaged: another list was expected")
        return range(length)

    def skip_attributes(self) -> None:
        for _ in self.items(12):
            self.skip(self.count())
            kind = self.tag()
            if kind not in _CLASSIC_BYTES:
                raise ValueError("its header is damaged: an attribute of an unknown type")
            self.skip(self.count() * _CLASSIC_BYTES[kind])


def _refuse_truncated(stream: BinaryIO) -> None:
    """Refuse a classic file that is shorter than its header says.

    Raises:
        ValueError: saying so, or that the header itself is damaged.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    magic = stream.read(4)
    if not magic:
        raise ValueError("the file is empty")
    if magic[:3] != b"CDF" or magic[3:] not in (b"\1", b"\2", b"\5"):
        return
    header = _Header(stream, magic[3])
    records = header.records()
    lengths = []
    for _ in header.items(10):
        header.skip(header.count())
        lengths.append(header.count())
    header.skip_attributes()
    ends, begins, record = [0], [], 0
    for _ in header.items(11):
        header.skip(header.count())
        dimensions = [header.count() for _ in range(header.count())]
        header.skip_attributes()
        kind = header.tag()
        header.count()  # the size of a record, which overflows for large variables
        begin = header.offset()
        if kind not in _CLASSIC_BYTES or any(one >= len(lengths) for one in dimensions):
            raise ValueError("its header is damaged: a variable of an unknown type or dimension")
        shape = [lengths[one] for one in dimensions]
        is_record = bool(shape) and shape[0] == 0
        own = math.prod(shape[is_record:]) * _CLASSIC_BYTES[kind]
        if is_record:
            begins.append((begin, own))
            record += -(-own // 4) * 4
        else:
            ends.append(begin + own)
    if len(begins) == 1:  # a lone record variable is not padded
        record = begins[0][1]
    if records:
        ends += [begin + (records - 1) * record + own for begin, own in begins]
    if max(ends) > size:
        raise ValueError(f"the file is truncated: it has {size:,} bytes, its header says at least {max(ends):,}")
