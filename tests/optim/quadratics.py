"""Problems with known answers, as solvers are handed them: quadratics, and fields of one linear layer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nfscale.layout import Layout
from nfscale.optim import Extra
from nfscale.optim.linearization import Linearization


def layout_of(size: int) -> Layout:
    return Layout.of([("x", (size,))])


def extra_of(fields: int, step: int = 0) -> Extra:
    return Extra(torch.full((fields,), step), torch.ones(fields))


@dataclass
class Function:
    """The losses of F fields by a function of their rows; counts what each field was asked."""

    losses_of: object
    """Rows [F, P] and the fields [F] that they are of -> [F]."""
    fields: int
    asked: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.asked = torch.zeros(self.fields, dtype=torch.int64)

    def gradient(self, rows, fields=None):
        fields = torch.arange(self.fields) if fields is None else fields
        self.asked[fields] += 1
        leaf = rows.detach().requires_grad_()
        losses = self.losses_of(leaf, fields)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    def losses(self, rows):
        return self.losses_of(rows, torch.arange(self.fields)).detach()


def quadratic(hessians: Tensor, minima: Tensor) -> Function:
    """(x - x*)^T H (x - x*) / 2."""

    def losses_of(rows, fields):
        away = rows - minima[fields]
        return 0.5 * (away * (hessians[fields] @ away[..., None])[..., 0]).sum(dim=1)

    return Function(losses_of, len(minima))


def positive_definite(fields: int, size: int, condition: float) -> Tensor:
    """Random matrices [F, P, P] in float64 with eigenvalues from 1 to `condition`."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(fields, size, size, generator=draw, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.logspace(0, torch.tensor(condition).log10(), size, dtype=torch.float64)) @ basis.mT


@dataclass(frozen=True)
class LinearFields:
    """y = W x + b fitted to values by weighted mean squared error: rows are W, then b."""

    inputs: Tensor
    """[F, N, I]."""
    values: Tensor
    """[F, N, C]."""
    weights: Tensor
    """[F, N], sum to 1."""

    def linearization(self, rows: Tensor) -> Linearization:
        fields, _, channels = self.values.shape
        wide = self.inputs.shape[2]
        matrix, bias = rows[:, : channels * wide].view(fields, channels, wide), rows[:, channels * wide :]
        roots = (self.weights / channels).sqrt()
        deltas = torch.eye(channels, dtype=rows.dtype) * roots[..., None, None]
        predicted = self.inputs @ matrix.mT + bias[:, None]
        return Linearization([self.inputs], [deltas], (predicted - self.values) * roots[..., None], self.weights)

    def losses(self, rows: Tensor) -> Tensor:
        return self.linearization(rows).losses()

    def design(self) -> tuple[Tensor, Tensor]:
        """The weighted matrix [F, N, I + 1] and the right sides [F, N, C] of each channel's least squares."""
        root = self.weights.sqrt()[..., None]
        extended = torch.cat([self.inputs, torch.ones_like(self.inputs[..., :1])], dim=2)
        return root * extended, root * self.values

    def solution(self) -> Tensor:
        """The rows of least squares; of least norm where there are many."""
        matrix, right = self.design()
        solved = torch.linalg.pinv(matrix) @ right
        return torch.cat([solved[:, :-1].mT.flatten(1), solved[:, -1]], dim=1)


def linear_fields(samples: int, inputs: int = 5, channels: int = 2, fields: int = 3) -> LinearFields:
    draw = torch.Generator().manual_seed(1)
    kinds = {"generator": draw, "dtype": torch.float64}
    weights = torch.rand(fields, samples, **kinds) + 0.1
    return LinearFields(
        torch.randn(fields, samples, inputs, **kinds) * torch.logspace(-1, 1, inputs),
        torch.randn(fields, samples, channels, **kinds),
        weights / weights.sum(dim=1, keepdim=True),
    )
