"""Curvature that fields share: the equilibrated diagonal and the typical step of a calibration sample.

Fields that start from one theta0 have nearly the same curvature. One probe of one field is a far too
noisy estimate of it (on photographs such fits diverge); averaged over the fields of a sample it is a
good diagonal for all of them. It is estimated once per job, at theta0 and along the sample's own fits,
and depends on no neighbour of the field that uses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from nfscale.engine.dispatch import PrecisionName, Step, StepName, chosen
from nfscale.engine.result import Stop
from nfscale.engine.sampling import DRAWN_IN_FULL, Sampler, Sampling, fetched, fetched_steps
from nfscale.engine.step import evaluate, stack_samples, training_samples
from nfscale.fields import Field, theta0_of
from nfscale.optim import Regularized
from nfscale.optim.base import Extra
from nfscale.optim.esgd import ESGD, rms_of
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

_Keys = ParamSpec("_Keys")
_Returned = TypeVar("_Returned")
_FIRST_PROBES = 4  # per field at theta0, where no running mean exists yet: 4 x 32 fields give 9 % error per weight


@dataclass(frozen=True)
class Calibration:
    """What fields share, after 0, every, 2 every, ... steps; the last row holds from there on."""

    diagonal: Tensor
    """float32 [U, P]: sqrt(E[(Hv)^2]) over the sample."""
    step_rms: Tensor
    """float32 [U]: median over the sample of the root mean square of a preconditioned step."""
    every: int

    def at(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Diagonal and typical step for fields at these steps: int64 [F] -> [F, P], [F]."""
        row = self.row_at(steps)
        return self.diagonal[row], self.step_rms[row]

    def row_at(self, steps: Tensor) -> Tensor:
        """Which row holds after so many steps: int64, as `steps`."""
        return (steps // self.every).clamp(max=len(self.diagonal) - 1)

    def to(self, device: torch.device | str) -> "Calibration":
        return Calibration(self.diagonal.to(device), self.step_rms.to(device), self.every)


def calibrate(
    field: Field,
    signal: Signal,
    data: Sequence[tuple[str, Samples]],
    *,
    optimizer: ESGD | Regularized,
    stop: Stop,
    seed: int,
    theta0: Tensor | None = None,
    samples: int | Literal["full"] = "full",
    sampling: Sampling = "stratified",
    step: StepName = "auto",
    precision: PrecisionName = "auto",
    device: torch.device | str | None = None,
    threads: int = 1,
) -> Calibration:
    """Fit a sample of data together and record what they share as it changes.

    Ends when the median quality reaches the target: what comes later is of no use to fields that stop there.

    Args:
        optimizer: ESGD; of one with weight decay or clipped gradients, the ESGD inside takes the sample's steps.
        data: (id, samples) pairs of one sample count; 32 are enough for photographs. What they hold back is not
            looked at.
        theta0: float32 [P], the params that all fields start from; by default those of `fit` for this seed.
        samples, sampling, step, precision: as in `fit`; sampling="error" is here "stratified".
        threads: that native steps may take, if that is more than torch has; the bits are the same. Of others they
            would not be.

    Raises:
        ValueError: if the data have different sample counts, or there are none, or steps cannot take all of their
            samples; if the optimiser is not ESGD.
    """
    optimizer = optimizer.inner if isinstance(optimizer, Regularized) else optimizer  # type: ignore[assignment]
    if not isinstance(optimizer, ESGD):
        raise ValueError(f"a calibration is for ESGD, not for {type(optimizer).__name__}")
    data = [(datum_id, replace(part, heldout=None)) for datum_id, part in data]
    counts = sorted({part.count for _, part in data})
    if len(counts) != 1:
        raise ValueError(f"a calibration takes data of one sample count, got counts {counts}")
    if len({part.kind for _, part in data}) != 1:
        raise ValueError("a calibration takes data that agree in what they are checked on and in having masks")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    taken = _on_threads(chosen(step, device, field, signal, optimizer, precision), threads)
    data = data if len(data) > 1 else [data[0]] * 2  # a lone field rounds differently
    batch = stack_samples([part for _, part in data], device)
    seeds = as_tensor([datum_seed(seed, datum_id) for datum_id, _ in data], device)
    sampler = Sampler(counts[0], counts[0] if samples == "full" else samples, sampling)
    if samples == "full" and any(part.source is not None for _, part in data):
        raise ValueError(DRAWN_IN_FULL)
    sources = [part.source for _, part in data if part.source is not None]
    at_once = fetched_steps(sampler, batch, stop.cadence, optimizer.update_every) if sources else stop.cadence
    size = field.layout.size
    rows = (theta0_of(field, seed) if theta0 is None else theta0).to(device).repeat(len(seeds), 1)
    state = optimizer.init({"rows": rows})
    rate = torch.ones(len(seeds), device=device)
    square, weight = torch.zeros(size, device=device), 0.0  # weight: 1 - beta2^n after n probes, what the mean holds
    diagonals, step_rms = [], []
    steps = torch.zeros(len(seeds), dtype=torch.int64, device=device)
    for first in range(0, stop.max_steps, stop.cadence):
        for index in range(stop.cadence):
            if index % at_once == 0:
                presented, drawing = batch, sampler
                if sources:
                    presented, drawing = fetched(sources, sampler, seeds, steps, at_once)
                positions = None if drawing.is_full else drawing.positions(seeds, steps, at_once)
            drawn = None if positions is None else positions[:, index % at_once]
            part = training_samples(signal, presented, drawn, seeds, steps)
            if (first + index) % optimizer.update_every == 0:
                for repeat in range(_FIRST_PROBES if first + index == 0 else 1):
                    # A step has one probe; the extra probes at theta0 count down from -1.
                    probe = rademacher(seeds, Stream.PROBE, steps - repeat, size)
                    _, grads, products = taken.gradient_and_hvp(field, signal, rows, part, probe)
                    square = optimizer.beta2 * square + (1 - optimizer.beta2) * products.square().mean(dim=0)
                    weight = optimizer.beta2 * weight + 1 - optimizer.beta2
                diagonals.append((square / weight).sqrt())
                step_rms.append([])
            else:
                _, grads = taken.gradient(field, signal, rows, part)
            # One row of diagonal and one count of steps, as all of them have: what is divided by is computed once.
            direction = optimizer.direction({"rows": grads}, state, {"rows": diagonals[-1][None]}, steps[:1])
            typical = rms_of(direction).median()
            step_rms[-1].append(typical)
            rows += optimizer.scaled(direction, typical.expand(len(seeds)), Extra(steps, rate))["rows"]
            steps = steps + 1
        if stop.target is None or first + stop.cadence >= stop.max_steps:
            continue
        _, quality = evaluate(field, signal, rows, batch, apply=taken.apply)
        if bool(quality.median() >= stop.target):
            break
    typical_steps = torch.stack([torch.stack(interval).mean() for interval in step_rms])
    return Calibration(torch.stack(diagonals), typical_steps, optimizer.update_every)


def _on_threads(step: Step, threads: int) -> Step:
    """The step, on so many threads if it is native and they are more than torch has. Torch's own operations stay where
    they are: its threads would wait for more of them awake, in the way of the step's."""
    if step.name != "native" or threads <= torch.get_num_threads():
        return step

    def spread(function: Callable[_Keys, _Returned]) -> Callable[_Keys, _Returned]:
        @wraps(function)
        def call(*args: _Keys.args, **keys: _Keys.kwargs) -> _Returned:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return function(*args, **keys)
            finally:
                torch.set_num_threads(before)

        return call

    def apply(field: Field, rows: Tensor) -> Apply:
        return spread(step.apply(field, rows))

    return replace(step, gradient=spread(step.gradient), gradient_and_hvp=spread(step.gradient_and_hvp), apply=apply)
