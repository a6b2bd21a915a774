"""Adam (Kingma & Ba, ICLR 2015) over batched params, field by field the numbers of torch.optim.Adam."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Extra, Need, State, map_params, per_field
from nfscale.optim.schedules import Schedule


@dataclass(frozen=True)
class Adam:
    """Bias-corrected Adam with a learning rate per field."""

    learning_rate: float
    schedule: Schedule
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    needs: ClassVar[frozenset[Need]] = frozenset()
    elementwise: ClassVar[bool] = True

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """0.064 / width, halved above weight_scale 1.75 or at 64 samples per step and fewer.

        Evidence: the rate that fitted every regime tried with cosine decay (64 x 64 to 128 x 128 pixels,
        widths 64 and 128, weight_scale 1 to 2, 16 to 4,096 samples). The cliff is sharp: 1.4 to 2 times
        more collapses, which is why fields restart at half the rate.
        """
        rate = 0.064 / width
        if weight_scale > 1.75:
            rate /= 2
        return rate / 2 if samples <= 64 else rate

    def init(self, params: Params) -> State:
        return {"mean": map_params(torch.zeros_like, params), "square": map_params(torch.zeros_like, params)}

    def step_sizes(self, step: Tensor, rate: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Size of the update after `step` updates, and the correction of the root of the square: float32, as `step`."""
        count = step.to(torch.float64) + 1  # float64: see Schedule.factor
        size = self.learning_rate * self.schedule.factor(step, length) * rate
        step_size = (size / (1 - self.beta1**count)).to(torch.float32)
        return step_size, (1 - self.beta2**count).sqrt().to(torch.float32)

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        step_size, square_correction = self.step_sizes(extra.step, extra.rate, extra.length)
        updates = {}
        for name, gradient in grads.items():
            mean, square = state["mean"][name], state["square"][name]
            mean.mul_(self.beta1).add_(gradient * (1 - self.beta1))
            square.mul_(self.beta2).add_(gradient.square().mul_(1 - self.beta2))
            denominator = square.sqrt().div_(per_field(square_correction, square)).add_(self.epsilon)
            updates[name] = mean.div(denominator).mul_(per_field(-step_size, mean))
        return updates, state

    def wants_curvature(self, step: Tensor) -> Tensor:
        return torch.zeros_like(step, dtype=torch.bool)
