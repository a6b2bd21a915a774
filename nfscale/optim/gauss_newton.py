"""Levenberg-Marquardt: damped Gauss-Newton steps by a dense solve per field.

A step minimises |r + J d|^2 + lambda |d|^2. The damping follows the gain ratio of each field, by the rule of Nielsen,
"Damping parameter in Marquardt's method" (1999), section 2. Of the two equal forms of the solution the one with the
smaller matrix is taken: J^T J (P x P), or the tangent kernel J J^T (M x M) where there are fewer residuals than
weights, as arXiv 2505.12149 does for the natural gradients of physics-informed networks.

Difference from Nielsen: lambda is relative to the mean eigenvalue of the matrix that is solved, so that scaling the
loss or the number of samples changes nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Layout
from nfscale.optim.base import Extra, Need, State
from nfscale.optim.linearization import damped_solution, system_too_large
from nfscale.optim.solver import Problem

_LEAST_DAMPING = 1e-12  # relative; float64 has nothing below it to lose


@dataclass(frozen=True)
class GaussNewton:
    """For small fields or few samples: a step costs one linearization and one Cholesky factor of side min(P, M).

    There is no learning rate: the damping decides how far a step goes.
    """

    damping: float = 1e-2
    """The first lambda, divided by `Extra.rate`; 0 is Gauss-Newton until a step fails."""
    largest_system: int = 2048
    """Side of the largest matrix that is solved per field: 32 MiB in float64. Twice that takes six seconds a step of
    one core, where K-FAC and L-BFGS take hundredths."""

    full_batch: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"layer_io"})

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping is at least 0, got {self.damping}")

    def too_large(self, size: int, residuals: int) -> str | None:
        return system_too_large(size, residuals, self.largest_system, "use lbfgs or kfac, or raise it")

    def init(self, rows: Tensor, layout: Layout) -> State:
        damping = rows.new_full((len(rows),), self.damping, dtype=torch.float64)
        return {"damping": damping, "growth": torch.full_like(damping, 2.0)}

    def solve(self, problem: Problem, rows: Tensor, state: State, extra: Extra) -> tuple[Tensor, State]:
        line = problem.linearization(rows)
        loss = line.losses().double()
        step, found = damped_solution(line, -line.residuals, state["damping"] / extra.rate)
        predicted = (line.residuals + line.pushed(step)).square().flatten(1).sum(dim=1).double()
        moved = rows + step
        gain = (loss - problem.losses(moved).double()) / (loss - predicted)
        accepted = found & (gain > 0)  # False where the new loss is not a number
        shrink = (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3)
        damping, growth = state["damping"], state["growth"]
        grown = torch.maximum(damping * growth, torch.full_like(damping, _LEAST_DAMPING))
        smaller = torch.where(damping > 0, (damping * shrink).clamp(min=_LEAST_DAMPING), damping)
        state["damping"] = torch.where(accepted, smaller, grown)
        state["growth"] = torch.where(accepted, 2.0, 2 * growth)
        return torch.where(accepted[:, None], moved, rows), state
