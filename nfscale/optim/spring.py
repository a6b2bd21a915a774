"""SPRING: Gauss-Newton in sample space with momentum, for minibatches.

Goldshlager, Abrahamsen & Lin, "A Kaczmarz-inspired approach to accelerate the optimization of neural network
wavefunctions" (2024); as a natural gradient for physics-informed networks in arXiv 2505.12149. A step is the d
closest to mu times the last one that fits the linearized residuals of the minibatch,

    d = mu d_last - J^T (J J^T + lambda)^-1 (r + mu J d_last),

so that what earlier minibatches said survives where this one says nothing. Differences: lambda is relative to the
mean eigenvalue of J J^T, the rate follows a schedule, and steps are not bounded in norm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Layout
from nfscale.optim.base import Extra, Need, State
from nfscale.optim.linearization import damped_solution, system_too_large
from nfscale.optim.schedules import Schedule
from nfscale.optim.solver import Problem


@dataclass(frozen=True)
class Spring:
    """A step costs one linearization of the minibatch and one Cholesky factor of side min(P, M)."""

    learning_rate: float
    schedule: Schedule
    momentum: float = 0.9
    damping: float = 0.1
    """lambda, as a fraction of the mean eigenvalue of J J^T. With 0.01 the worst of 16 tiles lost 8 dB."""
    largest_system: int = 2048
    """Side of the largest matrix that is solved per field: 32 MiB in float64. Twice that takes six seconds a step of
    one core, where K-FAC and L-BFGS take hundredths."""

    full_batch: ClassVar[bool] = False
    default_warmup: ClassVar[int] = 20  # the first steps overshoot: without it the worst tiles lose up to 10 dB
    needs: ClassVar[frozenset[Need]] = frozenset({"layer_io"})

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ValueError(f"damping is above 0, got {self.damping}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is at least 0 and below 1, got {self.momentum}")

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """0.2, or 0.1 at 128 samples per step and fewer, whatever the width and the weight scale.

        Evidence: grey photograph tiles of 64 x 64 at width 64, weight_scale 1.75, cosine decay. Of 0.1 and 0.2 in 200
        steps of 256 samples, best by the median and as good for the worst of 16 tiles; of 0.1 and 0.3 in 300 steps of
        128, 0.1 by the worst of three. At 64 samples it is poor at either: the more samples, the better this method.
        """
        return 0.1 if samples <= 128 else 0.2

    def too_large(self, size: int, residuals: int) -> str | None:
        return system_too_large(size, residuals, self.largest_system, "use fewer fit.samples, or raise it")

    def init(self, rows: Tensor, layout: Layout) -> State:
        return {"step": torch.zeros_like(rows)}

    def solve(self, problem: Problem, rows: Tensor, state: State, extra: Extra) -> tuple[Tensor, State]:
        line = problem.linearization(rows)
        kept = self.momentum * state["step"]
        damping = torch.full((len(rows),), self.damping, dtype=torch.float64, device=rows.device)
        step, _ = damped_solution(line, -(line.residuals + line.pushed(kept)), damping)
        state["step"] = step + kept
        size = (self.learning_rate * self.schedule.factor(extra.step, extra.length) * extra.rate).to(rows.dtype)
        return rows + size[:, None] * state["step"], state
