"""Shampoo (Gupta, Koren & Singer, ICML 2018): a preconditioner on each side of a weight matrix.

L <- L + G G^T and R <- R + G^T G, and a step is L^(-1/4) G R^(-1/4) (algorithm 1). The roots are taken by batched
eigendecompositions every `update_every` steps of a field. Biases have a diagonal, which is AdaGrad's. A matrix with a
factor on one side only is multiplied by its root of power -1/2.

Differences from the paper, each with the value that undoes it:

- momentum of the gradient, corrected for its start at zero (`beta1=0`);
- the sums forget (`beta2=1`): the loss of a field falls by orders of magnitude, and a sum stays what it was at first;
- damping is relative to the largest eigenvalue, so that scaling the loss changes nothing; theirs is an absolute one;
- the step of each tensor has the length of Adam's (`graft="none"`): Agarwal et al., "Disentangling adaptive gradient
  methods from learning rates" (2020), as in Anil et al., "Scalable second order optimization" (2020).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.adam import Adam
from nfscale.optim.base import Extra, Need, State, began_at_zero, map_params, per_field, step_size, times
from nfscale.optim.matrices import SIDES, as_matrix, eigen, is_matrix, products, zero_factors
from nfscale.optim.schedules import Schedule

_GRAFT_EPSILON = 1e-8  # of the Adam whose length a step has


@dataclass(frozen=True)
class Shampoo:
    """Momentum between inverse fourth roots of the second moments of rows and columns."""

    learning_rate: float
    schedule: Schedule
    update_every: int = 10
    beta1: float = 0.9
    beta2: float = 0.95
    """Of the running means of G G^T and G^T G; 1 for the paper's sums."""
    damping: float = 1e-6
    """Added to the eigenvalues of a factor, as a fraction of the largest."""
    graft: Literal["none", "sgd", "adam"] = "adam"
    """Whose length the step of each tensor has: its own, the momentum's, or Adam's."""
    max_factor: int = 512
    """Sides longer than this have no factor: an eigendecomposition grows with the cube."""

    needs: ClassVar[frozenset[Need]] = frozenset({"cadence"})
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.update_every < 1:
            raise ValueError(f"update_every is at least 1, got {self.update_every}")
        if self.graft not in ("none", "sgd", "adam"):
            raise ValueError(f"unknown graft {self.graft!r}; known: none, sgd, adam")

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """Adam's rule, whose length the steps have with `graft="adam"`; for the other lengths there is no rule.

        Evidence: 4 to 8 photograph tiles of 64 x 64, 160 to 200 steps of 256 samples with cosine decay, weight_scale
        1.5, by the median: 32.9 dB at width 32 (Adam 32.6), 37.9 at 64 (37.1; 36.7 with 1.5 times the rate), 40.4 at
        128 (41.7). At weight_scale 2 31.9 (32.3), and 34.2 with twice the rate (33.8); with 64 samples 31.7 (31.7).
        """
        return Adam.auto_learning_rate(width, weight_scale, samples)

    def init(self, params: Params) -> State:
        state: State = {
            "momentum": map_params(torch.zeros_like, params),
            "factors": zero_factors(params, self.max_factor),
            "roots": zero_factors(params, self.max_factor),
            "diagonal": {n: torch.zeros_like(p) for n, p in params.items() if not is_matrix(p)},
        }
        if self.graft == "adam":
            state["square"] = map_params(torch.zeros_like, params)
        return state

    def wants_curvature(self, step: Tensor) -> Tensor:
        return torch.zeros_like(step, dtype=torch.bool)

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        self._observe(grads, state)
        if extra.refresh:
            self._refresh(state, extra.step)
        size, held = -step_size(self.learning_rate, self.schedule, extra), began_at_zero(self.beta1, extra.step + 1)
        updates = {}
        for name, gradient in grads.items():
            momentum = state["momentum"][name].mul_(self.beta1).add_(gradient * (1 - self.beta1))
            mean = times(momentum, 1 / held)
            direction = self._preconditioned(name, mean, state, extra.step)
            if self.graft != "none":
                length = _norm(self._grafted(name, gradient, mean, state, extra.step))
                direction = times(direction, length / _norm(direction).clamp(min=torch.finfo(direction.dtype).tiny))
            updates[name] = times(direction, size)
        return updates, state

    def _observe(self, grads: Params, state: State) -> None:
        """One more gradient into the moments of rows, columns and vectors."""
        weight = 1.0 if self.beta2 == 1 else 1 - self.beta2
        for side in SIDES:
            for name, factor in state["factors"][side].items():
                factor.mul_(self.beta2).add_(products(as_matrix(grads[name]), side), alpha=weight)
        for name, diagonal in state["diagonal"].items():
            diagonal.mul_(self.beta2).add_(grads[name].square(), alpha=weight)

    def _held(self, step: Tensor) -> Tensor:
        """What the moments hold after the gradient of this step: 1 where they are sums."""
        return torch.ones_like(step, dtype=torch.float64) if self.beta2 == 1 else began_at_zero(self.beta2, step + 1)

    def _refresh(self, state: State, step: Tensor) -> None:
        """The roots of the fields whose turn it is."""
        due, held = step % self.update_every == 0, self._held(step)
        for side, roots in state["roots"].items():
            other = state["roots"]["right" if side == "left" else "left"]
            for name, root in roots.items():
                values, vectors = eigen(times(state["factors"][side][name], 1 / held))
                # Not pow: vectorised, it may round differently at another position of the batch.
                powers = self._damped(values).rsqrt()
                powers = powers.sqrt() if name in other else powers
                fresh = (vectors * powers.unsqueeze(-2)) @ vectors.mT
                root.copy_(torch.where(per_field(due, root), fresh, root))

    def _damped(self, values: Tensor) -> Tensor:
        """Eigenvalues [F, n], none of them zero: those that rounding made negative, too."""
        largest = values.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny / self._least)
        return values.clamp(min=0) + self.damping * largest

    @property
    def _least(self) -> float:
        return max(self.damping, 1e-12)

    def _preconditioned(self, name: str, mean: Tensor, state: State, step: Tensor) -> Tensor:
        if name in state["diagonal"]:
            return mean * self._damped(times(state["diagonal"][name], 1 / self._held(step))).rsqrt()
        matrix = as_matrix(mean)
        if name in state["roots"]["left"]:
            matrix = state["roots"]["left"][name] @ matrix
        if name in state["roots"]["right"]:
            matrix = matrix @ state["roots"]["right"][name]
        return matrix.view_as(mean)

    def _grafted(self, name: str, gradient: Tensor, mean: Tensor, state: State, step: Tensor) -> Tensor:
        """The step of the method whose length is taken."""
        if self.graft == "sgd":
            return mean
        square = state["square"][name].mul_(0.999).add_(gradient.square(), alpha=0.001)
        return mean / times(square, 1 / began_at_zero(0.999, step + 1)).sqrt_().add_(_GRAFT_EPSILON)


def _norm(tensor: Tensor) -> Tensor:
    """Of each field's tensor: [F, ...] -> [F]."""
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1)
