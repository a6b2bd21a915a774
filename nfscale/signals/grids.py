"""Cells of a grid on [-1, 1]: where their centres lie, and an order in which neighbours are neighbours in space.

In Z-order (Morton) a run of 2^(k D) neighbours of a grid of D axes is a block of 2^k cells a side, which is what makes
a stratified draw cover the grid: one cell out of each block.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_SIZES_KEPT = 8  # whose coordinates and orders are remembered: few, since those of a large grid take its size over


def axis_centres(size: int) -> Tensor:
    """float32 [N]: cell i of n lies at (2 i + 1) / n - 1, so an axis spans [-1, 1] edge to edge."""
    return ((2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1).to(torch.float32)


@lru_cache(maxsize=_SIZES_KEPT)
def cell_centres(*sizes: int) -> Tensor:
    """float32 [N, D] in row order, see `axis_centres`."""
    return torch.cartesian_prod(*map(axis_centres, sizes))


@lru_cache(maxsize=_SIZES_KEPT)
def z_order(*sizes: int) -> np.ndarray:
    """Row-order positions [N] of the cells, visited along the Morton curve."""
    code = np.zeros(sizes, np.uint64)
    axes = len(sizes)
    for axis, size in enumerate(sizes):
        place = np.arange(size, dtype=np.uint64)
        spread = np.zeros(size, np.uint64)
        for bit in range(size.bit_length()):
            spread |= ((place >> np.uint64(bit)) & np.uint64(1)) << np.uint64(axes * bit + axes - 1 - axis)
        code |= spread.reshape([size if other == axis else 1 for other in range(axes)])
    return np.argsort(code, axis=None, kind="stable")


def z_ordered(ranks: np.ndarray, kept: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Which cells these are in Z-order, without an order of all cells: int64 [n] -> D times int64 [n].

    A rank goes down from the block that holds all cells, halved along one axis after the other, to the cell: into the
    first half if that has more cells than the rank, into the second otherwise.

    Args:
        kept: bool [n1], [n2], ...: a cell has a rank if it is kept along each axis. With all kept, the cells are
            those of `z_order` at these places.
    """
    before = [np.concatenate([[0], np.cumsum(axis)]) for axis in kept]  # how many are kept in front of a place
    bits = max(len(axis) for axis in kept).bit_length()
    left, starts = ranks.astype(np.int64), [np.zeros(len(ranks), np.int64) for _ in kept]
    inside = [np.full(len(ranks), counts[-1]) for counts in before]  # of the block, along each axis
    for bit in reversed(range(bits)):
        for axis, counts in enumerate(before):
            middle = starts[axis] + (1 << bit)
            first = counts[np.minimum(middle, len(counts) - 1)] - counts[np.minimum(starts[axis], len(counts) - 1)]
            others = np.prod([one for place, one in enumerate(inside) if place != axis], axis=0, dtype=np.int64)
            goes_on = left >= first * others
            left -= np.where(goes_on, first * others, 0)
            starts[axis] = np.where(goes_on, middle, starts[axis])
            inside[axis] = np.where(goes_on, inside[axis] - first, first)
    return tuple(starts)
