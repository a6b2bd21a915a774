"""What optimisers share that divide momentum by a diagonal of the field's own curvature, from its own probes.

A probe is a product Hv with independent signs v, taken every `update_every` steps of the field. What is made of it,
and what the momentum is divided by, is said by `esgd_max`, `jacobi` and `adahessian`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Extra, Need, State, began_at_zero, map_params, per_field, step_size, times
from nfscale.optim.esgd import mean_of
from nfscale.optim.schedules import Schedule


@dataclass(frozen=True)
class OwnDiagonal(ABC):
    """Momentum m <- beta1 m + (1 - beta1) g, corrected for its start at zero, over `denominator`."""

    learning_rate: float
    schedule: Schedule
    update_every: int = 10
    beta1: float = 0.9

    needs: ClassVar[frozenset[Need]] = frozenset({"hv"})
    elementwise: ClassVar[bool] = True
    default_warmup: ClassVar[int] = 40
    """The first diagonal comes from one probe, and its first step overshoots, as with ESGD."""

    def __post_init__(self) -> None:
        if self.update_every < 1:
            raise ValueError(f"update_every is at least 1, got {self.update_every}")

    @abstractmethod
    def observe(self, state: State, hv: Params, probe: Params, fields: Tensor) -> None:
        """Take in one probe of each of the `fields` that are True [F]: `state["curvature"]` moves in place."""

    @abstractmethod
    def denominator(self, state: State) -> Params:
        """What the momentum is divided by."""

    def init(self, params: Params) -> State:
        first = next(iter(params.values()))
        return {
            "momentum": map_params(torch.zeros_like, params),
            "curvature": map_params(torch.zeros_like, params),
            "probes": torch.zeros(first.shape[0], dtype=torch.int64, device=first.device),
        }

    def wants_curvature(self, step: Tensor) -> Tensor:
        return step % self.update_every == 0

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        if extra.hv is not None and extra.hv_fields is not None and extra.probe is not None:
            self.observe(state, extra.hv, extra.probe, extra.hv_fields)
            state["probes"] += extra.hv_fields
        for name, gradient in grads.items():
            state["momentum"][name].mul_(self.beta1).add_(gradient * (1 - self.beta1))
        denominator, size = self.denominator(state), -step_size(self.learning_rate, self.schedule, extra)
        momentum, held = self.lookahead(state["momentum"], grads, extra.step + 1)
        return {name: times(m, size / held).div_(denominator[name]) for name, m in momentum.items()}, state

    def lookahead(self, momentum: Params, grads: Params, count: Tensor) -> tuple[Params, Tensor]:
        """The momentum that is used, and what it holds of `count` gradients [F]: as it is."""
        return momentum, began_at_zero(self.beta1, count)


def blend(mean: Params, values: Params, beta: float, fields: Tensor) -> None:
    """One more value into running means, in place; only for the `fields` that are True [F]."""
    for name, value in values.items():
        weight = per_field(fields, value).to(value.dtype) * (1 - beta)
        mean[name].add_((value - mean[name]) * weight)


def unbiased(mean: Params, beta: float, count: Tensor) -> Params:
    """Running means that began at zero `count` values ago [F], corrected for it."""
    held = began_at_zero(beta, count)
    return map_params(lambda m: times(m, 1 / held), mean)


def damped(diagonal: Params, damping: float) -> Params:
    """A diagonal plus a fraction of its mean over the params of a field."""
    floor = damping * mean_of(diagonal)
    return map_params(lambda d: d + per_field(floor, d), diagonal)
