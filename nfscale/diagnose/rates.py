"""Is weight scaling a larger learning rate in disguise? The control of Yeom, Lee & Lee (ICLR 2025, figure 3).

With weights scaled by a, the values change by a^(d-1-l) times as much as SIREN's when a weight of layer l of d
activated layers moves: that many scaled matrices follow it. Adam moves every weight by about the rate, whatever its
gradient; so rates divided by these factors leave weight scaling the speed of change that SIREN has, and what remains of
its lead is no matter of rates. The reverse gives SIREN the speed of weight scaling.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nfscale.diagnose.subject import Subject
from nfscale.engine import Fitted, Stop, fit
from nfscale.errors import CallerError
from nfscale.fields import MLP, theta0_of
from nfscale.layout import Layout, Params
from nfscale.signals import Samples


@dataclass(frozen=True)
class RatesByLayer:
    """A field whose params are those of another, divided by a factor for each layer.

    An optimiser that does not mind how gradients are scaled, such as Adam, moves the other's params at its rate times
    the factor.
    """

    field: MLP
    factors: tuple[float, ...]

    @property
    def layout(self) -> Layout:
        return self.field.layout

    def init(self, seeds: Tensor) -> Params:
        return self._times(self.field.init(seeds), -1)

    def apply(self, params: Params, coordinates: Tensor) -> Tensor:
        return self.field.apply(self._times(params, 1), coordinates)

    def forward_description(self) -> dict[str, Any]:
        return {"kind": "rates by layer", "keys": {"factors": self.factors}, "field": self.field.forward_description()}

    def _times(self, params: Params, power: int) -> Params:
        return {name: tensor * self.factors[int(name.split(".")[1])] ** power for name, tensor in params.items()}


@dataclass(frozen=True)
class RatesStatistics:
    """Of one fit."""

    field: str
    rates: str
    """By layer, as multiples of the job's."""
    quality: float
    """The best of all checks."""
    steps_to_target: float
    """Infinite where it was not reached."""


def rates_compared(subject: Subject, steps: int, target: float) -> Iterator[tuple[RatesStatistics, Fitted]]:
    """Fits of SIREN and of the subject's weight scale, each at plain rates and at those that give it the other's speed.

    Raises:
        CallerError: if the field has no weight scale to compare, or the optimiser minds how gradients are scaled.
    """
    field, job = subject.field, subject.job
    if not isinstance(field, MLP) or field.initialization != "weight_scaling" or field.weight_scale == 1:
        raise CallerError(
            "rates compare weight scaling with SIREN: give field.kind=mlp and a field.weight_scale above 1"
        )
    if job.optimizer.kind != "adam":
        raise CallerError(
            f"rates by layer are rates of Adam, whose steps do not depend on the scale of gradients; "
            f"got optimizer.kind={job.optimizer.kind}; use optimizer.kind=adam"
        )
    siren = replace(field, weight_scale=1.0)
    speeds = [*(field.weight_scale ** (field.depth - 1 - layer) for layer in range(field.depth)), 1.0]
    cases = {
        "SIREN": RatesByLayer(siren, (1.0,) * len(speeds)),
        "SIREN at the speed of weight scaling": RatesByLayer(siren, tuple(speeds)),
        f"weight scale {field.weight_scale:g}": RatesByLayer(field, (1.0,) * len(speeds)),
        f"weight scale {field.weight_scale:g} at the speed of SIREN": RatesByLayer(field, tuple(1 / s for s in speeds)),
    }
    samples = Samples(subject.samples.coordinates, subject.samples.values, subject.samples.mask)
    optimizer = subject.optimizer()
    for name, case in cases.items():
        stop = Stop(steps, check_every=max(1, steps // 100), max_restarts=0)
        (fitted,) = fit(
            case,
            subject.signal,
            [(subject.datum_id, samples)],
            optimizer=optimizer,
            stop=stop,
            seed=job.seed,
            init=theta0_of(case, job.seed),
            samples=job.fit.samples,
            sampling=job.fit.sampling,
        )
        history = zip(fitted.history_step, fitted.history_quality, strict=True)
        reached = next((float(step) for step, quality in history if quality >= target), math.inf)
        rates = "/".join(f"{factor:.3g}" for factor in case.factors)
        yield RatesStatistics(name, rates, fitted.quality, reached), fitted
