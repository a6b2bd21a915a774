"""An optimiser with a rate of each param's own, on top of its schedule: as Meta-SGD learns them, see
`nfscale.engine.unrolled` (Li, Zhou, Chen & Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Extra, Need, Optimizer, State
from nfscale.optim.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Scaled:
    """Updates of an optimiser times a factor of each param, which fields share. Fast steps leave them to torch."""

    inner: Optimizer
    factors: Tensor
    """float32 [P], on the CPU: they stay as they are over a run, and so over restarts and resumption."""

    @property
    def learning_rate(self) -> float:
        return self.inner.learning_rate

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs

    @property
    def elementwise(self) -> bool:
        return self.inner.elementwise

    @property
    def update_every(self) -> int:
        return getattr(self.inner, "update_every", 1)

    def init(self, params: Params) -> State:
        return self.inner.init(params)

    def wants_curvature(self, step: Tensor) -> Tensor:
        return self.inner.wants_curvature(step)

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        updates, state = self.inner.update(grads, state, params, extra)
        sizes = [update[0].numel() for update in updates.values()]
        if sum(sizes) != len(self.factors):
            raise ValueError(f"{len(self.factors)} rates cannot be those of fields of {sum(sizes)} weights")
        parts = torch.split(self.factors.to(next(iter(updates.values())).device), sizes)
        return {
            name: update * part.view_as(update[0]) for (name, update), part in zip(updates.items(), parts, strict=True)
        }, state
