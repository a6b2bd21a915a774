"""Learning-rate schedules: functions of each field's own step.

Cosine to zero is the default: a constant rate leaves a noise floor in minibatch fitting
(22 to 26 dB at equal budget on photographs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FINAL_FRACTION = 0.01  # exponential decay ends at a hundredth, the decade range ESGD's authors use for NeRF


def constant(progress: Tensor) -> Tensor:
    """1 at every progress in [0, 1]."""
    return torch.ones_like(progress)


def cosine(progress: Tensor) -> Tensor:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter, "SGDR", ICLR 2017)."""
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


def budgets(first_steps: int | None, total_steps: int) -> tuple[int, ...]:
    """Steps after which a schedule may end, each at least twice the last: first, 2 first, 4 first, ..., total."""
    lengths, length = [], first_steps or total_steps
    while 2 * length <= total_steps:
        lengths.append(length)
        length *= 2
    return (*lengths, total_steps)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` steps, then the named decay until `total_steps`.

    With `first_steps` it is a ladder of budgets: a decay until `first_steps`, and where a field goes on, the rest of
    the decay of twice that budget, and so on, see `budgets`. A decay to zero has to know its length, and data differ
    in what they need. At the end of a budget the rate rises again, to what the next one has at that step: half, of a
    cosine. Fields leave at their target under one long schedule too, so measure before choosing a ladder:
    `python -m pipelines.learned_start --tasks ladder`.
    """

    kind: str = "cosine"
    total_steps: int = 1000
    warmup: int = 0
    first_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}; known schedules: {', '.join(SCHEDULES)}")
        if self.first_steps is not None and self.first_steps < 1:
            raise ValueError(f"first_steps is at least 1, got {self.first_steps}")

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """The steps after which a decay ends; the last of them is `total_steps`."""
        return budgets(self.first_steps, self.total_steps)

    def factor(self, step: Tensor, length: Tensor | None = None) -> Tensor:
        """Factor on the learning rate for the update after `step` updates: int64 [F] -> float64 [F].

        Args:
            length: int64, broadcasts against `step`: of each field's own decay, in place of `total_steps`.

        In float64, because a vectorised float32 power or cosine may round differently at another
        position of the batch, and what a field becomes must not depend on its position.
        """
        position = step.to(torch.float64)
        factor = SCHEDULES[self.kind](((position - self.warmup) / self._decay_steps(step, length)).clamp(0, 1))
        if self.warmup:
            factor = torch.where(position < self.warmup, (position + 1) / self.warmup, factor)
        return factor

    def _decay_steps(self, step: Tensor, length: Tensor | None) -> Tensor | int:
        """Of the least budget that holds the update after `step` updates: float64, as `step`."""
        if length is not None:
            return (length.to(torch.float64) - self.warmup).clamp(min=1)
        if len(self.budgets) == 1:
            return max(self.total_steps - self.warmup, 1)
        ends = torch.tensor(self.budgets, dtype=torch.float64, device=step.device)
        which = (step[..., None] >= ends[:-1]).sum(dim=-1)
        return (ends[which] - self.warmup).clamp(min=1)
