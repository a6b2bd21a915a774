"""Curvature that fields share: the equilibrated diagonal and the typical step of a calibration sample.

Fields that start from one theta0 have nearly the same curvature. One probe of one field is a far too
noisy estimate of it (on photographs such fits diverge); averaged over the fields of a sample it is a
good diagonal for all of them. It is estimated once per job, at theta0 and along the sample's own fits,
and depends on no neighbour of the field that uses it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.engine.result import Stop
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import evaluate, gather_samples, plain_gradient, plain_gradient_and_hvp
from nfscale.fields import Field
from nfscale.optim.base import Extra
from nfscale.optim.esgd import ESGD, rms_of
from nfscale.rng import Stream, rademacher
from nfscale.signals import Samples, Signal

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
        row = (steps // self.every).clamp(max=len(self.diagonal) - 1)
        return self.diagonal[row], self.step_rms[row]

    def to(self, device: torch.device | str) -> "Calibration":
        return Calibration(self.diagonal.to(device), self.step_rms.to(device), self.every)


def calibrate(
    field: Field,
    signal: Signal,
    samples: Samples,
    seeds: Tensor,
    theta0: Tensor,
    *,
    optimizer: ESGD,
    stop: Stop,
    sampler: Sampler,
) -> Calibration:
    """Fit a sample of M data together and record what they share as it changes.

    Ends when the median quality reaches the target: what comes later is of no use to fields that stop there.

    Args:
        samples: of the M data, [M, N, ...].
        seeds: int64 [M], the seeds of the data.
        theta0: float32 [P], the params that all fields of the job start from.
    """
    size, device = field.layout.size, samples.values.device
    rows = theta0.to(device).repeat(len(seeds), 1)
    state = optimizer.init({"rows": rows})
    rate = torch.ones(len(seeds), device=device)
    square, weight = torch.zeros(size, device=device), 0.0  # weight: 1 - beta2^n after n probes, what the mean holds
    diagonals, step_rms = [], []
    steps = torch.zeros(len(seeds), dtype=torch.int64, device=device)
    for first in range(0, stop.max_steps, stop.cadence):
        positions = None if sampler.is_full else sampler.positions(seeds, steps, stop.cadence)
        for index in range(stop.cadence):
            part = samples if positions is None else gather_samples(samples, positions[:, index])
            if (first + index) % optimizer.update_every == 0:
                for repeat in range(_FIRST_PROBES if first + index == 0 else 1):
                    # A step has one probe; the extra probes at theta0 count down from -1.
                    probe = rademacher(seeds, Stream.PROBE, steps - repeat, size)
                    _, grads, products = plain_gradient_and_hvp(field, signal, rows, part, probe)
                    square = optimizer.beta2 * square + (1 - optimizer.beta2) * products.square().mean(dim=0)
                    weight = optimizer.beta2 * weight + 1 - optimizer.beta2
                diagonals.append((square / weight).sqrt())
                step_rms.append([])
            else:
                _, grads = plain_gradient(field, signal, rows, part)
            diagonal = {"rows": diagonals[-1].expand(len(seeds), -1)}
            direction = optimizer.direction({"rows": grads}, state, diagonal, steps)
            typical = rms_of(direction).median()
            step_rms[-1].append(typical)
            rows = rows + optimizer.scaled(direction, typical.expand(len(seeds)), Extra(steps, rate))["rows"]
            steps = steps + 1
        _, quality = evaluate(field, signal, rows, samples)
        if stop.target is not None and bool(quality.median() >= stop.target):
            break
    typical_steps = torch.stack([torch.stack(interval).mean() for interval in step_rms])
    return Calibration(torch.stack(diagonals), typical_steps, optimizer.update_every)
