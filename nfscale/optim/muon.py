"""Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024): orthogonalised momentum.

The momentum of a hidden weight matrix, U S V^T, is replaced by about U V^T, by five Newton-Schulz iterations of a
quintic; all its directions then move alike. For neural fields: "Muon for INRs" (arXiv 2512.14366), which gives the
first and the last layer and the biases to Adam, as here.

Hidden are the params `layers.<i>.weight` where i is neither the smallest nor the largest; all else goes to Adam. (In
multiplicative filter networks layer 0 is thus Adam's, although filters come before it.) Tensors with more axes are
several matrices, each orthogonalised by itself.

Differences from the released code: the iterations run in the params' dtype, theirs in bfloat16; `momentum` is 0.9,
theirs 0.95 (on photograph tiles at rates of 0.001, 0.002 and 0.003: 37.7, 39.7 and 39.6 dB; with 0.95: 36.8, 36.4
and 34.8).
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.adam import Adam
from nfscale.optim.base import Extra, Need, State, map_params, step_size, times
from nfscale.optim.schedules import Schedule

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: the steepest at zero, so that five iterations do
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class Muon:
    """Nesterov's momentum of hidden matrices, orthogonalised; Adam for the other params."""

    learning_rate: float
    """Of the hidden matrices: with singular values near 1, a step changes each direction by so much."""
    schedule: Schedule
    momentum: float = 0.9
    nesterov: bool = True
    adam_learning_rate: float = 1e-3
    """Of the other params. That of the authors' code, and Adam's own rule at width 64 (it goes with 1 / width)."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    needs: ClassVar[frozenset[Need]] = frozenset()
    elementwise: ClassVar[bool] = False

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """0.002 whatever the width, the weight scale and the samples per step; of the hidden matrices alone.

        Evidence: 8 photograph tiles of 64 x 64, 200 steps of 256 samples with cosine decay, width 64, weight_scale 1.5:
        0.0007, 0.001, 0.0015, 0.002 and 0.003 reach medians of 36.6, 37.7, 38.6, 39.7 and 39.6 dB (Adam 37.1). It was
        best of 0.0005 to 0.003 at width 128, 1.4 dB below 0.003 at width 32, better than 0.001 at weight_scale 2, and
        0.4 dB below it with 64 samples. Far below the 0.1 of the code for "Muon for INRs", which fits 5 x 300 units in
        5,000 iterations.
        """
        return 0.002

    @cached_property
    def adam(self) -> Adam:
        """Of the params that are not hidden matrices."""
        return Adam(self.adam_learning_rate, self.schedule, self.beta1, self.beta2, self.epsilon)

    def init(self, params: Params) -> State:
        hidden, others = _parted(params)
        return {"momentum": map_params(torch.zeros_like, hidden), "adam": self.adam.init(others)}

    def wants_curvature(self, step: Tensor) -> Tensor:
        return torch.zeros_like(step, dtype=torch.bool)

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        hidden, others = _parted(grads)
        updates, _ = self.adam.update(others, state["adam"], params, extra)
        size = -step_size(self.learning_rate, self.schedule, extra)
        for name, gradient in hidden.items():
            momentum = state["momentum"][name].mul_(self.momentum).add_(gradient, alpha=1 - self.momentum)
            direction = gradient.lerp(momentum, self.momentum) if self.nesterov else momentum
            rows, columns = gradient.shape[-2:]
            updates[name] = times(orthogonalised(direction), size * math.sqrt(max(1, rows / columns)))
        return {name: updates[name] for name in grads}, state

    def rates(self, params: Params) -> dict[str, float]:
        """The learning rate of each tensor, by name."""
        hidden = hidden_names(params)
        return {name: self.learning_rate if name in hidden else self.adam_learning_rate for name in params}


def hidden_names(params: Params) -> list[str]:
    """The weight matrices of layers that are neither the first nor the last."""
    layers = {int(found[1]): name for name in params if (found := re.fullmatch(r"layers\.(\d+)\.weight", name))}
    return [layers[index] for index in sorted(layers)[1:-1]]


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of matrices U S V^T: [..., n, m] -> [..., n, m]; singular values come within 0.7 and 1.2."""
    norm = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=_SMALLEST_NORM)
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices) / norm
    first, third, fifth = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if is_tall else x


def _parted(params: Params) -> tuple[Params, Params]:
    """Hidden matrices, and all else."""
    names = hidden_names(params)
    others = {name: tensor for name, tensor in params.items() if name not in names}
    return {name: params[name] for name in names}, others
