"""Learning-rate schedules: functions of each field's own step.

Cosine to zero is the default: a constant rate leaves a noise floor in minibatch fitting
(22 to 26 dB at equal budget on photographs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FINAL_FRACTION = 0.01  # exponential decay ends at a hundredth, the decade range ESGD's authors use for NeRF


def constant(progress: Tensor) -> Tensor:
    """1 at every progress in [0, 1]."""
    return torch.ones_like(progress)


def cosine(progress: Tensor) -> Tensor:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter, ICLR 2017, without restarts)."""
    return 0.5 * (1 + torch.cos(math.pi * progress))


def exponential(progress: Tensor) -> Tensor:
    """From 1 to `_FINAL_FRACTION`, the same factor at every step."""
    return _FINAL_FRACTION**progress


def step(progress: Tensor) -> Tensor:
    """A tenth from half of the steps on, and a hundredth from three quarters on."""
    whole = torch.ones_like(progress)  # numbers of Python would be taken in float32 here
    return torch.where(progress < 0.5, whole, torch.where(progress < 0.75, 0.1 * whole, 0.01 * whole))


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": constant,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` steps, then the named decay until `total_steps`."""

    kind: str = "cosine"
    total_steps: int = 1000
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}; known schedules: {', '.join(SCHEDULES)}")

    def factor(self, step: Tensor) -> Tensor:
        """Factor on the learning rate for the update after `step` updates: int64 [F] -> float64 [F].

        In float64, because a vectorised float32 power or cosine may round differently at another
        position of the batch, and what a field becomes must not depend on its position.
        """
        position = step.to(torch.float64)
        decay_steps = max(self.total_steps - self.warmup, 1)
        factor = SCHEDULES[self.kind](((position - self.warmup) / decay_steps).clamp(0, 1))
        if self.warmup:
            factor = torch.where(position < self.warmup, (position + 1) / self.warmup, factor)
        return factor
