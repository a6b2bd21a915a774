"""Maps in NetCDF files: one datum for each time, level or member of a variable on a grid of latitudes and longitudes.

Levels can be channels of a datum, and time a coordinate of its field: then a datum is what is left.

Opening reads the headers of all files; a datum is one slab of a file, which each process keeps open. In a folder, a
file that cannot be used is one datum with the reason; once it is mended it has other data, which is another dataset.
What the files may hide is told in `nfscale.media.netcdf`.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from nfscale.datasets.base import ComputedIds, Dataset, Datum, Label, refuse_duplicates, require
from nfscale.datasets.folder import escaped, escaped_path, reason_of
from nfscale.datasets.places import located, opening
from nfscale.errors import CallerError
from nfscale.files import Files, StoreError
from nfscale.media.netcdf import MapFile, Plane, library

SUFFIXES = (".nc", ".nc4", ".cdf", ".netcdf")

_OPEN_FILES = 16  # a folder may hold more files than a process may open
_MOST_MAPS = 16 << 20  # of a file: a header of a hundred bytes may claim any number


@dataclass(frozen=True)
class NetCdf:
    """A NetCDF file, or those below a folder; ids are FILE/VARIABLE/0017, or FILE/VARIABLE/0003-0012 of several axes.

    A URI is taken too; of an object store whole files are fetched.
    """

    path: str
    variable: str | list[str] | None = None
    """Several are the channels of one map. Without it, the one variable that has latitude and longitude."""
    latitude: str | None = None
    """The name of the axis, where its attributes do not say that it is one."""
    longitude: str | None = None
    missing: float | None = None
    """A value that means missing, beside those that the files declare."""
    label_from: Literal["month"] | None = None
    """month: 1 to 12, of the time axis."""
    time: Literal["each", "coordinate"] = "each"
    """coordinate: a datum is all times of a map, and time a coordinate of its field."""
    levels: Literal["each", "channels"] = "each"
    """channels: a datum has all levels of its variables as channels, named such as t_850."""

    def open(self) -> "NetCdfDataset":
        library()
        files, name = located(self.path)
        with opening("dataset.path"):
            names = [name] if name else [one for one in files.names() if one.lower().endswith(SUFFIXES)]
        require(bool(names), f"dataset.path: no files below {self.path!r} end in one of {' '.join(SUFFIXES)}")
        opened = _OpenFiles(lambda stack, path: self._open(stack, files, path))
        parts = [self._part(opened, one) for one in names]
        failed = [part for part in parts if part.error is not None]
        if len(failed) == len(parts):
            raise CallerError(f"dataset.path: {failed[0].name!r}: {failed[0].error}")
        return NetCdfDataset(opened, parts, self.missing)

    def _open(self, stack: ExitStack, files: Files, name: str) -> MapFile:
        """A file as long as the stack lives.

        Raises:
            OSError: if it cannot be read; ValueError with the reason, if it is no NetCDF file.
        """
        path = stack.enter_context(files.local_copy(name))
        root = getattr(files, "path", None)
        if isinstance(root, Path):
            _refuse_elsewhere(root, path)
        file = MapFile(path, latitude=self.latitude, longitude=self.longitude)
        stack.callback(file.close)
        return file

    def _part(self, opened: "_OpenFiles", name: str) -> "_Part":
        """What is remembered of a file: its maps, or why it has none."""
        try:
            file = opened[name]
            together = {"time": self.time == "coordinate", "levels": self.levels == "channels"}
            planes = [file.together(plane, **together) for plane in file.require(self._variables(file))]
            require(planes[0].maps <= _MOST_MAPS, f"dataset.path: {name!r} claims {planes[0].maps:,} maps")
            months = file.months(planes[0]) if self.label_from == "month" else None
            return _Part(name, planes, months)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            return _Part(name, [], None, reason_of(error))

    def _variables(self, file: MapFile) -> list[str]:
        if self.variable is not None:
            return [self.variable] if isinstance(self.variable, str) else self.variable
        there = list(file.planes)
        if len(there) != 1:
            several = f"several variables are maps ({', '.join(map(repr, sorted(there)))}); dataset.variable names some"
            raise ValueError(several if there else "no variable has both latitude and longitude among its dimensions")
        return there


class NetCdfDataset(Dataset):
    """The maps of the files, one file after the other."""

    is_thread_bound = True  # its library must not even close a file in one thread while another reads

    def __init__(self, opened: "_OpenFiles", parts: "list[_Part]", missing: float | None) -> None:
        self._opened, self._parts, self._missing = opened, parts, missing
        self._stops = list(accumulate(part.maps for part in parts))
        stems = [part.stem for part in parts]
        self._titles = stems if len(set(stems)) == len(stems) else [escaped_path(part.name) for part in parts]
        refuse_duplicates([f"{t}/{p.title}" for t, p in zip(self._titles, parts, strict=True)], "dataset.path")

    def _place(self, position: int) -> tuple[int, int]:
        """(part, map of it)."""
        part = bisect_right(self._stops, position)
        return part, position - (self._stops[part - 1] if part else 0)

    @cached_property
    def ids(self) -> Sequence[str]:
        def id_at(position: int) -> str:
            part, place = self._place(position)
            return f"{self._titles[part]}{self._parts[part].suffix(place)}"

        return ComputedIds(self._stops[-1], id_at)

    def read(self, position: int) -> Datum:
        part, place = self._place(position)
        described = self._parts[part]
        datum_id, label = self.ids[position], described.label(place)
        if described.error is not None:
            return Datum(datum_id, position, None, error=described.error)
        try:
            content = self._opened[described.name].read(described.planes, place, self._missing)
        except StoreError:
            raise
        except (OSError, ValueError, MemoryError) as error:
            return Datum(datum_id, position, None, label, error=reason_of(error))
        return Datum(datum_id, position, content, label)


@dataclass(frozen=True)
class _Part:
    """What is remembered of a file that is not open."""

    name: str
    planes: list[Plane]
    """The channels."""
    months: tuple[int, list[int]] | None
    """Which of the axes is time, and the month at each of its places."""
    error: str | None = None

    @property
    def maps(self) -> int:
        return self.planes[0].maps if self.planes else 1

    @property
    def stem(self) -> str:
        return escaped_path(self.name.rpartition(".")[0] or self.name)

    @property
    def title(self) -> str:
        return "+".join(escaped(plane.name) for plane in self.planes)

    def _indices(self, place: int) -> tuple[int, ...]:
        lengths = self.planes[0].lengths
        return tuple(map(int, np.unravel_index(place, lengths))) if lengths else ()

    def suffix(self, place: int) -> str:
        """What tells a map from others of the file; of a file that cannot be used, nothing."""
        if not self.planes:
            return ""
        indices = self._indices(place)
        return f"/{self.title}/{'-'.join(f'{one:04d}' for one in indices)}" if indices else f"/{self.title}"

    def label(self, place: int) -> Label:
        if self.months is None:
            return None
        axis, months = self.months
        return months[self._indices(place)[axis]]


class _OpenFiles:
    """Files by name, opened when they are asked for, the last few of them kept open."""

    def __init__(self, open_into: Callable[[ExitStack, str], MapFile]) -> None:
        self._open_into = open_into
        self._open: dict[str, tuple[ExitStack, MapFile]] = {}

    def __getitem__(self, name: str) -> MapFile:
        if name in self._open:
            return self._open[name][1]
        while len(self._open) >= _OPEN_FILES:
            self._open.pop(next(iter(self._open)))[0].close()
        with ExitStack() as stack:
            file = self._open_into(stack, name)
            self._open[name] = stack.pop_all(), file
        return file


def _refuse_elsewhere(root: Path, path: Path) -> None:
    """Refuse what a link below a folder leads to outside, and what is no file."""
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise ValueError("a link that leads out of the dataset's folder; put the file itself there")
    if not real.is_file():
        raise ValueError("not a regular file")
