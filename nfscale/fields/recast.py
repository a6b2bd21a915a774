"""A field in other coordinates of its params: the same functions, through which an optimiser walks another way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nfscale.layout import Layout, Params


@dataclass(frozen=True)
class Recast:
    """A field whose params are those of another MLP in other coordinates. Its step is autograd's."""

    field: Any
    original: Callable[[Params], Params]
    """From the new coordinates to the field's own."""
    recast: Callable[[Params], Params]
    """Back."""

    @property
    def layout(self) -> Layout:
        return self.field.layout

    @property
    def width(self) -> int:
        return self.field.width

    def init(self, seeds: Tensor) -> Params:
        return self.recast(self.field.init(seeds))

    def apply(self, params: Params, coordinates: Tensor) -> Tensor:
        return self.field.apply(self.original(params), coordinates)

    def forward_description(self) -> dict[str, Any]:
        return {"kind": "recast", "keys": {}, "field": self.field.forward_description()}
