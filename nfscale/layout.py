"""Where each tensor of a field lies in its row of weights.

A row is the plain concatenation of the tensors in the layout's order, each in C order. The layout
travels with every table as JSON `[{name, shape, offset}]`, so that a stranger can take a row apart.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""The params of F fields: every tensor is [F, ...]."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a field: its name, its shape without the field axis, its first position in the row."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The order of a field's tensors in its row of P weights."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> "Layout":
        """The layout that lays tensors of these (name, shape) end to end."""
        entries, offset = [], 0
        for name, shape in shapes:
            entries.append(Entry(name, tuple(shape), offset))
            offset += entries[-1].size
        return cls(tuple(entries))

    @cached_property
    def size(self) -> int:
        """P, the number of weights of a field."""
        return sum(entry.size for entry in self.entries)

    def ravel(self, params: Params, out: Tensor | None = None) -> Tensor:
        """Params to rows: {name: [F, ...]} -> [F, P], bit for bit. `out` may be wider; its tail is left alone."""
        if out is None:
            return torch.cat([params[entry.name].flatten(1) for entry in self.entries], dim=1)
        for entry in self.entries:
            out[:, entry.offset : entry.offset + entry.size] = params[entry.name].flatten(1)
        return out

    def unravel(self, rows: Tensor) -> Params:
        """Rows to params: [F, >= P] -> {name: [F, ...]}. The tensors are views into the rows.

        Raises:
            ValueError: if a row is shorter than P (both lengths are printed).
        """
        if rows.shape[-1] < self.size:
            raise ValueError(f"rows of {rows.shape[-1]} weights cannot hold a field of {self.size}")
        return {
            entry.name: rows[:, entry.offset : entry.offset + entry.size].unflatten(1, entry.shape)
            for entry in self.entries
        }

    def to_json(self) -> str:
        return json.dumps([{"name": e.name, "shape": list(e.shape), "offset": e.offset} for e in self.entries])

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        return cls(tuple(Entry(e["name"], tuple(e["shape"]), e["offset"]) for e in json.loads(text)))
