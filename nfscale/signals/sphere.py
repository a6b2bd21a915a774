"""Maps on the sphere: unit vectors of cell centres to values of any unit, area-weighted error and PSNR.

A cell counts by its area, which on a regular grid is the cosine of its latitude; a row at a pole has the area of
its cap, and columns that lie at one longitude (a wrap column) share theirs. A cell is missing where any channel is.

Missing cells are no samples: a draw of them would teach nothing, and a minibatch of nothing else would divide zero
by zero. So that maps with different gaps still share a batch, the cells that are there take their places: some
stand twice or more among the samples, and share their weight.

Of maps at several times the field is one of unit vectors and time, which runs from -1 to 1 over the span of the run.

Samples follow a Morton curve through the cube around the sphere, so that a run of neighbours in the order is a patch
of the sphere at any latitude, and a stratified draw covers it (runs in the order of an image's rows and columns would
be wedges at the poles). Of a cell at several times, they follow each other.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nfscale.signals.base import Pointwise, Samples, mean_squared_error, psnr_db, require_decodable

_SHIFT = 0.5
"""Fields represent values scaled to [0, 1], less this: residuals are then small at the start, as for images."""

_GRIDS_KEPT = 4  # whose vectors, areas and order are remembered: 60 bytes for each cell
_MORTON_BITS = 16  # of each axis: 1 / 65536 of the cube is finer than any grid that fits in memory
_UNEVEN_DEGREES = 2e-3
"""Rows further than this from evenly spaced ones are a grid of their own (Gaussian grids are 0.03 off)."""
_LARGEST_VALUE = 1e30
"""No quantity is so large in its usual unit: beyond lie the values that files mean as missing (-1e34, 9.97e36)."""
_LARGEST_EXCESS = 100.0
"""A value so many ranges outside the range is no outlier but a missing value (-9999) or another unit."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Origin:
    """How the file that maps came from calls what is in it."""

    variables: tuple[str, ...]
    """The variable that each channel is, or is a level of."""
    latitude: str = "lat"
    longitude: str = "lon"
    level: str = "level"
    levels: tuple[float, ...] | None = None
    """The level of each channel, where channels are levels."""
    level_units: str = "1"
    time: str = "time"
    time_units: str | None = None
    """`hours since 1900-01-01`; None of maps at one time."""
    calendar: str = "standard"

    def __post_init__(self) -> None:
        for name in ("variables", "levels"):  # JSON has lists for tuples
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))


@dataclass(frozen=True, eq=False)
class SphereMap:
    """Values on a grid of latitudes and longitudes, at one time or at several. As an array, its values."""

    values: np.ndarray
    """[H, W, C], NaN where missing; with `times`, [T, H, W, C]."""
    latitude: np.ndarray
    """[H] degrees north, of the cell centres, strictly ascending or descending."""
    longitude: np.ndarray
    """[W] degrees east, of the cell centres, in one direction around."""
    names: tuple[str, ...] | None = None
    """Of the channels, where the source names them."""
    units: tuple[str, ...] | None = None
    """Of the channels, where the source states them."""
    ranges: tuple[Range, ...] | None = None
    """Of the channels, lowest and highest: what the format states, or what a run scales by."""
    times: np.ndarray | None = None
    """float64 [T], ascending, in the origin's unit of time."""
    origin: Origin | None = None

    def at(self, place: int) -> "SphereMap":
        """The map at one of its times."""
        return self if self.times is None else replace(self, values=self.values[place], times=None)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)


