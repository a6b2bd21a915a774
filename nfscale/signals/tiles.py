"""Data larger than one field should hold, cut into blocks that overlap, and how their fields become one datum again.

Blocks of a datum have one shape: along each axis they begin at whole cells, spread evenly, so that neighbours share the
overlap that is asked for or a little more. Decoded, every point of the datum is the weighted mean of what the blocks
around it say: along an axis one block fades into the next over their overlap, as (1 - cos) / 2 does, and the weights
sum to one. No block is asked for what lies beyond its own box.

Places are measured in cells from the datum's first edge: at whatever resolution, cell i reaches from i to i + 1.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfscale.signals.base import PSNR_CEILING_DB, Pointwise

MAX_BLOCKS = 1 << 16
"""Of one datum: with more, the tile is a slip of the pen, or the datum's header lies."""

_USUAL_OVERLAP = 16
"""What part of a tile is shared with the next. Measured on a photograph and a head, `pipelines/benchmarks/RESULTS.md`:
no seam is seen any more, and blocks of three axes are a fifth more cells than the datum has."""

_SQUARED = 1 << 22  # values whose errors are held at a time
_SIZES = "256, 64x64, [64, 64] or {size: 256, overlap: 16}"


@dataclass(frozen=True)
class Tile:
    """How data are cut: along each axis, in cells, of sounds in seconds."""

    size: tuple[int | float, ...]
    overlap: tuple[int | float, ...]
    """What neighbours share at least."""

    @classmethod
    def parsed(cls, given: Any, axes: Sequence[str], whole_cells: bool) -> "Tile | None":
        """A job's `signal.tile`: a number for all axes, one for each, `64x64`, or those as size beside an overlap.

        Args:
            axes: the names of the signal's axes.
            whole_cells: sizes are counts.

        Raises:
            ValueError: saying what is accepted.
        """
        if given is None or isinstance(given, Tile):
            return given
        keys = given if isinstance(given, dict) else {"size": given}
        if unknown := keys.keys() - {"size", "overlap"}:
            raise ValueError(f"unknown key {sorted(map(str, unknown))[0]}; accepted: size, overlap")
        size = _numbers(keys.get("size"), axes, whole_cells, "size")
        if min(size) <= 0:
            raise ValueError(f"a tile's size is above 0, got {keys['size']}")
        if keys.get("overlap") is None:
            usual = (max(1, one // _USUAL_OVERLAP) if one > 1 else 0 for one in size)
            overlap = tuple(usual) if whole_cells else tuple(one / _USUAL_OVERLAP for one in size)
        else:
            overlap = _numbers(keys["overlap"], axes, whole_cells, "overlap")
        if not all(0 <= shared <= one / 2 for shared, one in zip(overlap, size, strict=True)):
            raise ValueError(f"a tile's overlap is at least 0 and at most half its size, got {keys['overlap']}")
        return cls(size, overlap)

    def cuts(self, cells: Sequence[int], per_unit: float = 1.0) -> tuple["Cut", ...]:
        """Each axis of a datum of so many cells; `per_unit` of them are what sizes are given in."""
        return tuple(
            Cut.of(count, max(1, round(size * per_unit)), round(overlap * per_unit))
            for count, size, overlap in zip(cells, self.size, self.overlap, strict=True)
        )


def _numbers(given: Any, axes: Sequence[str], whole_cells: bool, what: str) -> tuple[float, ...]:
    parts = given.lower().split("x") if isinstance(given, str) else given
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    try:
        numbers = [float(part) for part in parts if not isinstance(part, bool)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(parts) or len(numbers) not in (1, len(axes)) or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"cannot read the {what} {given!r}; write a number for all axes or one for each ({', '.join(axes)}), such "
            f"as {_SIZES}"
        )
    if whole_cells and any(number != int(number) for number in numbers):
        raise ValueError(f"the {what} is a whole number of cells, got {given!r}")
    each = numbers if len(numbers) == len(axes) else numbers * len(axes)
    return tuple(int(number) for number in each) if whole_cells else tuple(each)


@dataclass(frozen=True)
class Cut:
    """One axis of a datum, cut: block k reaches from `starts[k]` to `starts[k] + size`."""

    cells: int
    size: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, cells: int, size: int, overlap: int) -> "Cut":
        """As few blocks as share `overlap` cells or more with their neighbours, spread evenly; a short axis is one."""
        if cells <= size:
            return cls(cells, cells, (0,))
        last = -(-(cells - size) // max(1, size - overlap))
        return cls(cells, size, tuple(place * (cells - size) // last for place in range(last + 1)))

    def fades(self) -> list[tuple[float, float]]:
        """Where each block becomes the next: middle and width, in cells. No two of them meet."""
        middles = [(after + before + self.size) / 2 for before, after in itertools.pairwise(self.starts)]
        widths = [float(before + self.size - after) for before, after in itertools.pairwise(self.starts)]
        nearest = min((after - before for before, after in itertools.pairwise(middles)), default=math.inf)
        return [(middle, min(width, nearest)) for middle, width in zip(middles, widths, strict=True)]

    def weights(self, block: int, places: Tensor) -> Tensor:
        """What a block counts at these places: float64 [n] in [0, 1]. All blocks' weights at a place sum to 1."""
        fades = self.fades()
        weight = torch.ones_like(places)
        if block > 0:
            weight = weight * _risen(places, *fades[block - 1])
        if block < len(fades):
            weight = weight * (1 - _risen(places, *fades[block]))
        return weight

    def within(self, block: int, places: Tensor) -> slice:
        """Which of these ascending places lie in a block; those before the first and after the last one count too."""
        start = self.starts[block]
        first = 0 if block == 0 else int(torch.searchsorted(places, float(start)))
        end = float(start + self.size)
        stop = len(places) if block == len(self.starts) - 1 else int(torch.searchsorted(places, end))
        return slice(first, stop)


def _risen(places: Tensor, middle: float, width: float) -> Tensor:
    """From 0 to 1 within `width` around the middle."""
    if width == 0:
        return (places >= middle).to(places.dtype)
    share = ((places - middle) / width + 0.5).clamp(0, 1)
    return (1 - torch.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Points:
    """Where an axis is decoded: point j of `count` lies at `first + j * step`, in cells."""

    count: int
    first: float
    step: float

    def places(self) -> Tensor:
        """float64 [count], ascending."""
        return self.first + torch.arange(self.count, dtype=torch.float64) * self.step


class Gridded(Pointwise):
    """The base of signals whose data are grids of cells, and can be cut. Coordinates are as of pixels by default."""

    grid_axes: tuple[str, ...]
    """Names of the axes in the order of the coordinates; `measures` has the sizes under them."""
    whole_cells = True
    """Tiles are measured in cells."""

    def refuse_tile(self, tile: Tile) -> None:
        """Check that data of this signal can be cut so.

        Raises:
            ValueError: if an option of it changes what cells are, or the tile is too large for it.
        """

    def grid_of(self, content: Any) -> tuple[int, ...]:
        """How many cells a datum has along each axis.

        Raises:
            ValueError: if it is no datum of this signal.
        """
        raise NotImplementedError

    def cells_per_unit(self, content: Any) -> float:
        """Cells per what tiles are measured in."""
        return 1.0

    def cut(self, content: Any, box: tuple[slice, ...]) -> Any:
        """The cells within a box as a datum of its own, in memory of its own."""
        raise NotImplementedError

    def whole_shape(self, metrics: dict[str, float]) -> tuple[Any, ...]:
        """The shape of the datum that a block with these metrics was cut from."""
        return self.shape_of(metrics | {name: metrics[f"whole_{name}"] for name in self.grid_axes})  # type: ignore

    def points(self, shape: tuple[Any, ...], fitted: tuple[Any, ...]) -> tuple[Points, ...]:
        """Where `coordinates(shape)` has its points in cells of the fitted datum, along each axis."""
        pairs = zip(shape, fitted[: len(self.grid_axes)], strict=False)
        return tuple(Points(count, 0.5 * cells / count, cells / count) for count, cells in pairs)

    def block_coordinates(self, places: Sequence[Tensor], block: tuple[Any, ...]) -> Tensor:
        """Where a block's field has these places: of each axis float64 [n], from the block's edge -> float32 [N, D].

        Args:
            block: the shape of the block, as it was fitted.
        """
        axes = [2 * place / cells - 1 for place, cells in zip(places, block, strict=False)]
        grid = torch.cartesian_prod(*axes)
        return grid.reshape(-1, len(axes)).to(torch.float32).clamp(-1, 1)

    def tile_description(self, tile: Tile) -> dict[str, Any]:
        """For readers without nfscale: where blocks lie and how they are put together."""
        return asdict(tile) | {
            "axes": list(self.grid_axes),
            "unit": "cells" if self.whole_cells else "seconds",
            "ids": "DATUM@i,j,...: the block's place along each axis",
            "place": (
                "metrics start_AXIS: its first cell in the whole datum, whole_AXIS: the cells of that; the block's own "
                "are under AXIS"
            ),
            "blend": (
                "the coordinates are the block's own; along an axis its weight is 1 but for rising and falling as "
                "(1 - cos(pi s)) / 2 around the middle of what it shares with the block before and after, over all of "
                "that or, if less, the least distance of two such middles; the weights of axes are multiplied"
            ),
        }

    def whole_quality(self, original: Any, rebuilt: Any) -> float:
        """Of a datum put together again, in the unit of `quality`; of values as they are decoded."""
        return psnr_of_arrays(original, rebuilt)


def psnr_of_arrays(original: np.ndarray, rebuilt: np.ndarray, peak: float = 1.0) -> float:
    """PSNR in decibels, at most `PSNR_CEILING_DB`. Higher is better."""
    return ratio_db(peak**2, mean_square_error(original, rebuilt))


def mean_square_error(original: np.ndarray, rebuilt: np.ndarray) -> float:
    """Over all values of two arrays of one shape, some at a time: data that are cut are large."""
    first, second = original.reshape(-1), rebuilt.reshape(-1)
    starts = range(0, len(first), _SQUARED)
    some = (slice(start, start + _SQUARED) for start in starts)
    return sum(float(np.square(first[part].astype(np.float64) - second[part]).sum()) for part in some) / len(first)


def ratio_db(power: float, error: float) -> float:
    """10 log10(power / error), at most `PSNR_CEILING_DB`."""
    return min(PSNR_CEILING_DB, 10 * math.log10(power / error)) if error > 0 else PSNR_CEILING_DB


# --- the blocks of a datum


def block_id(datum_id: str, block: Sequence[int]) -> str:
    """The id of a datum's block: `ID@2,1`."""
    return f"{datum_id}@{','.join(map(str, block))}"


def whole_id(block_id: str) -> str:
    """The id of the datum that a block was cut from."""
    return block_id.rpartition("@")[0]


def by_whole(block_ids: Iterable[str]) -> dict[str, list[int]]:
    """Positions of blocks by the id of their datum."""
    found: dict[str, list[int]] = {}
    for position, block_id in enumerate(block_ids):
        found.setdefault(whole_id(block_id), []).append(position)
    return found


def block_positions(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Positions of blocks by axis, the last axis fastest."""
    return itertools.product(*map(range, counts))


def box_of(cuts: Sequence[Cut], block: Sequence[int]) -> tuple[slice, ...]:
    """The cells of a block."""
    starts = [cut.starts[place] for cut, place in zip(cuts, block, strict=True)]
    return tuple(slice(start, start + cut.size) for start, cut in zip(starts, cuts, strict=True))


def place_metrics(axes: Sequence[str], cuts: Sequence[Cut], block: Sequence[int]) -> dict[str, float]:
    """What the table says of a block's place: where it begins and how many cells the whole datum has, by axis."""
    starts = {f"start_{name}": float(box.start) for name, box in zip(axes, box_of(cuts, block), strict=True)}
    return starts | {f"whole_{name}": float(cut.cells) for name, cut in zip(axes, cuts, strict=True)}


@dataclass(frozen=True)
class Part:
    """What one block adds to a datum that is decoded."""

    block: tuple[int, ...]
    box: tuple[slice, ...]
    """Which points."""
    places: tuple[Tensor, ...]
    """Their places along each axis, in cells from the block's edge."""
    weights: tuple[Tensor, ...]
    """What the block counts there, along each axis."""

    @property
    def key(self) -> bytes:
        """Equal for parts whose fields are asked at the same coordinates."""
        return b"|".join(axis.numpy().tobytes() for axis in self.places)


def parts(cuts: Sequence[Cut], points: Sequence[Points]) -> Iterator[Part]:
    """What each block adds; blocks in which no point lies are left out."""
    places = [axis.places() for axis in points]
    for block in block_positions([len(cut.starts) for cut in cuts]):
        box = tuple(cut.within(one, axis) for cut, one, axis in zip(cuts, block, places, strict=True))
        inside = [axis[part] for axis, part in zip(places, box, strict=True)]
        if not all(map(len, inside)):
            continue
        zipped = list(zip(cuts, block, inside, strict=True))
        yield Part(
            block,
            box,
            tuple(axis - cut.starts[one] for cut, one, axis in zipped),
            tuple(cut.weights(one, axis) for cut, one, axis in zipped),
        )


def blended(
    cuts: Sequence[Cut],
    points: Sequence[Points],
    channels: int,
    evaluate: Callable[[list[Part]], Iterator[Tensor]],
    together: int = 1,
) -> Tensor:
    """A datum put together from its blocks: float32 [N, C] at all points in row order.

    Args:
        evaluate: what the fields of some blocks, all asked at the same coordinates, say there: [n, C] each.
        together: how many blocks are evaluated at once at most.
    """
    whole = torch.zeros(*(axis.count for axis in points), channels)
    waiting: dict[bytes, list[Part]] = {}

    def add(group: list[Part]) -> None:
        for part, values in zip(group, evaluate(group), strict=True):
            weight = torch.ones(())
            for axis in part.weights:
                weight = weight[..., None] * axis.to(torch.float32)
            whole[part.box] += values.reshape(*weight.shape, channels) * weight[..., None]

    for part in parts(cuts, points):
        group = waiting.setdefault(part.key, [])
        group.append(part)
        if len(group) == together:
            add(waiting.pop(part.key))
    for group in waiting.values():
        add(group)
    return whole.reshape(-1, channels)
