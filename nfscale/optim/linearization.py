"""Residuals of many fields and their Jacobians, kept as what goes into each linear layer and what comes back to it.

A field of linear layers z_l = W_l h_{l-1} + b_l has, for sample n and channel c, the Jacobian row
delta_l[n, c] (x) (h_{l-1}[n], 1), one outer product per layer, with delta_l[n, c] = d r[n, c] / d z_l[n]. Its Gram
matrix is then a sum over layers of products of small Gram matrices, J J^T = sum_l (delta_l delta_l^T) * (h h^T + 1),
so that neither J J^T nor products with J ever need J itself.

Letters beside the project's: M = N C residuals of a field, I and O units into and out of a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_JACOBIAN_BYTES = 8 << 20  # of one field's rows of J in float64 at a time: a few fields of them stay in cache


@dataclass(frozen=True)
class Linearization:
    """r(theta + d) = r + J d + ..., where the loss of a field is |r|^2."""

    inputs: list[Tensor]
    """Per layer [F, N, I]."""
    deltas: list[Tensor]
    """Per layer [F, N, C, O]."""
    residuals: Tensor
    """[F, N, C]: errors times the roots of the weights of their samples."""
    weights: Tensor
    """[F, N]: of the samples in the loss; they sum to 1."""

    @property
    def side(self) -> int:
        """min(M, P): of the smaller of J J^T and J^T J."""
        return min(self.residuals[0].numel(), self._size)

    @property
    def _size(self) -> int:
        pairs = zip(self.inputs, self.deltas, strict=True)
        return sum(delta.shape[3] * (hidden.shape[2] + 1) for hidden, delta in pairs)

    def losses(self) -> Tensor:
        """[F]."""
        return self.residuals.square().flatten(1).sum(dim=1)

    def pushed(self, rows: Tensor) -> Tensor:
        """J d, the change of the residuals: [F, P] -> [F, N, C]."""
        total = torch.zeros_like(self.residuals)
        for hidden, delta, weight, bias in self.layers(rows):
            moved = torch.baddbmm(bias[:, None], hidden, weight.mT)
            total += (delta * moved[:, :, None]).sum(dim=3)
        return total

    def pulled(self, residuals: Tensor) -> Tensor:
        """J^T u: [F, N, C] -> [F, P]. The gradient of the loss is 2 J^T r."""
        parts = []
        for hidden, delta in zip(self.inputs, self.deltas, strict=True):
            summed = (delta * residuals[..., None]).sum(dim=2)
            parts += [(summed.mT @ hidden).flatten(1), summed.sum(dim=1)]
        return torch.cat(parts, dim=1)

    def gram(self) -> Tensor:
        """J J^T in float64, the tangent kernel of each field: [F, M, M]."""
        fields, samples, channels = self.residuals.shape
        total = self.residuals.new_zeros((fields, samples, channels, samples, channels), dtype=torch.float64)
        for hidden, delta in zip(self.inputs, self.deltas, strict=True):
            hidden, delta = hidden.double(), delta.double().flatten(1, 2)
            between = (hidden @ hidden.mT).add_(1)
            total += (delta @ delta.mT).view_as(total).mul_(between[:, :, None, :, None])
        return total.view(fields, samples * channels, samples * channels)

    def normal(self) -> Tensor:
        """J^T J in float64: [F, P, P], a few samples at a time."""
        fields, samples, channels = self.residuals.shape
        total = self.residuals.new_zeros((fields, self._size, self._size), dtype=torch.float64)
        taken = max(1, _JACOBIAN_BYTES // (8 * channels * self._size))
        for start in range(0, samples, taken):
            jacobian = self._jacobian(slice(start, start + taken))
            total.baddbmm_(jacobian.mT, jacobian)
        return total

    def _jacobian(self, samples: slice) -> Tensor:
        """Rows of J in float64: [F, n C, P]."""
        parts = []
        for hidden, delta in zip(self.inputs, self.deltas, strict=True):
            hidden, delta = hidden[:, samples].double(), delta[:, samples].double()
            parts += [(delta[..., None] * hidden[:, :, None, None]).flatten(3), delta]
        return torch.cat(parts, dim=3).flatten(1, 2)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """K-FAC's factors per layer, of (h, 1) and of delta: [F, I + 1, I + 1], [F, O, O].

        Their Kronecker product is the layer's block of the Gauss-Newton matrix 2 J^T J where inputs and deltas
        are independent over the samples; of a linear output layer, whose deltas are constant, exactly.
        """
        weights = self.weights[..., None]
        found = []
        for hidden, delta in zip(self.inputs, self.deltas, strict=True):
            extended = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=2)
            columns = delta.flatten(1, 2)
            found.append((extended.mT @ (extended * weights), 2 * (columns.mT @ columns)))
        return found

    def layers(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Inputs, deltas, and rows [F, P] taken apart: weights [F, O, I], biases [F, O]."""
        place = 0
        for hidden, delta in zip(self.inputs, self.deltas, strict=True):
            wide, out = hidden.shape[2], delta.shape[3]
            weight = rows[:, place : place + out * wide].unflatten(1, (out, wide))
            bias = rows[:, place + out * wide : place + out * (wide + 1)]
            place += out * (wide + 1)
            yield hidden, delta, weight, bias


def damped_solution(line: Linearization, wanted: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The d [F, P] that minimises |J d - u|^2 + lambda |d|^2, and whether it was found [F].

    Solved in float64, in the smaller of the two spaces: (J^T J + lambda)^-1 J^T u = J^T (J J^T + lambda)^-1 u. A
    field whose matrix is not positive definite to rounding gets d = 0.

    Args:
        wanted: u [F, N, C].
        damping: float64 [F], lambda as a fraction of the mean eigenvalue of the smaller matrix.
    """
    in_samples = line.residuals[0].numel() <= line._size
    matrix = line.gram() if in_samples else line.normal()
    right = (wanted.flatten(1) if in_samples else line.pulled(wanted)).double()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(dim=1))[:, None]
    lower, failed = torch.linalg.cholesky_ex(matrix)
    solved = torch.cholesky_solve(right[..., None], lower)[..., 0]
    found = (failed == 0) & solved.isfinite().all(dim=1)
    solved = torch.where(found[:, None], solved, 0.0).to(wanted.dtype)
    return (line.pulled(solved.view_as(wanted)) if in_samples else solved), found


def system_too_large(size: int, residuals: int, largest: int, way_out: str) -> str | None:
    """Why the smaller of J J^T and J^T J is too large for `damped_solution`, or None."""
    side = min(size, residuals)
    if side <= largest:
        return None
    return (
        f"it solves a dense system of {side:,} x {side:,} for every field, {8 * side * side / 2**20:,.0f} MiB of "
        f"float64 (the smaller of {residuals:,} residuals and {size:,} weights), more than "
        f"optimizer.largest_system={largest:,}; {way_out}"
    )
