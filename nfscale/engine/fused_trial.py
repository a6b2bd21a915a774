"""Before the fused step is taken by itself on a device, it is tried there beside the plain step.

What compiles for one GPU and one version of Triton may fail or, worse, be wrong on another; a few steps of a few fields
tell, once in a process, for the price of compiling kernels that are needed anyway.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nfscale.engine import fused
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import plain_gradient
from nfscale.fields import Field
from nfscale.optim import Adam, Extra, Schedule
from nfscale.rng import Stream, as_tensor, uniform
from nfscale.signals import Samples, Signal

_FIELDS, _SAMPLES, _STEPS = 3, 300, 3
_ADAM: Any = Adam(1e-4, Schedule("constant"))
_GRADIENT_BOUND = 2e-2  # relative; float16 products err by up to 3e-3
_STEP_BOUND = 0.1  # relative; first steps of Adam follow signs, and those of small gradients flip


@lru_cache
def disagreement(
    device: torch.device, field: Field, signal: Signal, precision: fused.Precision | None = None
) -> str | None:
    """Why the fused step is not to be trusted with such fields on this device, or None."""
    seeds = as_tensor(list(range(_FIELDS)), device)
    rows = field.layout.ravel(field.init(seeds))
    drawn = uniform(seeds, Stream.SAMPLING, 0, _SAMPLES * (signal.dimensions + signal.channels))
    coordinates, values = (drawn * 2 - 1).split([_SAMPLES * signal.dimensions, _SAMPLES * signal.channels], dim=1)
    samples = Samples(
        coordinates.reshape(_FIELDS, _SAMPLES, -1).contiguous(), values.reshape(_FIELDS, _SAMPLES, -1).contiguous() / 2
    )
    try:
        _, gradients = fused.fused_gradient(field, signal, rows, samples, precision)
        once, twice = (_fused_steps(field, rows, samples, seeds, precision) for _ in range(2))
    except Exception as error:
        return f"on this device it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not torch.equal(once, twice):
        return "on this device two runs of it differ"
    _, expected = plain_gradient(field, signal, rows, samples)
    moved = _plain_steps(field, signal, rows, samples) - rows
    for what, found, right, bound in (
        ("gradients", gradients, expected, _GRADIENT_BOUND),
        ("steps", once - rows, moved, _STEP_BOUND),
    ):
        error = float((found - right).norm() / right.norm())
        if not error <= bound:
            return f"on this device its {what} differ from the plain step's by {error:.2g} of their length"
    return None


def _fused_steps(
    field: Field, rows: Tensor, samples: Samples, seeds: Tensor, precision: fused.Precision | None
) -> Tensor:
    rows, steps, rate = rows.clone(), torch.zeros_like(seeds), torch.ones_like(seeds, dtype=torch.float32)
    state = _ADAM.init({"rows": rows})
    sampler = Sampler(_SAMPLES, _SAMPLES)
    fields, lengths = list(range(_FIELDS)), None
    fused.fused_steps(
        field, _ADAM, None, sampler, rows, state, samples, seeds, steps, rate, _STEPS, fields, lengths, precision
    )
    return rows


def _plain_steps(field: Field, signal: Signal, rows: Tensor, samples: Samples) -> Tensor:
    steps = torch.zeros(_FIELDS, dtype=torch.int64, device=rows.device)
    rate = torch.ones(_FIELDS, device=rows.device)
    state = _ADAM.init({"rows": rows})
    for step in range(_STEPS):
        _, grads = plain_gradient(field, signal, rows, samples)
        updates, state = _ADAM.update({"rows": grads}, state, {"rows": rows}, Extra(steps + step, rate))
        rows = rows + updates["rows"]
    return rows
