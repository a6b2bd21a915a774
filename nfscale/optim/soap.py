"""SOAP (Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025): Adam in Shampoo's eigenbasis.

L and R are running means of G G^T and G^T G, Q_L and Q_R their eigenvectors. The second moment of Adam is that of
Q_L^T G Q_R; the first moment stays in the weights' own coordinates and is turned there for the step (algorithm 3).
Every `update_every` steps of a field the basis follows its factors, by one power iteration and a QR decomposition
(algorithm 4) or by eigenvectors anew. Vectors have no basis: that is Adam.

Sides longer than `max_factor` have no basis; the basis vectors are put in the order of their eigenvalues before a power
iteration, and the second moment with them: both as in the released code.

Difference from it: the first gradient, which gives the first basis, enters the moments, and the first step is Adam's;
theirs takes the basis and does not move. In the basis of its own gradient, all but the diagonal of that gradient is
rounding, and Adam would make full steps of it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Extra, Need, State, began_at_zero, map_params, per_field, step_size, times
from nfscale.optim.matrices import SIDES, as_matrix, eigen, is_matrix, products, zero_factors
from nfscale.optim.schedules import Schedule


@dataclass(frozen=True)
class SOAP:
    """Adam of gradients that are turned into the eigenbasis of their own second moments."""

    learning_rate: float
    schedule: Schedule
    update_every: int = 10
    beta1: float = 0.95
    beta2: float = 0.95
    factor_beta: float = 0.95
    """Of the running means of G G^T and G^T G."""
    epsilon: float = 1e-8
    method: Literal["qr", "eigh"] = "qr"
    """How the basis follows its factors: one power iteration, or eigenvectors anew, which cost several times more."""
    max_factor: int = 512
    """Sides longer than this keep the coordinates of the weights."""

    needs: ClassVar[frozenset[Need]] = frozenset({"cadence"})
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.update_every < 1:
            raise ValueError(f"update_every is at least 1, got {self.update_every}")
        if self.method not in ("qr", "eigh"):
            raise ValueError(f"unknown method {self.method!r}; known: qr, eigh")

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """0.064 / width, halved at 64 samples per step and fewer: Adam's rule but for weight_scale.

        Evidence: 4 to 8 photograph tiles of 64 x 64, 160 to 200 steps of 256 samples with cosine decay, weight_scale
        1.5, by the median: 32.8 dB at width 32 (Adam 32.6), 38.9 at 64 (37.1), 44.1 at 128 (41.7); 35.5 at 64 with 1.5
        times the rate. At weight_scale 2 this rate reaches 32.9 and half of it 27.7 (Adam 33.8 and 32.3), with some
        tile at 19 and 17: it is no method for that. With 64 samples, 31.0 (Adam 31.7).
        """
        rate = 0.064 / width
        return rate / 2 if samples <= 64 else rate

    def init(self, params: Params) -> State:
        return {
            "mean": map_params(torch.zeros_like, params),
            "square": map_params(torch.zeros_like, params),
            "factors": zero_factors(params, self.max_factor),
            "bases": zero_factors(params, self.max_factor),
        }

    def wants_curvature(self, step: Tensor) -> Tensor:
        return torch.zeros_like(step, dtype=torch.bool)

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        for side in SIDES:
            for name, factor in state["factors"][side].items():
                factor.mul_(self.factor_beta)
                factor.add_(products(as_matrix(grads[name]), side), alpha=1 - self.factor_beta)
        # An eigendecomposition waits for the device anyway; here it is asked once every `update_every` steps.
        first = extra.step == 0 if extra.refresh and bool((extra.step == 0).any()) else None
        if first is not None:
            self._take_bases(state, first)
        updates = self._steps(grads, state, extra, first)
        if extra.refresh:
            self._follow(state, (extra.step % self.update_every == 0) & (extra.step > 0))
        return updates, state

    def _steps(self, grads: Params, state: State, extra: Extra, first: Tensor | None) -> Params:
        count = extra.step + 1
        size = -step_size(self.learning_rate, self.schedule, extra) / began_at_zero(self.beta1, count)
        held, updates = began_at_zero(self.beta2, count), {}
        for name, gradient in grads.items():
            mean = state["mean"][name].mul_(self.beta1).add_(gradient * (1 - self.beta1))
            turned = _turned(gradient, name, state["bases"])
            square = state["square"][name].mul_(self.beta2).add_(turned.square(), alpha=1 - self.beta2)
            denominator = times(square, 1 / held).sqrt_().add_(self.epsilon)
            direction = _turned(mean, name, state["bases"]) / denominator
            direction = _turned(direction, name, state["bases"], back=True)
            if first is not None:
                adams = mean / gradient.abs().add_(self.epsilon)
                direction = torch.where(per_field(first, direction), adams, direction)
            updates[name] = times(direction, size)
        return updates

    def _take_bases(self, state: State, fields: Tensor) -> None:
        """Eigenvectors of the factors of the `fields` that are True [F], those of the largest eigenvalues first."""
        for side, bases in state["bases"].items():
            for name, basis in bases.items():
                fresh = eigen(state["factors"][side][name])[1].flip(-1)
                basis.copy_(torch.where(per_field(fields, basis), fresh, basis))

    def _follow(self, state: State, fields: Tensor) -> None:
        """The bases of the `fields` that are True [F] follow their factors."""
        if self.method == "eigh":
            return self._take_bases(state, fields)
        for side, bases in state["bases"].items():
            for name, basis in bases.items():
                product = state["factors"][side][name] @ basis
                order = (basis * product).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)
                fresh = torch.linalg.qr(product.gather(-1, order.unsqueeze(-2).expand_as(product)))[0]
                basis.copy_(torch.where(per_field(fields, basis), fresh, basis))
                square = as_matrix(state["square"][name])
                along = order.unsqueeze(-1 if side == "left" else -2).expand_as(square)
                ordered = square.gather(SIDES[side], along)
                square.copy_(torch.where(per_field(fields, square), ordered, square))
        return None


def _turned(tensor: Tensor, name: str, bases: dict[str, dict[str, Tensor]], back: bool = False) -> Tensor:
    """Q_L^T X Q_R, or `back` again Q_L X Q_R^T; what has no basis stays: [F, ...], as given."""
    if not is_matrix(tensor):
        return tensor
    matrix, left, right = as_matrix(tensor), bases["left"].get(name), bases["right"].get(name)
    if left is not None:
        matrix = (left if back else left.mT) @ matrix
    if right is not None:
        matrix = matrix @ (right.mT if back else right)
    return matrix.view_as(tensor)
