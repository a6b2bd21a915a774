"""Cells of a grid on [-1, 1]: where their centres lie, and an order in which neighbours are neighbours in space.

In Z-order (Morton) a run of 2^(k D) neighbours of a grid of D axes is a block of 2^k cells a side, which is what makes
a stratified draw cover the grid: one cell out of each block.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_SIZES_KEPT = 8  # whose coordinates and orders are remembered: few, since those of a large grid take its size over


@lru_cache(maxsize=_SIZES_KEPT)
def cell_centres(*sizes: int) -> Tensor:
    """float32 [N, D] in row order: cell i of n lies at (2 i + 1) / n - 1, so an axis spans [-1, 1] edge to edge."""
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in sizes]
    return torch.cartesian_prod(*axes).to(torch.float32)


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
