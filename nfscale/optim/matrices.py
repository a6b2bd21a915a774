"""What Shampoo and SOAP make of a field's tensors: matrices with a Kronecker factor on each side.

A tensor [F, ..., n, m] is the matrix [F, (...) n, m] of each field: leading axes are flattened into the rows. Vectors
[F, n] have no factors. A side longer than `max_factor` has none either: its factor would be larger than the tensor.
"""

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import per_field

Factors = dict[str, dict[str, Tensor]]
"""{"left": {name: [F, n, n]}, "right": {name: [F, m, m]}}; a side without a factor lacks the name."""

SIDES = {"left": -2, "right": -1}
"""The axis of a matrix that each side's factor belongs to."""


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor with a field axis has factors at all."""
    return tensor.ndim > 2


def as_matrix(tensor: Tensor) -> Tensor:
    """[F, ..., n, m] -> [F, (...) n, m]."""
    return tensor.flatten(1, -2)


def zero_factors(params: Params, max_factor: int) -> Factors:
    """A factor of zeros for every side that has one."""

    def of(tensor: Tensor, axis: int) -> Tensor:
        size = as_matrix(tensor).shape[axis]
        return tensor.new_zeros(len(tensor), size, size)

    matrices = {name: tensor for name, tensor in params.items() if is_matrix(tensor)}
    return {
        side: {name: of(t, axis) for name, t in matrices.items() if as_matrix(t).shape[axis] <= max_factor}
        for side, axis in SIDES.items()
    }


def products(gradient: Tensor, side: str) -> Tensor:
    """G G^T or G^T G: [F, n, m] -> [F, n, n] or [F, m, m]."""
    return gradient @ gradient.mT if side == "left" else gradient.mT @ gradient


def eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [F, n], ascending, and eigenvectors [F, n, n] in the columns.

    Danger: torch raises where one matrix of the batch is not finite, and a field that diverges must not stop the
    others. Such a matrix is taken as the identity; the field is found by its loss at the next check.
    """
    finite = factor.isfinite().flatten(1).all(dim=1)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    values, vectors = torch.linalg.eigh(torch.where(per_field(finite, factor), factor, identity))
    return values, vectors
