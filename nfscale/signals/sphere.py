"""Maps on the sphere: unit vectors of cell centres to values of any unit, area-weighted error and PSNR.

A cell counts by its area, which on a regular grid is the cosine of its latitude; a row at a pole has the area of
its cap, and columns that lie at one longitude (a wrap column) share theirs. A cell is missing where any channel is.

Missing cells are no samples: a draw of them would teach nothing, and a minibatch of nothing else would divide zero
by zero. So that maps with different gaps still share a batch, the cells that are there take their places: some
stand twice or more among the samples, and share their weight.

Samples follow a Morton curve through the cube around the sphere, so that a run of neighbours in the order is a patch
of the sphere at any latitude, and a stratified draw covers it (runs in the order of an image's rows and columns would
be wedges at the poles).
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


@dataclass(frozen=True, eq=False)
class SphereMap:
    """Values on a grid of latitudes and longitudes. As an array, its values."""

    values: np.ndarray
    """[H, W, C], NaN where missing."""
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
    holdout: int | None = None
    """Keep every so many-th cell back from the fit, for `quality_heldout`."""

    dimensions = 3
    axes = 2
    squared_error = True
    quality_name = "psnr_db"

    def __post_init__(self) -> None:
        for name in ("value_range", "names", "units", "latitudes"):  # JSON has lists for tuples
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))
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
        channels = maps[0].values.shape[2] if wanted == "auto" else wanted
        alike = [one for one in maps if one.values.shape[2] == channels]
        if not alike:
            raise ValueError(_channels_differ(maps[0].values.shape[2], channels))
        first = alike[0]
        found: dict[str, Any] = {"channels": channels}
        for name in ("names", "units"):
            found[name] = keys.get(name) or getattr(first, name)
        if keys.get("latitudes") is None and not _is_even(first.latitude):
            found["latitudes"] = tuple(first.latitude.tolist())
        if keys.get("value_range", "auto") == "auto":
            found["value_range"] = _spanned(alike)
        return keys | found

    def samples(self, content: Any) -> Samples:
        """A map -> its cells in the order of the curve, those that are missing left out."""
        given = _checked(content)
        height, width, channels = given.values.shape
        if channels != self.channels:
            raise ValueError(_channels_differ(channels, self.channels))
        if self.units and given.units and self.units != given.units:
            raise ValueError(f"the map's unit is {_listed(given.units)}, that of this run is {_listed(self.units)}")
        scaled = self._scaled(given.values).reshape(-1, channels)
        grid = _grid(given.latitude.tobytes(), given.longitude.tobytes())
        there = ~np.isnan(scaled[grid.order]).any(axis=1)
        cells = grid.order[there]
        count = height * width
        if self.holdout is None:
            return _samples_of(cells, count, scaled, grid)
        kept = np.arange(len(cells)) % self.holdout != self.holdout - 1
        if kept.all():
            raise ValueError(f"the map has {len(cells)} cells, too few for signal.holdout={self.holdout}")
        heldout = _samples_of(cells[~kept], count // self.holdout, scaled, grid)
        return replace(_samples_of(cells[kept], count - count // self.holdout, scaled, grid), heldout=heldout)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """Values [H, W, C] as fields represent them: float32."""
        low, high = np.array(self.ranges).T
        with np.errstate(invalid="ignore"):  # some NaNs complain when they are cast
            scaled = (values.astype(np.float64) - low) / (high - low)
        farthest = np.unravel_index(np.nanargmax(np.abs(scaled - 0.5)), scaled.shape)
        if abs(scaled[farthest] - 0.5) > _LARGEST_EXCESS:
            (low, high), value = self.ranges[farthest[2]], values[farthest]
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
        """Height and width, the first and the last row and column in degrees, and the share of the cells missing."""
        given = _checked(content)
        height, width, _ = given.values.shape
        return {
            "height": float(height),
            "width": float(width),
            "latitude_first": float(given.latitude[0]),
            "latitude_last": float(given.latitude[-1]),
            "longitude_first": float(given.longitude[0]),
            "longitude_last": float(given.longitude[-1]),
            "missing_fraction": float(np.isnan(given.values).any(axis=2).mean()),
        }

    def shape_of(self, measures: dict[str, float]) -> tuple[Any, ...]:
        """(height, width) of an equirectangular map, else with the first and last latitude and longitude behind."""
        names = ("latitude_first", "latitude_last", "longitude_first", "longitude_last")
        height, width = int(measures["height"]), int(measures["width"])
        ends = tuple(round(measures[name], 4) for name in names)  # the table has float32
        is_whole = np.allclose(ends, _ends_of_globe(height, width), atol=_UNEVEN_DEGREES / 2)
        return (height, width) if is_whole else (height, width, *ends)

    def shape_from(self, text: str, fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        """`90x180`: rows x columns of cells over the globe, or over the part of it that the map covers."""
        parts = text.lower().split("x")
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

    def coordinates(self, shape: tuple[Any, ...]) -> Tensor:
        return torch.from_numpy(_unit_vectors(*self._rows_and_columns(shape)))

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[SphereMap]:
        """[F, H * W, C] in row order -> maps in the data's own unit, not clamped. Fields know of no gaps."""
        latitude, longitude = self._rows_and_columns(shape)
        low, high = np.array(self.ranges).T
        scaled = values.detach().cpu().numpy().astype(np.float64) + _SHIFT
        maps = (scaled * (high - low) + low).astype(np.float32).reshape(-1, shape[0], shape[1], self.channels)
        return [SphereMap(one, latitude, longitude, self.names, self.units, self.ranges) for one in maps]

    def original(self, content: Any) -> SphereMap:
        return replace(_checked(content), names=self.names, units=self.units, ranges=self.ranges)

    def forward_description(self) -> dict[str, Any]:
        low, high = np.array(self.ranges).T
        scale = high - low
        return {
            "kind": "sphere",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(x, y, z) = (cos(lat) cos(lon), cos(lat) sin(lon), sin(lat)) of the cell centres",
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
    if values.ndim != 3 or 0 in values.shape or values.dtype.kind != "f":
        raise ValueError(f"a map is floats [rows, columns, channels], got {values.dtype} {list(values.shape)}")
    if (latitude.shape, longitude.shape) != (values.shape[:1], values.shape[1:2]):
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
    if np.isnan(values).any(axis=2).all():
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
    low = np.stack([np.nanmin(one.values, axis=(0, 1)) for one in maps]).min(axis=0)
    high = np.stack([np.nanmax(one.values, axis=(0, 1)) for one in maps]).max(axis=0)
    ranges = tuple(zip(low.tolist(), high.tolist(), strict=True))
    if not all(map(_is_range, ranges)):
        raise ValueError(f"the map is constant, so signal.value_range is to be given; its values are {low.tolist()}")
    return ranges


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
    """float32 [N, 3], on the unit sphere."""
    areas: np.ndarray
    """float64 [N]; the unit cancels."""
    order: np.ndarray
    """int64 [N]: the cells along the curve."""


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
