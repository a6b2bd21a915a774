"""What an optimiser needs for many updates at once, as tensors: for steps that take all of them in one call."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim import ESGD, Adam, Optimizer, Scaled, Solver
from nfscale.optim.base import State

if TYPE_CHECKING:
    from nfscale.engine.calibrate import Calibration  # which takes a step itself


@dataclass(frozen=True)
class Updates:
    """The next `count` updates of F fields: of Adam; where there is no `second` moment, of ESGD with shared curvature;
    where there are `probes`, of ESGD with each field's own."""

    first: Tensor
    """float32 [F, P], the optimiser's own state: it moves."""
    second: Tensor | None
    """Likewise."""
    step_size: Tensor
    """float32 [F, count]."""
    correction: Tensor
    """float32 [F, count]: of the second moment's root, or of the momentum."""
    longest: Tensor | None = None
    """float32 [F, count]: bound on the root mean square of a step."""
    diagonal_row: Tensor | None = None
    """int64 [F, count]: of `inverse_diagonal`."""
    inverse_diagonal: Tensor | None = None
    """float32 [U, P]: 1 / (D + damping) of every row of the calibration."""
    probes: Tensor | None = None
    """int64 [F]: how many `second`, the running mean of (Hv)^2, is made of; it moves."""
    factors: Tensor | None = None
    """float32 [P]: of each param on the step size of Adam."""
    beta1: float = 0.0
    beta2: float = 0.0
    epsilon: float = 0.0
    damping: float = 0.0
    update_every: int = 1


def knows(optimizer: Optimizer | Solver, all_of_them: bool = False) -> bool:
    """Whether there are `Updates` of this optimiser; a subclass may do something else.

    Args:
        all_of_them: also such as have `probes` or `factors`.
    """
    if type(optimizer) is Scaled:
        return all_of_them and type(optimizer.inner) is Adam
    return type(optimizer) is Adam or (type(optimizer) is ESGD and (all_of_them or optimizer.curvature == "shared"))


def updates_of(
    optimizer: Optimizer,
    calibration: "Calibration | None",
    state: State,
    steps: Tensor,
    rate: Tensor,
    count: int,
    lengths: Tensor | None = None,
) -> Updates:
    """The next `count` updates of fields that have had `steps` int64 [F], at `rate` float32 [F]; `lengths`: `Extra`."""
    if isinstance(optimizer, Scaled):
        inner = updates_of(optimizer.inner, calibration, state, steps, rate, count, lengths)
        return replace(inner, factors=optimizer.of(inner.first.shape[1]))
    index = torch.arange(count, device=steps.device)
    every, rate = steps[:, None] + index, rate[:, None]
    lengths = None if lengths is None else lengths[:, None]
    if isinstance(optimizer, Adam):
        step_size, correction = optimizer.step_sizes(every, rate, lengths)
        return Updates(
            first=_only(state["mean"]),
            second=_only(state["square"]),
            step_size=step_size,
            correction=correction,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            epsilon=optimizer.epsilon,
        )
    assert isinstance(optimizer, ESGD), "the dispatcher leaves other optimisers to torch"
    step_size, correction = optimizer.step_size(every, rate, lengths), optimizer.correction(every)
    if optimizer.curvature == "per_field":
        return Updates(
            first=_only(state["momentum"]),
            second=_only(state["square"]),
            step_size=step_size,
            correction=correction,
            probes=state["probes"],
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            damping=optimizer.damping,
            update_every=optimizer.update_every,
        )
    assert calibration is not None, "fit() refuses an optimiser that lacks its calibration"
    # As in `Batch.advance`, curvature is looked up every so many steps since the check and holds for the others.
    row = calibration.row_at(every - index % optimizer.update_every)
    return Updates(
        first=_only(state["momentum"]),
        second=None,
        step_size=step_size,
        correction=correction,
        longest=None if optimizer.clip is None else optimizer.clip * calibration.step_rms[row],
        diagonal_row=row,
        inverse_diagonal=_only(optimizer.damped({"rows": calibration.diagonal})).reciprocal(),
        beta1=optimizer.beta1,
    )


def _only(params: Params) -> Tensor:
    (tensor,) = params.values()
    return tensor
