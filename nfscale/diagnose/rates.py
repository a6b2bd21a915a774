"""Is weight scaling a larger learning rate in disguise? The control of Yeom, Lee & Lee (ICLR 2025, figure 3).

With weights scaled by a, the values change by a^(d-1-l) times as much as SIREN's when a weight of layer l of d
activated layers moves: that many scaled matrices follow it. Adam moves every weight by about the rate, whatever its
gradient; so rates divided by these factors leave weight scaling the speed of change that SIREN has, and what remains of
its lead is no matter of rates. The reverse gives SIREN the speed of weight scaling.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from nfscale.diagnose.subject import Subject
from nfscale.engine import Fitted, Stop, fit
from nfscale.errors import CallerError
from nfscale.fields import MLP, theta0_of
from nfscale.fields.recast import Recast
from nfscale.layout import Params
from nfscale.signals import Samples


def rates_by_layer(field: MLP, factors: tuple[float, ...]) -> Recast:
    """The field with its params divided by a factor for each layer.

    An optimiser that does not mind how gradients are scaled, such as Adam, moves the field's own params at its rate
    times the factor.
    """

    def times(params: Params, power: int) -> Params:
        return {name: tensor * factors[int(name.split(".")[1])] ** power for name, tensor in params.items()}

    return Recast(field, partial(times, power=1), partial(times, power=-1))


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
    plain, scaled = (1.0,) * len(speeds), f"weight scale {field.weight_scale:g}"
    cases = {
        "SIREN": (siren, plain),
        "SIREN at the speed of weight scaling": (siren, tuple(speeds)),
        scaled: (field, plain),
        f"{scaled} at the speed of SIREN": (field, tuple(1 / speed for speed in speeds)),
    }
    samples = Samples(subject.samples.coordinates, subject.samples.values, subject.samples.mask)
    optimizer = subject.optimizer()
    for name, (own, factors) in cases.items():
        case = rates_by_layer(own, factors)
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
        rates = "/".join(f"{factor:.3g}" for factor in factors)
        yield RatesStatistics(name, rates, fitted.quality, reached), fitted
