"""Volumes: points in millimetres to values in the data's own unit, mean squared error, PSNR.

A millimetre is `2 / span` in coordinates along every axis and for every datum, so that a structure has one frequency in
the weights of all fields, whatever the spacing of the slices. Samples are in Z-order, so that a run of 8^k neighbours
is a block of cells: a stratified draw takes one out of each. A volume of more than `MAX_CELLS` that is mapped from a
file stays there: steps read the cells that they draw, and quality is measured on some, see `nfscale.signals.mapped`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nfscale.signals.base import (
    Samples,
    mean_squared_error,
    number_in,
    psnr_db,
    require_decodable,
)
from nfscale.signals.grids import cell_centres, z_order
from nfscale.signals.mapped import MAX_MAPPED, MappedCells, checked_count, drawn_samples, mapping_of
from nfscale.signals.tiles import Gridded, psnr_of_arrays

MAX_CELLS = 16 << 20
"""Values that are held as samples: of more, coordinates and values would take gigabytes with the memory around them."""

_SHIFT = 0.5  # fields represent (value - lowest) / (highest - lowest) - 0.5
_LARGEST_EXCESS = 8.0  # times the range that values lie from its middle at most
_LONGER = 1 + 1e-5  # times the span: what float32 affines leave
_ENTRIES = tuple(f"affine_{row}{column}" for row in range(3) for column in range(4))


@dataclass(frozen=True, eq=False)
class Voxels:
    """Values on a grid of cells, and where the cells are."""

    values: np.ndarray
    """[Z, Y, X] or [Z, Y, X, C], in the data's own unit."""
    affine: np.ndarray | None = None
    """float64 [4, 4]: from the cell (x, y, z, 1) to millimetres; None where nothing states it."""
    value_range: tuple[float, float] | None = None
    """Lowest and highest value that there can be, where that is known."""
    stored: tuple[float, float] = (1.0, 0.0)
    """What the numbers of `values` are multiplied by, and what is added then, to be values."""

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres from cell to cell along z, y and x: float64 [3]."""
        assert self.affine is not None
        return np.linalg.norm(self.affine[:3, :3], axis=0)[::-1]


@dataclass(frozen=True)
class Volume(Gridded):
    """Volumes of `channels` channels, any size and spacing up to `span`.

    Coordinates are (z, y, x) of the cell centres in millimetres from the middle of the volume, over half of `span`.
    """

    channels: int
    span: float | Literal["auto"] = "auto"
    """Millimetres that the coordinates from -1 to 1 cover along each axis. auto: the longest side of the first."""
    value_range: tuple[float, float] | Literal["auto"] = "auto"
    """[lowest, highest]: what values are scaled by and PSNR relates to. auto: all that integers of 8 or 16 bits in npy
    and pictures can be; else what the first volumes span."""
    spacing: list[float] | None = None
    """[z, y, x] in millimetres of volumes that state none (npy, slices); without it, 1 each."""
    holdout: int | None = None
    """k >= 2: the last of every k slices is held back, and measured as `quality_heldout`."""

    dimensions = 3
    grid_axes = ("depth", "height", "width")
    quality_name = "psnr_db"
    squared_error = True

    def __post_init__(self) -> None:
        if isinstance(self.value_range, list):  # JSON has lists for tuples
            object.__setattr__(self, "value_range", tuple(self.value_range))
        if self.value_range != "auto" and not _is_range(self.value_range):
            raise ValueError(f"signal.value_range is [lowest, highest], got {self.value_range}")
        if self.span != "auto" and not 0 < self.span < np.inf:
            raise ValueError(f"signal.span is above 0, got {self.span}")
        if self.spacing is not None and (len(self.spacing) != 3 or not all(0 < one < np.inf for one in self.spacing)):
            raise ValueError(f"signal.spacing is [z, y, x] in millimetres, got {self.spacing}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout=k holds back one slice of k and is at least 2, got {self.holdout}")

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest value; [0, 1] where nothing has settled it."""
        return (0.0, 1.0) if self.value_range == "auto" else self.value_range

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """What is left open, as the first volumes have it."""
        volumes = [_read(_described(content, keys.get("spacing"))) for content in contents]
        found: dict[str, Any] = {}
        if keys["channels"] == "auto":
            found["channels"] = volumes[0].values.shape[3]
        if keys.get("span", "auto") == "auto":
            described = [_described(content, keys.get("spacing")) for content in contents]
            found["span"] = max(float(_sides(volume).max()) for volume in described)
        if keys.get("value_range", "auto") == "auto":
            known = volumes[0].value_range
            low = min(float(volume.values.min()) for volume in volumes)
            high = max(float(volume.values.max()) for volume in volumes)
            found["value_range"] = known or (low, high)
            if not _is_range(found["value_range"]):
                raise ValueError(f"the volumes are constantly {low:.6g}, so signal.value_range is to be given")
        return keys | found

    def samples(self, content: Any) -> Samples:
        """A volume, or its array [Z, Y, X] or [Z, Y, X, C] -> samples in Z-order."""
        volume = _described(content, self.spacing)
        *sizes, channels = volume.values.shape
        if channels != self.channels:
            raise ValueError(f"the volume has {channels} channels, the fields of this run have {self.channels}")
        longest = float(_sides(volume).max())
        if self.span != "auto" and longest > self.span * _LONGER:
            raise ValueError(
                f"the volume is {longest:.6g} mm long, the coordinates of this run span {self.span:.6g}; use a larger "
                "signal.span (and field.omega_0 with it)"
            )
        if _stays(volume):
            return self._drawn(volume)
        volume, order = _checked(content, self.spacing), z_order(*sizes)
        scaled = self._scaled(volume.values.reshape(-1, channels)[order])
        self._refuse_far(scaled)
        values = torch.from_numpy(scaled)
        centres = self._centres(tuple(sizes), volume.spacing)[torch.from_numpy(order)]
        if self.holdout is None:
            return Samples(centres, values)
        held = torch.from_numpy(self._held(sizes[0])[order // (sizes[1] * sizes[2])])
        return Samples(centres[~held], values[~held], heldout=Samples(centres[held], values[held]))

    def _held(self, slices: int) -> np.ndarray:
        """Which slices are held back: bool [Z]."""
        assert self.holdout is not None
        if slices < self.holdout:
            raise ValueError(f"of {slices} slices, signal.holdout={self.holdout} holds none back")
        return np.arange(slices) % self.holdout == self.holdout - 1

    def _drawn(self, volume: Voxels) -> Samples:
        """Samples of a volume that stays in its file."""
        sizes = volume.values.shape[:3]

        def converted(values: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                return self._scaled(_as_floats(values, volume.stored))

        cells = MappedCells(
            volume.values,
            [np.ones(size, bool) for size in sizes],
            self._scales(sizes, volume.spacing).tolist(),
            converted,
        )
        samples = drawn_samples(cells, None if self.holdout is None else self._held(sizes[0]))
        for part in (samples.check, samples.heldout):
            if part is not None:
                _refuse_infinite(part.values.numpy())
                self._refuse_far(part.values.numpy())
        return samples

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """Values as fields represent them: float32."""
        low, high = self.limits
        return (values - np.float32(low)) / np.float32(high - low) - np.float32(_SHIFT)

    def _refuse_far(self, scaled: np.ndarray) -> None:
        low, high = self.limits
        farthest = scaled.flat[np.abs(scaled).argmax()]
        if abs(farthest) > _LARGEST_EXCESS:
            raise ValueError(
                f"the volume holds {(farthest + _SHIFT) * (high - low) + low:.6g}, far from the range {low:.6g} to "
                f"{high:.6g} of this run; signal.value_range=[lowest, highest] sets it"
            )

    def _scales(self, sizes: Sequence[int], spacing: np.ndarray) -> np.ndarray:
        """What coordinates of cells from -1 to 1 are multiplied by along each axis: float32 [3]."""
        sides = np.array(sizes) * spacing
        return (sides / (sides.max() if self.span == "auto" else self.span)).astype(np.float32)

    def _centres(self, sizes: Sequence[int], spacing: np.ndarray) -> Tensor:
        """float32 [N, 3] in row order."""
        return (cell_centres(*sizes) * torch.from_numpy(self._scales(sizes, spacing))).clamp(-1, 1)

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        return psnr_db(predicted, samples)

    def measures(self, content: Any) -> dict[str, float]:
        """Depth, height and width in cells, and the first three rows of the affine.

        Of a volume that stays in its file, `checked_cells`: how many cells its quality is measured on.
        """
        volume = _described(content, self.spacing)
        assert volume.affine is not None
        sizes = dict(zip(("depth", "height", "width"), map(float, volume.values.shape[:3]), strict=True))
        checked: dict[str, float] = {}
        if _stays(volume):
            checked["checked_cells"] = float(checked_count(volume.values[..., 0].size))
        return checked | sizes | dict(zip(_ENTRIES, map(float, volume.affine[:3].ravel()), strict=True))

    def shape_of(self, measures: dict[str, float]) -> tuple[Any, ...]:
        """(depth, height, width) and the twelve entries of the affine, rounded as the table rounds them."""
        sizes = (int(measures[name]) for name in ("depth", "height", "width"))
        return *sizes, *(float(np.float32(measures[name])) for name in _ENTRIES)

    def shape_from(self, text: str, fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        """`64x128x128`: depth x height x width in cells; `2mm`: cells of that size. Both fill the box of the fit."""
        parts = text.lower().split("x")
        if len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts):
            sizes = tuple(map(int, parts))
        elif len(parts) == 1 and parts[0].endswith("mm") and 0 < (cell := number_in(parts[0][:-2])) < np.inf:
            sides = np.array(fitted[:3]) * Voxels(np.empty(0), _affine_of(fitted)).spacing
            sizes = tuple(int(one) for one in np.maximum(1, np.rint(np.minimum(sides / cell, 1e6))))
        else:
            raise ValueError(
                f"cannot read {text!r}; write depth x height x width, such as 64x128x128, or the size of cells, such "
                "as 2mm"
            )
        depth, height, width = sizes
        require_decodable(depth * height * width)
        affine = cut(_affine_of(fitted), (0, 0, 0), np.array(fitted[:3]) / np.array(sizes))
        return *sizes, *(float(np.float32(one)) for one in affine[:3].ravel())

    def coordinates(self, shape: tuple[Any, ...]) -> Tensor:
        """Of (depth, height, width) alone: cells of 1 mm, or of `spacing`."""
        require_decodable(math.prod(shape[:3]))
        return self._centres(shape[:3], Voxels(np.empty(0), self._affine(shape)).spacing)

    def grid_of(self, content: Any) -> tuple[int, ...]:
        values = content.values if isinstance(content, Voxels) else np.asarray(content)
        if values.ndim not in (3, 4) or 0 in values.shape:
            raise ValueError(f"a volume is [z, y, x] or [z, y, x, channels], got shape {list(values.shape)}")
        return values.shape[:3]

    def cut(self, content: Any, box: tuple[slice, ...]) -> Voxels:
        """With the affine that says where the block is."""
        given = content if isinstance(content, Voxels) else Voxels(np.asarray(content))
        affine = plain_affine(self.spacing) if given.affine is None else np.asarray(given.affine, np.float64)
        first = [one.start for one in box]
        return Voxels(np.array(given.values[box]), cut(affine, first), _known_range(given), given.stored)

    def whole_shape(self, metrics: dict[str, float]) -> tuple[Any, ...]:
        shape = super().whole_shape(metrics)
        back = [-metrics[f"start_{name}"] for name in self.grid_axes]
        affine = cut(_affine_of(shape), back)
        return *shape[:3], *(float(np.float32(one)) for one in affine[:3].ravel())

    def block_coordinates(self, places: Sequence[Tensor], block: tuple[Any, ...]) -> Tensor:
        sides = np.array(block[:3]) * Voxels(np.empty(0), self._affine(block)).spacing
        span = sides.max() if self.span == "auto" else self.span
        return super().block_coordinates(places, block) * torch.tensor(sides / span, dtype=torch.float32)

    def whole_quality(self, original: Voxels, rebuilt: Voxels) -> float:
        low, high = self.limits
        return psnr_of_arrays(original.values, rebuilt.values, high - low)

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[Voxels]:
        """[F, Z * Y * X, C] in row order -> volumes in the data's own unit, not clamped."""
        low, high = self.limits
        scaled = (values.detach().cpu().numpy() + np.float32(_SHIFT)) * np.float32(high - low) + np.float32(low)
        affine = self._affine(shape)
        return [Voxels(one, affine, self.limits) for one in scaled.reshape(-1, *shape[:3], self.channels)]

    def _affine(self, shape: tuple[Any, ...]) -> np.ndarray:
        return _affine_of(shape) if len(shape) > 3 else plain_affine(self.spacing)

    def original(self, content: Any) -> Voxels:
        """The volume as its field represents it: float32 [Z, Y, X, C]."""
        volume = _checked(content, self.spacing)
        return Voxels(volume.values, volume.affine, self.limits)

    def forward_description(self) -> dict[str, Any]:
        low, high = self.limits
        return {
            "kind": "volume",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": (
                "(z, y, x) of cell centres in millimetres from the middle of the volume, times 2 / span; cell i of n, "
                "s mm apart, is (i - (n - 1) / 2) s mm from the middle; metrics has n and the affine, whose columns "
                "have the lengths s of x, y, z"
            ),
            "coordinate_range": [-1.0, 1.0],
            "output": {
                "scale": high - low,
                "shift": low + _SHIFT * (high - low),
                "meaning": "value = scale * y + shift, in the data's own unit",
            },
            "quality": "psnr_db is 10 log10(1 / mean of ((value - rebuilt) / scale)^2)",
        }


def plain_affine(spacing: Sequence[float] | None) -> np.ndarray:
    """Of volumes that state none: the first cell at the origin, cells [z, y, x] millimetres apart, or 1."""
    return np.diag([*(spacing or (1.0, 1.0, 1.0))[::-1], 1.0])


def cut(affine: np.ndarray, first: Sequence[float], scale: Any = (1, 1, 1)) -> np.ndarray:
    """The affine of a part of a volume, or of other cells that fill the same box.

    Args:
        first: the cell (z, y, x) at which the part begins.
        scale: how many cells one new cell is long, along z, y and x.
    """
    scales = np.asarray(scale, np.float64)[::-1]
    change = np.diag([*scales, 1.0])
    change[:3, 3] = np.asarray(first, np.float64)[::-1] + (scales - 1) / 2
    return affine @ change


def _affine_of(shape: tuple[Any, ...]) -> np.ndarray:
    return np.vstack([np.array(shape[3:], np.float64).reshape(3, 4), [0, 0, 0, 1]])


def _sides(volume: Voxels) -> np.ndarray:
    """Millimetres along z, y and x."""
    return np.array(volume.values.shape[:3]) * volume.spacing


def _described(content: Any, spacing: Sequence[float] | None) -> Voxels:
    """A volume with numbers [Z, Y, X, C], as they came, and an affine.

    Raises:
        ValueError: if it is none.
    """
    given = content if isinstance(content, Voxels) else Voxels(np.asarray(content))
    values = given.values
    if values.ndim not in (3, 4) or 0 in values.shape:
        raise ValueError(f"a volume is [z, y, x] or [z, y, x, channels], got shape {list(values.shape)}")
    most = MAX_CELLS if mapping_of(values) is None else MAX_MAPPED
    if values.size > most:
        raise ValueError(
            f"too large: {values.size:,} values, at most {most:,} are one field's; of .npy and .nii files that lie on "
            f"a disk, {MAX_MAPPED:,}"
        )
    if values.dtype.kind not in "biuf":
        raise ValueError(f"volumes are integers or floats, got {values.dtype}")
    known = _known_range(given)
    affine = plain_affine(spacing) if given.affine is None else np.asarray(given.affine, np.float64)
    found = Voxels(values if values.ndim == 4 else values[..., None], affine, known, given.stored)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError("the volume's affine is no matrix of 4 x 4 finite numbers")
    if not (found.spacing.min() > 1e-9 and found.spacing.max() < 1e9):
        raise ValueError(f"the volume's cells are {', '.join(f'{one:.4g}' for one in found.spacing)} mm apart")
    return found


def _stays(described: Voxels) -> bool:
    """Whether the volume stays in the file that it is mapped from, and its cells are read as they are drawn."""
    return described.values.size > MAX_CELLS


def _checked(content: Any, spacing: Sequence[float] | None) -> Voxels:
    """A volume with float32 [Z, Y, X, C], finite, and an affine.

    Raises:
        ValueError: if it is none, or one that stays in its file.
    """
    described = _described(content, spacing)
    if _stays(described):
        raise ValueError(f"too large to be held: {described.values.size:,} values; decode some of it with --shape")
    return _read(described)


def _read(described: Voxels) -> Voxels:
    """The volume with values in float32; of one that stays in its file, some of its cells in a row.

    Raises:
        ValueError: if they are not finite.
    """
    values = described.values
    if _stays(described):
        everything = [np.ones(size, bool) for size in values.shape[:3]]
        cells = MappedCells(values, everything, (1.0, 1.0, 1.0), lambda found: _as_floats(found, described.stored))
        floats = cells.some().values.numpy()[None, None]
    else:
        floats = _as_floats(values, described.stored)
    _refuse_infinite(floats)
    return Voxels(floats, described.affine, described.value_range)


def _as_floats(values: np.ndarray, stored: tuple[float, float]) -> np.ndarray:
    with np.errstate(all="ignore"):
        floats = values.astype(np.float32)
        return floats if stored == (1.0, 0.0) else floats * np.float32(stored[0]) + np.float32(stored[1])


def _refuse_infinite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError("the volume holds NaN or infinite values, or some that float32 does not hold")


def _known_range(volume: Voxels) -> tuple[float, float] | None:
    """What values there can be: all that integers of 8 or 16 bits in npy and pictures can."""
    kind = volume.values.dtype
    if volume.value_range is None and volume.affine is None and kind in (np.bool_, np.uint8, np.uint16):
        return 0.0, 1.0 if kind == np.bool_ else float(np.iinfo(kind).max)
    return volume.value_range


def _is_range(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and bool(np.isfinite(pair).all()) and pair[0] < pair[1]
