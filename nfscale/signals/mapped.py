"""Grids of cells that are too large to be held as samples: they stay in the file that is mapped, and cells are read.

A datum's samples are then a `Source`; its quality is measured on `CHECKED` cells, one at a random place of each run of
neighbours: the same places in all grids of one shape, so that qualities compare.

Danger: a file that shrinks while it is mapped ends the process.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nfscale.rng import Stream, as_tensor, words
from nfscale.signals.base import Samples
from nfscale.signals.grids import axis_centres, z_ordered

MAX_MAPPED = 1 << 30
"""Cells of one field: the order within the runs of a draw takes memory that grows with them."""

CHECKED = 1 << 16
"""Cells that quality is measured on. The mean of squared errors that are exponentially distributed has a standard
error of 1/256 of itself there, 0.02 dB of PSNR; a check costs no more than that of an image of 256 x 256."""


_READ_CELLS = 256
"""Before the pages that they lie on are let go of: with each cell the system maps up to 64 kB around it, which count as
this process's memory until, in the end, all of the file does."""


def checked_count(cells: int) -> int:
    """How many of so many cells quality is measured on."""
    return min(CHECKED, cells)


def mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """The file that an array, or the array that it is a view of, is mapped from."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


@dataclass(frozen=True, eq=False)
class MappedCells:
    """Those cells of a grid that `kept` tells, in Z-order: a `Source`."""

    values: np.ndarray
    """[n1, n2, ..., C], mapped."""
    kept: Sequence[np.ndarray]
    """bool [n1], [n2], ...: a cell is kept if it is along each axis."""
    scale: Sequence[float]
    """What the coordinates of the cells' centres, from -1 to 1 along each axis, are multiplied by."""
    converted: Callable[[np.ndarray], np.ndarray]
    """Values [n, C] as the file has them -> as a field represents them: float32 [n, C]. Raises for no value."""

    def __len__(self) -> int:
        return math.prod(int(np.count_nonzero(axis)) for axis in self.kept)

    def draw(self, positions: Tensor) -> Samples:
        cells = z_ordered(positions.numpy(), self.kept)
        axes = zip(cells, self.values.shape, self.scale, strict=False)
        centres = [axis_centres(size)[torch.from_numpy(cell)] * float(scale) for cell, size, scale in axes]
        values = np.empty((len(positions), self.values.shape[-1]), self.values.dtype)
        for first in range(0, len(positions), _READ_CELLS):
            part = slice(first, first + _READ_CELLS)
            values[part] = self.values[tuple(cell[part] for cell in cells)]
            _advise(self.values, "MADV_DONTNEED")
        return Samples(torch.stack(centres, dim=1).clamp(-1, 1), torch.from_numpy(self.converted(values)))

    def some(self) -> Samples:
        """Samples that are spread over all of them and always the same."""
        return self.draw(_spread(len(self), checked_count(len(self))))


def drawn_samples(cells: MappedCells, held: np.ndarray | None) -> Samples:
    """The samples of a datum that stays in its file, with what they are measured on.

    Args:
        held: bool [n1], where the first axis is held back.
    """
    _advise(cells.values, "MADV_RANDOM")  # reading ahead of a cell reads what nobody draws
    heldout = None
    if held is not None:
        first, *others = cells.kept
        heldout = MappedCells(cells.values, [first & held, *others], cells.scale, cells.converted).some()
        cells = MappedCells(cells.values, [first & ~held, *others], cells.scale, cells.converted)
    check = cells.some()
    empty = check.map(lambda tensor: tensor[:0])
    return Samples(empty.coordinates, empty.values, check=check, heldout=heldout, source=cells)


@lru_cache(maxsize=4)
def _spread(available: int, count: int) -> Tensor:
    """One of each of `count` runs of `available` positions, at random: int64 [count]."""
    edges = torch.arange(count + 1) * available // count
    drawn = words(as_tensor([0]), Stream.NOISE, 0, count)[0]
    return edges[:-1] + (drawn * (edges[1:] - edges[:-1]) >> 32)


def _advise(array: np.ndarray, advice: str) -> None:
    """Tell the system how a mapping is used, where it can be told."""
    mapping = mapping_of(array)
    if mapping is not None and hasattr(mmap, advice):
        with contextlib.suppress(OSError, ValueError):
            mapping.madvise(getattr(mmap, advice))
