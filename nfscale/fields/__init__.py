"""What is fitted: functions from coordinates to values, many at once, each with params of its own.

A field is frozen data with two verbs: `init(seeds [F]) -> Params` and
`apply(params, coordinates [F|1, N, D]) -> [F, N, C]`. Axis 0 is the field and nothing reduces over it.
"""

from typing import Any, Protocol

from torch import Tensor

from nfscale.fields.hash_grid import HashGrid
from nfscale.fields.mfn import MultiplicativeFilters
from nfscale.fields.mlp import MLP
from nfscale.layout import Layout, Params
from nfscale.rng import as_tensor, datum_seed


class Field(Protocol):
    """The contract of every entry of `FIELDS`."""

    @property
    def layout(self) -> Layout: ...

    def init(self, seeds: Tensor) -> Params: ...

    def apply(self, params: Params, coordinates: Tensor) -> Tensor: ...

    def forward_description(self) -> dict[str, Any]:
        """The exact forward, for a reader who has the table and no nfscale: `kind`, `keys` and a formula."""
        ...


def theta0_of(field: Field, seed: int) -> Tensor:
    """The params that all fields of a job share at the start: float32 [P]."""
    return field.layout.ravel(field.init(as_tensor([datum_seed(seed, "")])))[0]


FIELDS: dict[str, type] = {"mlp": MLP, "mfn": MultiplicativeFilters, "hash_grid": HashGrid}

__all__ = ["FIELDS", "MLP", "Field", "HashGrid", "MultiplicativeFilters", "theta0_of"]
