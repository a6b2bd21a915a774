"""Which step a fit takes. Every step is a twin of the plain one: the same functions, faster.

| step   | device | field          | signal                        | optimiser                                         |
| plain  | any    | any            | any                           | any                                               |
| torch  | CPU or | MLP with sines | mean squared error at points  | Adam and ESGD in place; for others the gradient   |
|        | CUDA   |                |                               | and the Hessian-vector product without autograd   |
| native | CPU    | MLP with sines | mean squared error at points  | Adam and ESGD in C++; for others the gradient and |
|        |        |                |                               | the Hessian-vector product, the update in torch   |
| fused  | NVIDIA | MLP with sines | likewise                      | likewise, in Triton; auto takes it up to width 64 |
|        | GPU    | of some shapes |                               |                                                   |

Products between hidden layers are in the precision that is asked for; first layers, weights, what optimisers keep and
what checks measure are float32 in all of them:

| precision | products                                 | steps                                                      |
| auto      | float16 in the fused step up to weight   | all                                                        |
|           | scale 3, float32 otherwise               |                                                            |
| float32   | float32                                  | all                                                        |
| tf32      | float32 of operands cut to 11 bits       | torch, on CUDA                                             |
| float16   | float16 operands, float32 sums           | fused, torch on CUDA (float32 for Hessian-vector products) |
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nfscale.engine import fused, fused_trial, handwritten, native
from nfscale.engine.recorded import Recorded
from nfscale.engine.step import plain_apply, plain_gradient, plain_gradient_and_hvp
from nfscale.engine.updates import knows
from nfscale.fields import Field
from nfscale.optim import Optimizer, Solver
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

StepName = Literal["auto", "plain", "torch", "native", "fused"]
PrecisionName = Literal["auto", "float32", "tf32", "float16"]
_OF_A_GPU = ("tf32", "float16")
_FUSED: dict[PrecisionName, fused.Precision | None] = {"auto": None, "float32": "ieee", "float16": "fp16"}


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


def chosen(
    name: StepName,
    device: torch.device,
    field: Field,
    signal: Signal,
    optimizer: Optimizer | Solver,
    precision: PrecisionName = "auto",
) -> Step:
    """The step of this name, or for "auto" the fastest that serves the combination.

    Raises:
        ValueError: if the named step does not serve it, or none has the precision, saying why.
    """
    for what, given, known in (("step", name, StepName), ("precision", precision, PrecisionName)):
        if given not in get_args(known):
            raise ValueError(f"unknown {what} {given!r}; known {what}s: {', '.join(get_args(known))}")
    if precision in _OF_A_GPU and (why := _too_coarse(device, optimizer)):
        raise ValueError(f"precision={precision!r} cannot be taken: {why}; use precision='auto' or 'float32'")
    why = "a plain step has products in float32"
    for twin_name, twin in _TWINS.items():
        if name not in ("auto", twin_name):
            continue
        found = twin(device, field, signal, optimizer, precision, name == "auto")
        if isinstance(found, Step):
            return found
        if name == twin_name:
            raise ValueError(f"step={name!r} cannot be taken: {found}; use step='auto' or 'plain'")
        why = found or why
    if precision in _OF_A_GPU:
        raise ValueError(f"precision={precision!r} cannot be taken: {why}; use precision='auto' or 'float32'")
    return PLAIN


def _too_coarse(device: torch.device, optimizer: Optimizer | Solver) -> str | None:
    """Why no step has less than float32 products here, or None."""
    if device.type != "cuda":
        return f"it is for an NVIDIA GPU, not for {device}"
    if isinstance(optimizer, Solver):
        return f"{type(optimizer).__name__} compares losses more finely than such products tell them apart"
    return None


def _native(
    device: torch.device,
    field: Field,
    signal: Signal,
    optimizer: Optimizer | Solver,
    precision: PrecisionName,
    by_itself: bool,
) -> Step | str | None:
    if why := native.refusal(device, field, signal):
        return why
    if why := native.unavailable():
        return _missed("native", why, by_itself)
    advance = native.native_steps if knows(optimizer, all_of_them=True) else None
    return Step("native", native.native_gradient, native.native_apply, advance, native.native_gradient_and_hvp)


def _fused(
    device: torch.device,
    field: Field,
    signal: Signal,
    optimizer: Optimizer | Solver,
    precision: PrecisionName,
    by_itself: bool,
) -> Step | str | None:
    if precision not in _FUSED:
        return f"its products are float16 or float32, not {precision}"
    products = _FUSED[precision]
    if by_itself and (device.type != "cuda" or not fused.suits(field)):
        return None
    if by_itself and isinstance(optimizer, Solver):
        return None  # a line search compares losses more finely than float16 products tell them apart
    if why := fused.refusal(device, field, signal, products):
        return why
    if why := fused.unavailable(device):
        return _missed("fused", why, by_itself)
    if by_itself and (why := fused_trial.disagreement(device, field, signal, products)):
        return _missed("fused", why, by_itself)
    with_hvp: Any = handwritten.handwritten_gradient_and_hvp
    if fused.has_curvature(field):
        with_hvp = _in(products, fused.fused_gradient_and_hvp)
    advance = _in(products, fused.fused_steps) if knows(optimizer) else None
    return Step("fused", _in(products, fused.fused_gradient), plain_apply, advance, with_hvp)


def _torch(
    device: torch.device,
    field: Field,
    signal: Signal,
    optimizer: Optimizer | Solver,
    precision: PrecisionName,
    by_itself: bool,
) -> Step | str | None:
    if why := handwritten.refusal(device, field, signal):
        return why
    products: Any = precision if precision in _OF_A_GPU else None
    advance: Callable[..., None] | None = None
    if handwritten.knows(optimizer) and not (products == "float16" and "hv" in optimizer.needs):
        on_cuda = device.type == "cuda"
        advance = Recorded(products or "float32") if on_cuda else handwritten.handwritten_steps
    return Step(
        "torch",
        _in(products, handwritten.handwritten_gradient),
        handwritten.handwritten_apply,
        advance,
        _in(products if products == "tf32" else None, handwritten.handwritten_gradient_and_hvp),
    )


def _in(precision: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with products in a precision, if it is not the function's own."""
    return function if precision is None else partial(function, precision=precision)


def _missed(name: str, why: str, by_itself: bool) -> str:
    if by_itself:
        warn_once(name, why)
    return why


@lru_cache
def warn_once(name: str, reason: str) -> None:
    warnings.warn(f"the {name} step is not available, torch's runs and takes longer: {reason}", stacklevel=6)


_TWINS = {"native": _native, "fused": _fused, "torch": _torch}
"""The fastest first: a step, or why it cannot be taken. `by_itself`: it was not asked for by name."""
