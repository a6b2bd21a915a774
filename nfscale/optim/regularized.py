"""Two parts that go with any optimiser: clipping of its gradients, and decoupled weight decay.

Clipping bounds the norm of a field's whole gradient (Pascanu, Mikolov & Bengio, ICML 2013), with the numbers of
`torch.nn.utils.clip_grad_norm_` but for its 1e-6. Weight decay is AdamW's (Loshchilov & Hutter, ICLR 2019): w <- w -
rate decay w beside the optimiser's own update, at the rate of the same step.
"""

from dataclasses import dataclass

import torch

from nfscale.layout import Params
from nfscale.optim.base import Extra, SeveralRates, State, map_params, step_size, times
from nfscale.optim.wrapped import Wrapped


@dataclass(frozen=True)
class Regularized(Wrapped):
    """An optimiser with clipped gradients, weights that decay, or both. Steps that know the inner one refuse it."""

    weight_decay: float = 0.0
    """Per unit of the learning rate; of all params, biases included."""
    clip_norm: float | None = None
    """The longest gradient of a field: the root of the sum of squares over all its params."""

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is at least 0, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is above 0, or null for none, got {self.clip_norm}")

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        if self.clip_norm is not None:
            grads = clipped(grads, self.clip_norm)
        updates, state = self.inner.update(grads, state, params, extra)
        if not self.weight_decay:
            return updates, state
        one_for_all = dict.fromkeys(params, self.learning_rate)
        rates = self.inner.rates(params) if isinstance(self.inner, SeveralRates) else one_for_all
        decayed = {}
        for name, update in updates.items():
            size = -self.weight_decay * step_size(rates[name], self.schedule, extra)
            decayed[name] = update + times(params[name], size)
        return decayed, state


def clipped(grads: Params, longest: float) -> Params:
    """Gradients whose norm over all params of a field is at most `longest`."""
    squares = [gradient.flatten(1).square().sum(dim=1) for gradient in grads.values()]
    factor = (longest / torch.stack(squares).sum(dim=0).sqrt()).clamp(max=1)
    return map_params(lambda gradient: times(gradient, factor), grads)
