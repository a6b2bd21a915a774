"""K-FAC: Gauss-Newton steps with the matrix approximated layer by layer as a Kronecker product of two small ones.

Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (ICML 2015), the
block-diagonal version: factored Tikhonov damping (section 6.3), and the step and the last one rescaled together by
the exact Gauss-Newton matrix (sections 6.4 and 7). For a mean squared error that matrix is the Fisher matrix.

It is a solver, because the rescaling needs products with the Jacobian and the damping needs the loss of the step.
Differences from the paper: all samples enter each step, so factors are those of the last estimate and no running
mean; the factors are inverted anew at every step (they are small), so that one damping serves in place of lambda and
gamma; lambda is relative to the mean eigenvalue of the factors' product; a step that raises the loss is refused.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Layout
from nfscale.optim.base import Extra, Need, State
from nfscale.optim.linearization import Linearization
from nfscale.optim.solver import Problem

_LEAST_DAMPING = 1e-8  # relative: float32 factors have no eigenvalues below that


@dataclass(frozen=True)
class KFAC:
    """A step costs a forward and backward per channel, two products with the Jacobian, and small inverses.

    There is no learning rate: the exact quadratic model decides how far a step goes.
    """

    damping: float = 1e-2
    """The first lambda, divided by `Extra.rate`."""
    adaptation: float = 0.6
    """Factor on lambda after a step whose gain was above 3/4 of what was predicted; below 1/4, its inverse."""
    update_every: int = 5
    """Steps between estimates of the factors."""

    full_batch: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"layer_io"})

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ValueError(f"damping is above 0, got {self.damping}")
        if not 0 < self.adaptation < 1:
            raise ValueError(f"adaptation is between 0 and 1, got {self.adaptation}")
        if self.update_every < 1:
            raise ValueError(f"update_every is at least 1, got {self.update_every}")

    def too_large(self, size: int, residuals: int) -> str | None:
        return None

    def init(self, rows: Tensor, layout: Layout) -> State:
        fields = len(rows)
        shapes = [entry.shape for entry in layout.entries if len(entry.shape) == 2]
        return {
            "damping": rows.new_full((fields,), self.damping, dtype=torch.float64),
            "step": torch.zeros_like(rows),
            "inputs": {str(n): rows.new_zeros((fields, wide + 1, wide + 1)) for n, (_, wide) in enumerate(shapes)},
            "deltas": {str(n): rows.new_zeros((fields, out, out)) for n, (out, _) in enumerate(shapes)},
        }

    def solve(self, problem: Problem, rows: Tensor, state: State, extra: Extra) -> tuple[Tensor, State]:
        line = problem.linearization(rows)
        due = extra.step % self.update_every == 0
        if bool(due.any()):
            for index, (inputs, deltas) in enumerate(line.factors()):
                for name, factor in (("inputs", inputs), ("deltas", deltas)):
                    old = state[name][str(index)]
                    state[name][str(index)] = torch.where(due[:, None, None], factor, old)
        gradient = 2 * line.pulled(line.residuals)
        factors = [(state["inputs"][name], state["deltas"][name]) for name in state["inputs"]]
        damping = state["damping"] / extra.rate * _mean_eigenvalue(factors)
        direction = preconditioned(line, gradient, factors, damping).neg_()
        step, predicted = rescaled(line, gradient, direction, state["step"], damping)
        moved = rows + step
        gain = (line.losses().double() - problem.losses(moved).double()) / predicted
        accepted = gain > 0  # False where something is not a number
        careful = torch.where(accepted, 1 / self.adaptation, self.adaptation**-3)
        factor = torch.where(gain > 0.75, self.adaptation, torch.where(gain < 0.25, careful, 1.0))
        factor = torch.where(gain.isfinite(), factor, careful)
        state["damping"] = (state["damping"] * factor).clamp(min=_LEAST_DAMPING)
        state["step"] = torch.where(accepted[:, None], step, 0.0)
        return torch.where(accepted[:, None], moved, rows), state


def preconditioned(line: Linearization, rows: Tensor, factors: list[tuple[Tensor, Tensor]], damping: Tensor) -> Tensor:
    """(A + pi sqrt(lambda))^-1 (x) (G + sqrt(lambda) / pi)^-1 of every layer, times rows [F, P].

    pi = sqrt((tr A / dim A) / (tr G / dim G)) shares the damping lambda [F] between the factors.
    """
    root, parts = damping.sqrt(), []
    for (_, _, weight, bias), (inputs, deltas) in zip(line.layers(rows), factors, strict=True):
        mean_inputs, mean_deltas = (f.diagonal(dim1=1, dim2=2).mean(dim=1).double() for f in (inputs, deltas))
        share = (mean_inputs / mean_deltas).sqrt()
        solved = torch.cat([weight, bias[..., None]], dim=2).double()
        solved = torch.cholesky_solve(solved, _damped_root(deltas, root / share))
        solved = torch.cholesky_solve(solved.mT, _damped_root(inputs, root * share)).mT.to(rows.dtype)
        parts += [solved[..., :-1].flatten(1), solved[..., -1]]
    return torch.cat(parts, dim=1)


def rescaled(
    line: Linearization, gradient: Tensor, direction: Tensor, last: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """The combination of two directions [F, P] that minimises the damped quadratic model, and its predicted gain [F].

    The model is g^T d + d^T (2 J^T J + lambda) d / 2 with the exact Jacobian; a `last` step of 0 is left out.
    """
    pushed = [line.pushed(d).flatten(1) for d in (direction, last)]
    ways = [direction, last]
    curvature = torch.stack(
        [
            torch.stack([2 * _dot(pushed[i], pushed[j]) + damping * _dot(ways[i], ways[j]) for j in (0, 1)], dim=1)
            for i in (0, 1)
        ],
        dim=1,
    )
    slopes = torch.stack([_dot(gradient, d) for d in ways], dim=1)
    is_alone = curvature[:, 1, 1] == 0
    curvature[:, 1, 1] += is_alone
    determinant = curvature[:, 0, 0] * curvature[:, 1, 1] - curvature[:, 0, 1].square()
    # Two directions that are one to rounding have no inverse: the new one goes alone.
    is_alone |= determinant <= 1e-6 * curvature[:, 0, 0] * curvature[:, 1, 1]
    both = torch.stack(
        [
            curvature[:, 0, 1] * slopes[:, 1] - curvature[:, 1, 1] * slopes[:, 0],
            curvature[:, 0, 1] * slopes[:, 0] - curvature[:, 0, 0] * slopes[:, 1],
        ],
        dim=1,
    )
    one = torch.stack([-slopes[:, 0] / curvature[:, 0, 0], torch.zeros_like(slopes[:, 0])], dim=1)
    chosen = torch.where(is_alone[:, None], one, both / determinant[:, None])
    predicted = -0.5 * (slopes * chosen).sum(dim=1)
    factors = chosen.to(direction.dtype)
    return factors[:, :1] * direction + factors[:, 1:] * last, predicted


def _mean_eigenvalue(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the block-diagonal matrix of the Kronecker products: [F]."""
    traces = [[f.diagonal(dim1=1, dim2=2).sum(dim=1).double() for f in pair] for pair in factors]
    size = sum(inputs.shape[1] * deltas.shape[1] for inputs, deltas in factors)
    return torch.stack([inputs * deltas for inputs, deltas in traces]).sum(dim=0) / size


def _damped_root(factor: Tensor, damping: Tensor) -> Tensor:
    """The Cholesky factor of factor + damping, in float64: [F, n, n], [F] -> [F, n, n]."""
    identity = torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device)
    return torch.linalg.cholesky_ex(factor.double() + damping[:, None, None] * identity)[0]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=1, dtype=torch.float64)
