"""An optimiser with a rate of each param's own, on top of its schedule: as Meta-SGD learns them, see
`nfscale.engine.unrolled` (Li, Zhou, Chen & Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Extra, State
from nfscale.optim.wrapped import Wrapped


@dataclass(frozen=True, eq=False)
class Scaled(Wrapped):
    """Updates of an optimiser times a factor of each param, which fields share. The native step takes those of Adam
    itself, other fast steps leave them to torch."""

    factors: Tensor
    """float32 [P], on the CPU: they stay as they are over a run, and so over restarts and resumption."""

    def of(self, weights: int) -> Tensor:
        """The factors of fields with so many weights.

        Raises:
            ValueError: if they are of others.
        """
        if weights != len(self.factors):
            raise ValueError(f"{len(self.factors)} rates cannot be those of fields of {weights} weights")
        return self.factors

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        updates, state = self.inner.update(grads, state, params, extra)
        sizes = [update[0].numel() for update in updates.values()]
        parts = torch.split(self.of(sum(sizes)).to(next(iter(updates.values())).device), sizes)
        return {
            name: update * part.view_as(update[0]) for (name, update), part in zip(updates.items(), parts, strict=True)
        }, state
