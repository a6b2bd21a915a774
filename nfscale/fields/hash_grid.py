"""Grids of features at several resolutions under a small MLP, many at once.

Mueller, Evans, Schied & Keller, "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding" (SIGGRAPH
2022): each level has a grid of vectors, interpolated linearly between the corners of a cell; grids with more corners
than `table_size` share their vectors by a hash of the corner. A field's grids are weights like any others.

They want Adam at a rate of about 0.01 (section 4): 64 digits reach 42.6 dB with it and 24.0 with the automatic rate,
made for matrices. A diagonal of curvature is zero for the vectors that no sample sees.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nfscale.fields.keys import refuse_unless_positive
from nfscale.layout import Layout, Params
from nfscale.rng import Stream, uniform

_PRIMES = (1, 2_654_435_761, 805_459_861, 3_674_653_429)  # section 3, equation 4; the fourth is the authors' code's
_GRID_BOUND = 1e-4


@dataclass(frozen=True)
class HashGrid:
    """`levels` grids of `features` numbers a corner, `depth` rectified layers of `width` units, then a linear one."""

    dimensions: int
    channels: int
    width: int = 32
    depth: int = 1
    levels: int = 6
    features: int = 2
    table_size: int = 1024
    """Vectors of a level at most: a power of two."""
    coarsest: int = 4
    """Cells along an axis of the first level; between it and `finest` they grow by a constant factor (equation 2)."""
    finest: int = 64
    weight_scale: float = 1.0
    """Multiplies all matrices but the last, as in the other fields."""

    def __post_init__(self) -> None:
        sizes = ("dimensions", "channels", "width", "depth", "levels", "features", "coarsest")
        refuse_unless_positive(self, (*sizes, "weight_scale"))
        if self.dimensions > len(_PRIMES):
            raise ValueError(f"a hash grid has at most {len(_PRIMES)} dimensions, got {self.dimensions}")
        if self.table_size < 2 or self.table_size & (self.table_size - 1):
            raise ValueError(f"table_size is a power of two, got {self.table_size}")
        if self.finest < self.coarsest:
            raise ValueError(f"finest is at least coarsest={self.coarsest}, got {self.finest}")

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """Cells along an axis of each level."""
        growth = (self.finest / self.coarsest) ** (1 / max(self.levels - 1, 1))
        return tuple(math.floor(self.coarsest * growth**level + 1e-9) for level in range(self.levels))

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(fan_out, fan_in) of each of the depth + 1 weight matrices."""
        widths = [self.levels * self.features] + [self.width] * self.depth + [self.channels]
        return tuple(zip(widths[1:], widths[:-1], strict=True))

    @cached_property
    def layout(self) -> Layout:
        named: list[tuple[str, tuple[int, ...]]] = [
            (f"grids.{level}", (min((cells + 1) ** self.dimensions, self.table_size), self.features))
            for level, cells in enumerate(self.cells)
        ]
        for index, (fan_out, fan_in) in enumerate(self.shapes):
            named += [(f"layers.{index}.weight", (fan_out, fan_in)), (f"layers.{index}.bias", (fan_out,))]
        return Layout.of(named)

    def init(self, seeds: Tensor) -> Params:
        """One draw per seed: [F] -> {name: [F, ...]}, float32: grids U(-1e-4, 1e-4) (section 4), He et al.'s bounds."""
        params = self.layout.unravel(uniform(seeds, Stream.INIT, 0, self.layout.size).mul_(2).sub_(1))
        for level in range(self.levels):
            params[f"grids.{level}"].mul_(_GRID_BOUND)
        for index, (_, fan_in) in enumerate(self.shapes):
            is_last = index == self.depth
            bound = 1 / math.sqrt(fan_in) if is_last else self.weight_scale * math.sqrt(6 / fan_in)
            params[f"layers.{index}.weight"].mul_(bound)
            params[f"layers.{index}.bias"].mul_(1 / math.sqrt(fan_in))
        return params

    def apply(self, params: Params, coordinates: Tensor) -> Tensor:
        """Values at coordinates: [F|1, N, D] -> [F, N, C]."""
        fields = next(iter(params.values())).shape[0]
        levels = [self._level(params[f"grids.{level}"], coordinates, cells) for level, cells in enumerate(self.cells)]
        hidden = torch.cat(levels, dim=-1).expand(fields, -1, -1)
        for index in range(self.depth + 1):
            weight, bias = params[f"layers.{index}.weight"], params[f"layers.{index}.bias"]
            hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT)
            if index < self.depth:
                hidden = torch.relu(hidden)
        return hidden

    def _level(self, grid: Tensor, coordinates: Tensor, cells: int) -> Tensor:
        """Interpolated vectors: grids [F, T, f], coordinates [F|1, N, D] -> [F, N, f]."""
        at = ((coordinates + 1) / 2 * cells).clamp(0, cells)
        cell = at.detach().floor().clamp(max=cells - 1)
        inside, cell = at - cell, cell.long()
        found = torch.zeros((), dtype=grid.dtype, device=grid.device)
        for corner in product((0, 1), repeat=self.dimensions):
            offset = torch.tensor(corner, device=cell.device)
            share = torch.where(offset.bool(), inside, 1 - inside).prod(dim=-1, keepdim=True)
            index = self._index(cell + offset, cells, grid.shape[1]).unsqueeze(-1)
            vectors = torch.gather(grid, 1, index.expand(len(grid), -1, self.features))
            found = found + share * vectors
        return found

    def _index(self, corner: Tensor, cells: int, size: int) -> Tensor:
        """Where the vector of a corner [..., D] lies: in rows where all fit, by equation 4 else."""
        if (cells + 1) ** self.dimensions <= self.table_size:
            place = torch.tensor([(cells + 1) ** axis for axis in range(self.dimensions)], device=corner.device)
            return (corner * place).sum(dim=-1)
        mixed = corner[..., 0] * _PRIMES[0]
        for axis in range(1, self.dimensions):
            mixed = mixed ^ (corner[..., axis] * _PRIMES[axis])
        return mixed & (size - 1)

    def forward_description(self) -> dict[str, Any]:
        """The exact forward, for a reader who has the table and no nfscale; `keys` rebuild the field."""
        return {
            "kind": "hash_grid",
            "keys": asdict(self),
            "cells": list(self.cells),
            "primes": list(_PRIMES[: self.dimensions]),
            "formula": (
                "h = the vectors of all levels l end to end; of a level: p = (x + 1) / 2 * cells[l], clamped; the sum "
                "over the corners c of its cell (floor(p), at most cells[l] - 1) of "
                "prod_d (1 - |p_d - c_d|) grids.l[i(c)]; i(c) = sum_d c_d (cells[l] + 1)^d "
                "where (cells[l] + 1)^D is at most table_size, else (xor over d of c_d * primes[d]) mod table_size; "
                "then for l = 0 .. depth-1: h = max(0, layers.l.weight @ h + layers.l.bias); "
                "y = layers.depth.weight @ h + layers.depth.bias"
            ),
        }
