"""Which step a fit takes. Every step is a twin of the plain one: the same functions, faster.

| step   | device | field          | signal                        | optimiser                                         |
| plain  | any    | any            | any                           | any                                               |
| torch  | CPU or | MLP with sines | mean squared error at points  | Adam and ESGD in place; for others the gradient   |
|        | CUDA   |                |                               | and the Hessian-vector product without autograd   |
| native | CPU    | MLP with sines | mean squared error at points  | Adam and ESGD in C++; for others the gradient and |
|        |        |                |                               | the Hessian-vector product, the update in torch   |
| fused  | NVIDIA | MLP with sines | likewise                      | likewise, in Triton; auto takes it up to width 64 |
|        | GPU    | of some shapes |                               |                                                   |
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from nfscale.engine import fused, fused_trial, handwritten, native
from nfscale.engine.step import plain_apply, plain_gradient, plain_gradient_and_hvp
from nfscale.engine.updates import knows
from nfscale.fields import Field
from nfscale.optim import Optimizer, Solver
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

StepName = Literal["auto", "plain", "torch", "native", "fused"]


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
    gradient_and_hvp: Callable[[Field, Signal, Tensor, Samples, Tensor], tuple[Tensor, Tensor, Tensor]] = (
        plain_gradient_and_hvp
    )
    """Losses [F], gradients [F, P] and Hessian-vector products [F, P] of rows and probes [F, P]."""


PLAIN = Step("plain", plain_gradient, plain_apply)


def chosen(name: StepName, device: torch.device, field: Field, signal: Signal, optimizer: Optimizer | Solver) -> Step:
    """The step of this name, or for "auto" the fastest that serves the combination.

    Raises:
        ValueError: if the named step does not serve it, saying why.
    """
    if name not in get_args(StepName):
        raise ValueError(f"unknown step {name!r}; known steps: {', '.join(get_args(StepName))}")
    for twin_name, twin in _TWINS.items():
        if name not in ("auto", twin_name):
            continue
        found = twin(device, field, signal, optimizer, name == "auto")
        if isinstance(found, Step):
            return found
        if name == twin_name:
            raise ValueError(f"step={name!r} cannot be taken: {found}; use step='auto' or 'plain'")
    return PLAIN


def _native(
    device: torch.device, field: Field, signal: Signal, optimizer: Optimizer | Solver, by_itself: bool
) -> Step | str | None:
    if why := native.refusal(device, field, signal):
        return why
    if why := native.unavailable():
        return _missed("native", why, by_itself)
    advance = native.native_steps if knows(optimizer, all_of_them=True) else None
    return Step("native", native.native_gradient, native.native_apply, advance, native.native_gradient_and_hvp)


def _fused(
    device: torch.device, field: Field, signal: Signal, optimizer: Optimizer | Solver, by_itself: bool
) -> Step | str | None:
    if by_itself and (device.type != "cuda" or not fused.suits(field)):
        return None
    if by_itself and isinstance(optimizer, Solver):
        return None  # a line search compares losses more finely than float16 products tell them apart
    if why := fused.refusal(device, field, signal):
        return why
    if why := fused.unavailable(device):
        return _missed("fused", why, by_itself)
    if by_itself and (why := fused_trial.disagreement(device, field, signal)):
        return _missed("fused", why, by_itself)
    advance = fused.fused_steps if knows(optimizer) else None
    with_hvp = fused.fused_gradient_and_hvp if fused.has_curvature(field) else handwritten.handwritten_gradient_and_hvp
    return Step("fused", fused.fused_gradient, plain_apply, advance, with_hvp)


def _torch(
    device: torch.device, field: Field, signal: Signal, optimizer: Optimizer | Solver, by_itself: bool
) -> Step | str | None:
    if why := handwritten.refusal(device, field, signal):
        return why
    return Step(
        "torch",
        handwritten.handwritten_gradient,
        handwritten.handwritten_apply,
        handwritten.handwritten_steps if handwritten.knows(optimizer) else None,
        handwritten.handwritten_gradient_and_hvp,
    )


def _missed(name: str, why: str, by_itself: bool) -> str:
    if by_itself:
        warn_once(name, why)
    return why


@lru_cache
def warn_once(name: str, reason: str) -> None:
    warnings.warn(f"the {name} step is not available, torch's runs and takes longer: {reason}", stacklevel=6)


_TWINS = {"native": _native, "fused": _fused, "torch": _torch}
"""The fastest first: a step, or why it cannot be taken. `by_itself`: it was not asked for by name."""
