"""ESGD: stochastic gradient descent preconditioned by the equilibrated diagonal of the Hessian.

Dauphin, de Vries & Bengio, "Equilibrated adaptive learning rates" (NeurIPS 2015); for neural fields:
Chng, Saratchandran & Lucey, "Preconditioners for the Stochastic Training of Neural Fields" (CVPR 2025).
With probes v of independent signs, E[(Hv)_i^2] = ||H_i||^2, so D_i = sqrt(E[(Hv)_i^2]) is the norm of
row i of the Hessian, and a step is m / D with momentum m.

Differences from the code released with the CVPR paper, each on purpose:

- the bias of the running mean of (Hv)^2 is corrected by the number of probes taken, not of steps;
- damping is relative to the mean of the diagonal, so that scaling the loss changes nothing (theirs is
  an absolute 1e-4);
- a step is no longer than those that are typical for the job, see `ESGD.clip`;
- the learning rate warms up: the first diagonal comes from few probes, and the first step overshoots.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import Extra, Need, State, map_params, per_field
from nfscale.optim.schedules import Schedule


@dataclass(frozen=True)
class ESGD:
    """Momentum over an equilibrated diagonal that is the field's own or shared by all fields.

    `curvature="shared"`: the diagonal comes from a calibration of the job (`Extra.diagonal`); a field
    pays nothing for it. `curvature="per_field"`: one probe of the field's own every `update_every` steps.
    """

    learning_rate: float
    schedule: Schedule
    curvature: Literal["shared", "per_field"] = "shared"
    update_every: int = 10
    beta1: float = 0.9
    beta2: float = 0.9
    damping: float = 0.01
    """Added to the diagonal, as a fraction of its mean over the params of a field."""
    clip: float | None = 1.0
    """Longest step of a field, as a multiple of the typical length at that step of the calibration (root mean
    square over params). Without it one photograph tile in twenty, with residuals far above the others', is
    thrown off by a diagonal that is right for the rest; with it the median rises too. With curvature="per_field"
    there is no calibration, and steps are not bounded."""

    calibration_data: int = 32
    """Data whose mean is the shared curvature: M probes leave an error of about 0.7 / sqrt(M) per weight."""

    elementwise: ClassVar[bool] = True
    default_warmup: ClassVar[int] = 40

    def __post_init__(self) -> None:
        for name in ("update_every", "calibration_data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip is above 0, or null for none, got {self.clip}")

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """1.0 whatever the width, the weight scale and the samples per step.

        A step of Hessian-preconditioned descent needs no rescaling when the loss or the params are rescaled.
        Evidence: of 0.6, 1.0 and 1.5 it was best by the median of 32 photograph tiles at width 64, weight_scale
        1.5, 256 samples, with a shared diagonal and clipped steps; other widths were not swept.
        """
        return 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"diagonal"} if self.curvature == "shared" else {"hv"})

    def init(self, params: Params) -> State:
        state: State = {"momentum": map_params(torch.zeros_like, params)}
        if self.curvature == "per_field":
            first = next(iter(params.values()))
            state["square"] = map_params(torch.zeros_like, params)
            state["probes"] = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
        return state

    def wants_curvature(self, step: Tensor) -> Tensor:
        if self.curvature == "shared":
            return torch.zeros_like(step, dtype=torch.bool)
        return step % self.update_every == 0

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        if self.curvature == "per_field":
            diagonal = self._own_diagonal(state, extra)
        elif extra.diagonal is None:
            raise ValueError("ESGD with curvature='shared' needs a calibration; pass one, or curvature='per_field'")
        else:
            diagonal = extra.diagonal
        direction = self.direction(grads, state, diagonal, extra.step)
        return self.scaled(direction, extra.step_rms, extra), state

    def direction(self, grads: Params, state: State, diagonal: Params, step: Tensor) -> Params:
        """The preconditioned momentum m / (D + damping), corrected for a momentum that began at zero."""
        damped, correction = self.damped(diagonal), self.correction(step)
        direction = {}
        for name, gradient in grads.items():
            momentum = state["momentum"][name]
            momentum.mul_(self.beta1).add_(gradient * (1 - self.beta1))
            direction[name] = momentum / damped[name].mul_(per_field(correction, momentum))
        return direction

    def damped(self, diagonal: Params) -> Params:
        """D + damping, what the momentum is divided by."""
        floor = self.damping * mean_of(diagonal)
        return map_params(lambda d: d + per_field(floor, d), diagonal)

    def correction(self, step: Tensor) -> Tensor:
        """Of a momentum that began at zero, at the update after `step` updates: float32, as `step`."""
        return (1 - self.beta1 ** (step.to(torch.float64) + 1)).to(torch.float32)  # see Schedule.factor

    def step_size(self, step: Tensor, rate: Tensor, length: Tensor | None = None) -> Tensor:
        """Of the update after `step` updates, where nothing bounds it: float32, as `step`."""
        return (self.learning_rate * self.schedule.factor(step, length) * rate).to(torch.float32)

    def scaled(self, direction: Params, typical_rms: Tensor | None, extra: Extra) -> Params:
        """Updates along the direction: the learning rate, and no longer than `clip` typical steps (RMS [F])."""
        step_size = self.step_size(extra.step, extra.rate, extra.length)
        if self.clip is not None and typical_rms is not None:
            step_size = step_size * (self.clip * typical_rms / rms_of(direction)).clamp(max=1)
        return map_params(lambda d: d.mul_(per_field(-step_size, d)), direction)

    def _own_diagonal(self, state: State, extra: Extra) -> Params:
        if extra.hv is not None and extra.hv_fields is not None:
            accumulate(state["square"], extra.hv, self.beta2, extra.hv_fields)
            state["probes"] += extra.hv_fields
        return corrected(state["square"], state["probes"], self.beta2)


def accumulate(square: Params, hv: Params, beta2: float, fields: Tensor | None = None) -> None:
    """One more probe into the running mean of (Hv)^2, in place; only for the `fields` that are True [F]."""
    for name, product in hv.items():
        weight = 1 - beta2 if fields is None else per_field(fields.to(product.dtype) * (1 - beta2), product)
        square[name].add_((product.square() - square[name]) * weight)


def corrected(square: Params, probes: Tensor, beta2: float) -> Params:
    """The equilibrated diagonal sqrt(E[(Hv)^2]), corrected for a mean that began at zero `probes` [F] ago."""
    weight = (1 - beta2 ** probes.to(torch.float64)).to(torch.float32)
    return map_params(lambda s: (s / per_field(weight, s)).sqrt(), square)


def rms_of(params: Params) -> Tensor:
    """Root mean square over all params of a field: {name: [F, ...]} -> [F]."""
    return mean_of(map_params(torch.square, params)).sqrt()


def mean_of(params: Params) -> Tensor:
    """Mean over all params of a field: {name: [F, ...]} -> [F]."""
    total = torch.stack([p.flatten(1).sum(dim=1) for p in params.values()]).sum(dim=0)
    return total / sum(p[0].numel() for p in params.values())