@dataclass(frozen=True)
class Sphere(Pointwise):
    """Maps of `channels` channels on grids of any size.

    An array [H, W] or [H, W, C] counts as an equirectangular map: rows from 90 to -90 degrees north, columns from -180
    to 180 degrees east, edge to edge; integers are of their full range.
    """

    channels: int
    value_range: Range | tuple[Range, ...] | Literal["auto"] = "auto"
    """[lowest, highest] of all channels, or one for each: what values are scaled by and PSNR relates to. auto: what
    each channel of the first data spans; of images [0, 1]."""
    names: tuple[str, ...] | None = None
    """Of the channels; without them what the first map says."""
    units: tuple[str, ...] | None = None
    """Of the channels; without them what the first map says."""
    latitudes: tuple[float, ...] | None = None
    """Rows at which to decode maps that have so many, where they are not evenly spaced; without them, those of the
    first map."""
    times: tuple[float, ...] | None = None
    """At which to decode maps that have so many times; without them, those of the first map, if it has any."""
    time_span: Range | None = None
    """First and last time that coordinates tell: -1 and 1. Without it, what the first maps span."""
    origin: Origin | None = None
    """What the decoded file calls its parts; without it, as the first map's file does."""
    holdout: int | None = None
    """Keep every so many-th cell back from the fit, for `quality_heldout`."""

    dimensions = 3
    axes = 2
    squared_error = True
    quality_name = "psnr_db"

    def __post_init__(self) -> None:
        for name in ("value_range", "names", "units", "latitudes", "times", "time_span"):  # JSON has lists for tuples
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))
        if isinstance(self.origin, dict):
            object.__setattr__(self, "origin", Origin(**self.origin))
        if self.time_span is not None:
            if not _is_range(self.time_span):
                raise ValueError(f"signal.time_span is [first, last], got {self.time_span}")
            object.__setattr__(self, "dimensions", 4)
            object.__setattr__(self, "axes", 3)
        for name in ("names", "units"):
            given = getattr(self, name)
            if given is not None and len(given) != self.channels:
                raise ValueError(f"signal.{name} has {len(given)} entries for {self.channels} channels")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout keeps every k-th cell back, with k at least 2; got {self.holdout}")
        self.ranges  # noqa: B018 (says what is wrong with it)

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """Lowest and highest value of each channel: [C]. What images have, where nothing has settled it."""
        if self.value_range == "auto":
            return ((0.0, 1.0),) * self.channels
        several = isinstance(self.value_range[0], tuple)
        ranges: Any = self.value_range if several else (self.value_range,) * self.channels
        if len(ranges) != self.channels or not all(_is_range(one) for one in ranges):
            raise ValueError(
                f"signal.value_range is [lowest, highest], or one such pair for each of {self.channels} channels; "
                f"got {self.value_range}"
            )
        return tuple((float(low), float(high)) for low, high in ranges)

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """What is left open as the first map has it; `value_range` as all of these maps do."""
        maps = [_checked(content) for content in contents]
        wanted = keys.get("channels", "auto")
        channels = maps[0].values.shape[-1] if wanted == "auto" else wanted
        alike = [one for one in maps if one.values.shape[-1] == channels]
        if not alike:
            raise ValueError(_channels_differ(maps[0].values.shape[-1], channels))
        first = alike[0]
        found: dict[str, Any] = {"channels": channels}
        for name in ("names", "units", "origin"):
            found[name] = keys.get(name) or getattr(first, name)
        if first.times is not None:
            alike = [one for one in alike if one.times is not None and _same_time(one.origin, first.origin)]
            found["times"] = keys.get("times") or tuple(first.times.tolist())
            found["time_span"] = keys.get("time_span") or _time_span(alike)
        if keys.get("latitudes") is None and not _is_even(first.latitude):
            found["latitudes"] = tuple(first.latitude.tolist())
        if keys.get("value_range", "auto") == "auto":
            found["value_range"] = _spanned(alike)
        return keys | found

    def samples(self, content: Any) -> Samples:
        """A map -> its cells in the order of the curve, those that are missing left out."""
        given = _checked(content)
        *lengths, channels = given.values.shape
        if channels != self.channels:
            raise ValueError(_channels_differ(channels, self.channels))
        if self.units and given.units and self.units != given.units:
            raise ValueError(f"the map's unit is {_listed(given.units)}, that of this run is {_listed(self.units)}")
        scaled = self._scaled(given.values).reshape(-1, channels)
        grid = _grid(given.latitude.tobytes(), given.longitude.tobytes())
        if (given.times is None) != (self.time_span is None):
            raise ValueError("the map has " + ("no times" if given.times is None else "times") + ", unlike this run's")
        if given.times is not None:
            grid = _at_times(grid, self._time_coordinates(given))
        there = ~np.isnan(scaled[grid.order]).any(axis=1)
        cells = grid.order[there]
        count = math.prod(lengths)
        if self.holdout is None:
            return _samples_of(cells, count, scaled, grid)
        kept = np.arange(len(cells)) % self.holdout != self.holdout - 1
        if kept.all():
            raise ValueError(f"the map has {len(cells)} cells, too few for signal.holdout={self.holdout}")
        heldout = _samples_of(cells[~kept], count // self.holdout, scaled, grid)
        return replace(_samples_of(cells[kept], count - count // self.holdout, scaled, grid), heldout=heldout)

    def _time_coordinates(self, given: SphereMap) -> np.ndarray:
        """Of a map's times: float32 [T] in [-1, 1]."""
        assert self.time_span is not None
        assert given.times is not None
        if not _same_time(given.origin, self.origin):
            there, here = _unit_of(given.origin), _unit_of(self.origin)
            raise ValueError(f"the map's times are in {there}, those of this run in {here}")
        first, last = self.time_span
        coordinates = 2 * (given.times - first) / (last - first) - 1
        if np.abs(coordinates).max() > 1 + 1e-6:
            raise ValueError(
                f"the map's times run from {given.times[0]:.10g} to {given.times[-1]:.10g}, the coordinates of this "
                f"run from {first:.10g} to {last:.10g}; signal.time_span=[first, last] sets them"
            )
        return np.clip(coordinates, -1, 1).astype(np.float32)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """Values [..., C] as fields represent them: float32."""
        low, high = np.array(self.ranges).T
        with np.errstate(invalid="ignore"):  # some NaNs complain when they are cast
            scaled = (values.astype(np.float64) - low) / (high - low)
        farthest = np.unravel_index(np.nanargmax(np.abs(scaled - 0.5)), scaled.shape)
        if abs(scaled[farthest] - 0.5) > _LARGEST_EXCESS:
            (low, high), value = self.ranges[farthest[-1]], values[farthest]
            raise ValueError(
                f"the map holds {value:.6g}, far from the range {low:.6g} to {high:.6g} of this run: a missing value "
                "that is not declared (dataset.missing names it), another unit, or signal.value_range is to be given"
            )
        return (scaled - _SHIFT).astype(np.float32)

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        return psnr_db(predicted, samples)

    def measures(self, content: Any) -> dict[str, float]:
        """Height and width, the first and the last row and column in degrees, and the share of the cells missing.

        Of maps at several times, how many, and the first and the last in coordinates from -1 to 1: a time since 1900
        in seconds is more than float32 tells.
        """
        given = _checked(content)
        height, width, _ = given.values.shape[-3:]
        times: dict[str, float] = {}
        if given.times is not None:
            ends = self._time_coordinates(given)[[0, -1]].tolist()
            times = {"times": float(len(given.times)), "time_first": ends[0], "time_last": ends[1]}
        return times | {
            "height": float(height),
            "width": float(width),
            "latitude_first": float(given.latitude[0]),
            "latitude_last": float(given.latitude[-1]),
            "longitude_first": float(given.longitude[0]),
            "longitude_last": float(given.longitude[-1]),
            "missing_fraction": float(np.isnan(given.values).any(axis=-1).mean()),
        }

    def shape_of(self, measures: dict[str, float]) -> tuple[Any, ...]:
        """(height, width) of an equirectangular map, else with the first and last latitude and longitude behind.

        Of maps at several times, with how many and the first and last of them in front.
        """
        names = ("latitude_first", "latitude_last", "longitude_first", "longitude_last")
        height, width = int(measures["height"]), int(measures["width"])
        ends = tuple(round(measures[name], 4) for name in names)  # the table has float32
        is_whole = np.allclose(ends, _ends_of_globe(height, width), atol=_UNEVEN_DEGREES / 2)
        in_front: tuple[Any, ...] = ()
        if self.time_span is not None:
            in_front = int(measures["times"]), *(round(float(measures[n]), 7) for n in ("time_first", "time_last"))
        return (*in_front, height, width) if is_whole else (*in_front, height, width, *ends)

    def shape_from(self, text: str, fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        """`90x180`: rows x columns of cells over the globe, or over the part of it that the map covers.

        Of maps at several times `24x90x180`, evenly from the first to the last, or `90x180` at those of the fit.
        """
        parts = text.lower().split("x")
        in_front: tuple[Any, ...] = ()
        if self.time_span is not None:
            in_front, fitted = tuple(fitted[:3]), fitted[3:]
            if len(parts) == 3 and parts[0].isdecimal() and int(parts[0]) > 0:
                in_front, parts = (int(parts[0]), *in_front[1:]), parts[1:]
            if len(parts) == 2 and all(part.isdecimal() for part in parts):
                require_decodable(in_front[0] * int(parts[0]) * int(parts[1]))
        return *in_front, *self._grid_from(text, parts, fitted)

    def _grid_from(self, text: str, parts: list[str], fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"cannot read {text!r}; write rows x columns of the grid, such as 90x180")
        height, width = int(parts[0]), int(parts[1])
        require_decodable(height * width)
        if len(fitted) == 2:
            return height, width
        rows, columns, *ends = fitted
        first, last = _edges(ends[0], ends[1], rows)
        nearly = 90 - abs(first - last) / (2 * rows)  # Gaussian grids end closer to the pole than half a row
        first, last = (math.copysign(90, edge) if abs(edge) > nearly else edge for edge in (first, last))
        west, east = _edges(ends[2], ends[3], columns)
        is_round = abs(east - west) >= 360 - _UNEVEN_DEGREES
        if is_round and abs(last - first) >= 180 - _UNEVEN_DEGREES:
            return height, width
        if is_round:
            west, east = -180.0, 180.0
        down, along = (last - first) / (2 * height), (east - west) / (2 * width)
        return height, width, *(round(end, 4) for end in (first + down, last - down, west + along, east - along))

    def _rows_and_columns(self, shape: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Latitudes [H] and longitudes [W] of a shape, float64."""
        height, width, *ends = shape
        first, last, west, east = ends or _ends_of_globe(height, width)
        latitude, longitude = np.linspace(first, last, height), np.linspace(west, east, width)
        own = self.latitudes
        if (
            own is not None
            and len(own) == height
            and np.allclose((own[0], own[-1]), (first, last), atol=_UNEVEN_DEGREES)
        ):
            latitude = np.array(own)
        return latitude, longitude

    def _times_of(self, shape: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The times of a shape in coordinates, and in the unit of the origin: float64 [T] each."""
        assert self.time_span is not None
        count, *ends = shape[:3]
        first, last = self.time_span
        own = np.array(self.times or ())
        if len(own) == count:
            coordinates = 2 * (own - first) / (last - first) - 1
            if np.allclose(coordinates[[0, -1]], ends, atol=1e-5):
                return coordinates, own
        coordinates = np.linspace(ends[0], ends[1], count) if count > 1 else np.array([sum(ends) / 2])
        return coordinates, first + (coordinates + 1) / 2 * (last - first)

    def coordinates(self, shape: tuple[Any, ...]) -> Tensor:
        """Of maps at several times, all cells of the first, then of the second."""
        if self.time_span is None:
            return torch.from_numpy(_unit_vectors(*self._rows_and_columns(shape)))
        times, vectors = self._times_of(shape)[0], _unit_vectors(*self._rows_and_columns(shape[3:]))
        every = np.repeat(times.astype(np.float32), len(vectors))
        return torch.from_numpy(np.column_stack([np.tile(vectors, (len(times), 1)), every]))

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[SphereMap]:
        """[F, N, C] in the order of `coordinates` -> maps in the data's own unit, not clamped; fields know no gaps."""
        times = None if self.time_span is None else self._times_of(shape)[1]
        grid = shape if times is None else shape[3:]
        latitude, longitude = self._rows_and_columns(grid)
        low, high = np.array(self.ranges).T
        scaled = values.detach().cpu().numpy().astype(np.float64) + _SHIFT
        maps = (scaled * (high - low) + low).astype(np.float32)
        maps = maps.reshape(-1, *(() if times is None else (len(times),)), grid[0], grid[1], self.channels)
        return [
            SphereMap(one, latitude, longitude, self.names, self.units, self.ranges, times, self.origin) for one in maps
        ]

    def original(self, content: Any) -> SphereMap:
        return replace(_checked(content), names=self.names, units=self.units, ranges=self.ranges)

    def forward_description(self) -> dict[str, Any]:
        low, high = np.array(self.ranges).T
        scale = high - low
        return {
            "kind": "sphere",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(x, y, z) = (cos(lat) cos(lon), cos(lat) sin(lon), sin(lat)) of the cell centres"
            + ("; then 2 (time - first) / (last - first) - 1 for time_span = [first, last]" if self.time_span else ""),
            "coordinate_range": [-1.0, 1.0],
            "output": {
                "scale": scale.tolist(),
                "shift": (low + _SHIFT * scale).tolist(),
                "unit": list(self.units) if self.units else None,
                "names": list(self.names) if self.names else None,
                "meaning": "value = scale * y + shift, of each channel, in its unit",
            },
            "quality": (
                "psnr_db is 10 log10(1 / e), e the mean over channels and cells of ((value - rebuilt) / scale)^2, "
                "cells weighted by their area, missing ones left out"
            ),
        }


# --- maps


def _as_map(content: Any) -> SphereMap:
    """Arrays as the equirectangular maps that they stand for."""
    if isinstance(content, SphereMap):
        return content
    array = np.asarray(content)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"a map is [rows, columns] or [rows, columns, channels], got shape {list(array.shape)}")
    ranges = None
    if array.dtype == bool or array.dtype in (np.uint8, np.uint16):
        peak = 1 if array.dtype == bool else np.iinfo(array.dtype).max
        array, ranges = array.astype(np.float32) / np.float32(peak), ((0.0, 1.0),) * array.shape[2]
    elif not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"arrays of maps are floats, or uint8, uint16 and bool of their full range; got {array.dtype}")
    ends = _ends_of_globe(*array.shape[:2])
    latitude, longitude = np.linspace(*ends[:2], array.shape[0]), np.linspace(*ends[2:], array.shape[1])
    return SphereMap(array, latitude, longitude, ranges=ranges)


def _checked(content: Any) -> SphereMap:
    """A map with axes in float64, longitudes without jumps, and values that are finite or NaN.

    Raises:
        ValueError: if the axes are none of a grid, or the values none of a map.
    """
    given = _as_map(content)
    values, latitude, longitude = given.values, *(np.asarray(a, np.float64) for a in (given.latitude, given.longitude))
    axes = 3 if given.times is None else 4
    if values.ndim != axes or 0 in values.shape or values.dtype.kind != "f":
        expected = "[rows, columns, channels]" if given.times is None else "[times, rows, columns, channels]"
        raise ValueError(f"a map is floats {expected}, got {values.dtype} {list(values.shape)}")
    if given.times is not None:
        _refuse_times(given.times, len(values))
    if (latitude.shape, longitude.shape) != (values.shape[-3:-2], values.shape[-2:-1]):
        raise ValueError(
            f"{list(latitude.shape)} latitudes and {list(longitude.shape)} longitudes for {list(values.shape)} values"
        )
    if not (np.isfinite(latitude).all() and np.isfinite(longitude).all()):
        raise ValueError("the latitudes or longitudes hold NaN or infinite values")
    if np.abs(latitude).max() > 90 + 1e-3:
        raise ValueError(f"latitudes run from {latitude.min():.6g} to {latitude.max():.6g}; the poles are at +-90")
    if np.abs(longitude).max() > 1080:
        raise ValueError(f"longitudes run from {longitude.min():.6g} to {longitude.max():.6g} degrees")
    latitude, longitude = np.clip(latitude, -90, 90), np.unwrap(longitude, period=360)
    for name, axis in (("latitudes", latitude), ("longitudes", longitude)):
        steps = np.diff(axis)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError(f"the {name} neither ascend nor descend")
    if abs(longitude[-1] - longitude[0]) > 360 + 1e-3:
        raise ValueError(f"longitudes run from {longitude[0]:.6g} to {longitude[-1]:.6g}, more than once around")
    if np.isnan(values).any(axis=-1).all():
        raise ValueError("all values of the map are missing")
    largest = values.flat[np.nanargmax(np.abs(values))]
    if np.isinf(largest):
        raise ValueError("the map holds infinite values")
    if abs(largest) > _LARGEST_VALUE:
        raise ValueError(
            f"the map holds {largest:.6g}, a missing value that the file does not declare; dataset.missing names it"
        )
    return replace(given, latitude=latitude, longitude=longitude)


def _spanned(maps: Sequence[SphereMap]) -> tuple[Range, ...]:
    """Lowest and highest value of each channel."""
    if maps[0].ranges is not None:
        return maps[0].ranges
    channels = [one.values.reshape(-1, one.values.shape[-1]) for one in maps]
    low = np.stack([np.nanmin(one, axis=0) for one in channels]).min(axis=0)
    high = np.stack([np.nanmax(one, axis=0) for one in channels]).max(axis=0)
    ranges = tuple(zip(low.tolist(), high.tolist(), strict=True))
    if not all(map(_is_range, ranges)):
        raise ValueError(f"the map is constant, so signal.value_range is to be given; its values are {low.tolist()}")
    return ranges


def _refuse_times(times: np.ndarray, count: int) -> None:
    if times.shape != (count,):
        raise ValueError(f"{list(times.shape)} times for {count} maps")
    if not np.isfinite(times).all():
        raise ValueError("the times hold NaN, infinite or missing values")
    if not (np.diff(times) > 0).all():
        raise ValueError("the times do not ascend")


def _same_time(one: Origin | None, other: Origin | None) -> bool:
    """Whether times of two origins are numbers of the same unit."""
    return one is not None and other is not None and _unit_of(one) == _unit_of(other)


def _unit_of(origin: Origin | None) -> str:
    return "no unit" if origin is None else f"{origin.time_units!r} ({origin.calendar})"


def _time_span(maps: Sequence[SphereMap]) -> Range:
    """First and last time of maps, half a unit around a lone one."""
    times = [one.times for one in maps if one.times is not None]
    first, last = float(min(one[0] for one in times)), float(max(one[-1] for one in times))
    return (first, last) if first < last else (first - 0.5, first + 0.5)


def _is_range(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and bool(np.isfinite(pair).all()) and pair[0] < pair[1]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _listed(units: tuple[str, ...]) -> str:
    return ", ".join(map(repr, units))


def _channels_differ(found: int, wanted: int) -> str:
    return f"the map has {found} channels, the fields of this run have {wanted}"


# --- grids


@dataclass(frozen=True)
class _Grid:
    """What the cells of a grid are to samples, in row order but for `order`."""

    vectors: np.ndarray
    """float32 [N, 3], on the unit sphere; with times, [N, 4]."""
    areas: np.ndarray
    """float64 [N]; the unit cancels."""
    order: np.ndarray
    """int64 [N]: the cells along the curve."""


def _at_times(grid: _Grid, times: np.ndarray) -> _Grid:
    """The cells at each of the times, float32 [T]: in row order those of one time after those of another."""
    count, cells = len(times), len(grid.vectors)
    vectors = np.column_stack([np.tile(grid.vectors, (count, 1)), np.repeat(times, cells)])
    order = (grid.order[:, None] + cells * np.arange(count)).ravel()
    return _Grid(vectors, np.tile(grid.areas, count), order)


@lru_cache(maxsize=_GRIDS_KEPT)
def _grid(latitude: bytes, longitude: bytes) -> _Grid:
    """Of axes given as the bytes of float64, which can be looked up."""
    rows, columns = np.frombuffer(latitude), np.frombuffer(longitude)
    vectors = _unit_vectors(rows, columns)
    return _Grid(vectors, cell_areas(rows, columns).ravel(), _curve(vectors))


def cell_areas(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Areas of the cells of a grid, in a unit that cancels: float64 [H, W]."""
    return np.outer(_row_heights(latitude), _column_widths(longitude))


def _unit_vectors(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """float32 [H * W, 3] in row order."""
    rows, columns = np.deg2rad(latitude)[:, None], np.deg2rad(longitude)[None]
    x, y, z = np.broadcast_arrays(np.cos(rows) * np.cos(columns), np.cos(rows) * np.sin(columns), np.sin(rows))
    return np.clip(np.stack([x, y, z], axis=-1).reshape(-1, 3), -1, 1).astype(np.float32)


def _row_heights(latitude: np.ndarray) -> np.ndarray:
    """Extent along the axis of the zone around each row, to which its area is proportional (Archimedes): [H].

    Zones end halfway between rows; the outer ones reach as far out as in, at most to the pole.
    """
    if len(latitude) == 1:
        return np.ones(1)
    between = (latitude[1:] + latitude[:-1]) / 2
    edges = np.concatenate([[2 * latitude[0] - between[0]], between, [2 * latitude[-1] - between[-1]]])
    return np.abs(np.diff(np.sin(np.deg2rad(np.clip(edges, -90, 90)))))


def _column_widths(longitude: np.ndarray) -> np.ndarray:
    """Degrees that belong to each column, columns at one longitude sharing theirs: [W]."""
    around = np.mod(np.round(longitude, 6), 360)
    places, which, times = np.unique(around, return_inverse=True, return_counts=True)
    gaps = np.diff(np.append(places, places[0] + 360))
    usual = np.median(gaps)
    gaps = np.where(gaps > 2 * usual, usual, gaps)  # what lies outside of a regional grid belongs to no column
    widths = (gaps + np.roll(gaps, 1)) / 2
    return (widths / times)[which]


def _curve(vectors: np.ndarray) -> np.ndarray:
    """Cells [N] in the order of the Morton code of their place in the cube."""
    steps = ((vectors.astype(np.float64) + 1) / 2 * ((1 << _MORTON_BITS) - 1)).astype(np.uint64)
    code = np.zeros(len(vectors), np.uint64)
    for bit in range(_MORTON_BITS):
        for axis in range(3):
            code |= ((steps[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(3 * bit + axis)
    return np.argsort(code, kind="stable")


def _samples_of(cells: np.ndarray, count: int, scaled: np.ndarray, grid: _Grid) -> Samples:
    """`count` samples of these cells, at most so many, in order: each once, or about equally often at shared weight."""
    turn = np.arange(count) * len(cells) // count
    chosen = cells[turn]
    weights = grid.areas[chosen] / np.bincount(turn, minlength=len(cells))[turn]
    weights *= count / weights.sum()
    return Samples(
        torch.from_numpy(grid.vectors[chosen]),
        torch.from_numpy(scaled[chosen]),
        torch.from_numpy(weights.astype(np.float32)),
    )


def _is_even(axis: np.ndarray) -> bool:
    return bool(np.abs(axis - np.linspace(axis[0], axis[-1], len(axis))).max() <= _UNEVEN_DEGREES)


def _ends_of_globe(height: int, width: int) -> tuple[float, float, float, float]:
    """First and last latitude and longitude of an equirectangular map of the globe, north and west first."""
    return 90 - 90 / height, 90 / height - 90, 180 / width - 180, 180 - 180 / width


def _edges(first: float, last: float, count: int) -> tuple[float, float]:
    """Where the outer cells of an even axis end."""
    half = (last - first) / (2 * (count - 1)) if count > 1 else 0.5
    return first - half, last + half
