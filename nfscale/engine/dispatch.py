"""Which step a fit takes. Every step is a twin of the plain one: the same functions, faster.

| step   | device | field          | signal                        | optimiser                                         |
| plain  | any    | any            | any                           | any                                               |
| native | CPU    | MLP with sines | mean squared error at points  | Adam and ESGD with shared curvature in C++; for   |
|        |        |                |                               | others the gradient in C++, the update in torch   |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nfscale.engine import native
from nfscale.engine.step import plain_apply, plain_gradient
from nfscale.fields import Field
from nfscale.optim import Optimizer
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

StepName = Literal["auto", "plain", "native"]


@dataclass(frozen=True)
class Step:
    """What a batch calls."""

    name: str
    gradient: Callable[[Field, Signal, Tensor, Samples], tuple[Tensor, Tensor]]
    """Losses [F] and gradients [F, P] of rows [F, P]."""
    apply: Callable[[Field, Tensor], Apply]
    """Fields with these rows [F, P] as a function of coordinates, for measurements."""
    advance: Callable[..., None] | None = None
    """All steps between two checks in one call, see `native.native_steps`; None: one by one, with `gradient`."""


PLAIN = Step("plain", plain_gradient, plain_apply)


def chosen(name: StepName, device: torch.device, field: Field, signal: Signal, optimizer: Optimizer) -> Step:
    """The step of this name, or for "auto" the fastest that serves the combination.

    Raises:
        ValueError: if the named step does not serve it, saying why.
    """
    if name == "plain":
        return PLAIN
    if name not in ("auto", "native"):
        raise ValueError(f"unknown step {name!r}; known steps: auto, plain, native")
    why = native.refusal(device, field, signal)
    if why is None and (why := native.unavailable()) is not None and name == "auto":
        native.warn_once(why)
    if why is None:
        advance = native.native_steps if native.knows(optimizer) else None
        return Step("native", native.native_gradient, native.native_apply, advance)
    if name == "native":
        raise ValueError(f"step='native' cannot be taken: {why}; use step='auto' or 'plain'")
    return PLAIN
