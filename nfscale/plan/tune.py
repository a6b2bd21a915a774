"""Which settings reach a quality at the least cost, by successive halving (Jamieson & Talwalkar, AISTATS 2016).

Many settings are tried on a few data, the better half of them on twice as many, and so on; then the best one's
neighbours, in the same way, and itself without each of its choices. All settings see the same data, spread over easy
and hard ones, so that they are compared datum by datum. From what won, choices are taken back for as long as it is no
worse without one: each that is left is good for something, which is its reason. That is measured once more, beside the
job's own settings, on data that had no part in the choice.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from nfscale.errors import CallerError
from nfscale.job import EncodeJob
from nfscale.plan.trials import BETAS, RATE_FACTOR, Choices, Outcome, Trials

_RUNG_DATA = (8, 16, 32)
_FRESH_DATA = 32  # that had no part in the choice
_SEARCH_SHARE = 0.75  # of the time; the rest is for taking choices back and the fresh data
CANDIDATES = 24
"""Settings that are tried at once, at most."""
_KEPT = 2  # of three, at the last rung
_NEGLIGIBLE = 0.005
"""Share of the goal by which a median may fall short: 0.2 dB of 40."""
_WIDTHS, _DEPTHS = (16, 32, 64, 128, 256), (1, 2, 3, 4, 5, 6)
_SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)
_FACTORS = (0.5, 0.7, 1.4, 2.0)
_KINDS = ("esgd", "adam", "muon")
_BETAS = ((0.3, 0.7), (0.5, 0.9), (0.9, 0.999))
"""Of optimisers with momentum and squares: few steps want short memories, long fits with few samples long ones."""


@dataclass(frozen=True)
class Reason:
    """What one of the choices is good for: the settings without it, beside the settings."""

    key: str
    before: Any
    chosen: Any
    cost_without: float | None
    """Over that with it; None where the other settings cannot be used without it."""
    quality_without: float | None
    """Less that with it."""


@dataclass(frozen=True)
class Tuned:
    """What was found."""

    choices: Choices
    goal: float
    """The median quality that settings have to reach."""
    own: Outcome
    """Of the job's own settings, on fresh data."""
    best: Outcome
    """Of the choices, on the same data."""
    reasons: list[Reason]
    trials: dict[Choices, Outcome]
    """The one on most data of each that was tried."""
    seconds: float
    """Wall time of all."""

    @property
    def cost_ratio(self) -> float:
        """Of the choices over the job's own settings."""
        return self.best.seconds / self.own.seconds

    @property
    def front(self) -> list[Choices]:
        """Of which no other has both more quality and less cost, cheapest first; of those tried on most data."""
        most = max(outcome.data for outcome in self.trials.values())
        of_most = {c: o for c, o in self.trials.items() if o.data == most and not o.why_not}
        front: list[Choices] = []
        for choices, outcome in sorted(of_most.items(), key=lambda item: item[1].seconds):
            if not front or outcome.quality > of_most[front[-1]].quality:
                front.append(choices)
        return front


def moves(job: EncodeJob) -> dict[str, list[Any]]:
    """Other values for the keys of a job that decide what a fit costs and comes to."""
    found: dict[str, list[Any]] = {}
    field, fit = job.field, job.fit
    if getattr(field, "weight_scale", "auto") != "auto":
        found["field.weight_scale"] = [scale for scale in _SCALES if scale != field.weight_scale]
    if getattr(field, "width", None) is not None:
        found["field.width"] = _beside(_WIDTHS, field.width)
    if getattr(field, "depth", None) is not None:
        found["field.depth"] = _beside(_DEPTHS, field.depth)
    if isinstance(fit.samples, int):
        found["fit.samples"] = [max(16, fit.samples // 2), fit.samples * 2]
    every = fit.check_every
    steps = {max(every, round(share * fit.max_steps / every) * every) for share in (0.5, 0.7, 0.85, 1.4, 2.0)}
    found["fit.max_steps"] = sorted(steps - {fit.max_steps})
    grain = getattr(job.optimizer, "update_every", 1)  # a check comes where curvature is taken anew
    found["fit.check_every"] = sorted({max(grain, every // 2 // grain * grain), 2 * every} - {every})
    if hasattr(job.optimizer, "learning_rate"):
        found[RATE_FACTOR] = list(_FACTORS)
    if {"beta1", "beta2"} <= type(job.optimizer).model_fields.keys():
        found[BETAS] = [betas for betas in _BETAS if betas != (job.optimizer.beta1, job.optimizer.beta2)]
    if job.optimizer.kind in _KINDS:
        found["optimizer.kind"] = [kind for kind in _KINDS if kind != job.optimizer.kind]
    return found


def _beside(known: Sequence[int], value: int) -> list[int]:
    return [*[one for one in known if one < value][-1:], *[one for one in known if one > value][:1]]


def tune(
    job: EncodeJob,
    trials: Trials,
    *,
    seconds: float,
    seed: int,
    quality: float | None = None,
    keep: Sequence[str] = (),
    clock: Callable[[], float] = time.monotonic,
    tell: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Find cheaper settings for a job.

    Args:
        trials: of this job; its positions are the data that settings are tried on.
        seconds: of wall time, about; what has begun is ended.
        quality: the median that settings have to reach; the job's own, or its target if that is lower, by default.
        keep: keys that stay as they are, such as `field.width`.

    Raises:
        CallerError: if the job's own settings cannot be used, or the data are too few.
    """
    if len(trials.positions) < 2 * _RUNG_DATA[0]:
        raise CallerError(f"tuning needs {2 * _RUNG_DATA[0]} data or more, the dataset has {len(trials.positions)}")
    started = clock()
    rungs = [data for data in _RUNG_DATA if data <= len(trials.positions) // 2]
    known = {key: values for key, values in moves(job).items() if key not in keep and values}
    if not known:
        raise CallerError("nothing is left to vary: every key is in --keep")
    chance = random.Random(seed)
    search = _Search(trials, job.fit.target, quality, rungs, started + _SEARCH_SHARE * seconds, clock, tell)
    own: Choices = ()
    search.require_own()
    best = search.halved([own, *_candidates(own, known, CANDIDATES - 1, chance)])
    tell(f"best of the first round: {_in_words(best)}")
    while not search.is_over:
        tried = {choices for choices, _ in trials.outcomes}
        some = _candidates(best, known, CANDIDATES // 2 - 1, chance, tried)
        if tried.issuperset(some):
            break
        again = search.halved([best, *some])
        if (again, rungs[-1]) not in trials.outcomes:
            break  # the time was up before the round's end, and the best so far has been tried on more data
        if again != best:
            best = again
            tell(f"better: {_in_words(best)}")
        elif tried.issuperset(_neighbours(best, known)):
            break
    best = search.without_the_idle(best)
    fresh = min(_FRESH_DATA, len(trials.positions) - rungs[-1])
    compared = trials.tried(list(dict.fromkeys([own, best])), fresh, first=rungs[-1])
    own_outcome, best_outcome = compared[0], compared[-1]
    reasons = _reasons(job, trials, best, rungs[-1])
    latest: dict[Choices, Outcome] = {}
    for (choices, _), outcome in sorted(trials.outcomes.items(), key=lambda item: item[0][1]):
        latest[choices] = outcome
    goal = search.goal(rungs[-1])
    return Tuned(best, goal, own_outcome, best_outcome, reasons, latest, clock() - started)


@dataclass
class _Search:
    trials: Trials
    target: float | None
    quality: float | None
    rungs: list[int]
    until: float
    clock: Callable[[], float]
    tell: Callable[[str], None]

    @property
    def is_over(self) -> bool:
        return self.clock() > self.until

    def require_own(self) -> None:
        (outcome,) = self.trials.tried([()], self.rungs[0])
        if outcome.why_not or math.isnan(outcome.quality):
            raise CallerError(f"the job's own settings fit nothing: {outcome.why_not or 'no datum has a quality'}")

    def tried(self, several: Sequence[Choices], data: int) -> dict[Choices, Outcome]:
        """On so many data; the job's own settings too, which decide the goal."""
        all_of_them = list(dict.fromkeys([(), *several]))
        return dict(zip(all_of_them, self.trials.tried(all_of_them, data), strict=True))

    def goal(self, data: int) -> float:
        """The quality to reach on so many data: on few, the job's own is compared on the same few."""
        if self.quality is not None:
            return self.quality
        own = self.trials.outcomes[(), data].quality
        return own if self.target is None else min(own, self.target)

    def halved(self, candidates: list[Choices]) -> Choices:
        """The best of the candidates, of which ever fewer see ever more data."""
        for data in self.rungs:
            outcomes = self.tried(candidates, data)
            goal = self.goal(data)
            candidates = sorted(candidates, key=lambda choices: _rank(outcomes[choices], goal))
            if self.is_over:
                break
            candidates = candidates[: max(_KEPT, len(candidates) // 2)]
            self.tell(f"on {data} data: {_in_words(candidates[0])} ({_figures(outcomes[candidates[0]])})")
        return candidates[0]

    def without_the_idle(self, best: Choices) -> Choices:
        """The choices but for those without which the others are no worse.

        They are taken back one after the other, since what one is good for depends on the others; that without which
        they are best first.
        """
        data = self.rungs[-1]
        while best:
            simpler = _each_taken_back(best)
            outcomes = self.tried([best, *simpler], data)
            ranks = {choices: _rank(outcomes[choices], self.goal(data)) for choices in (best, *simpler)}
            simplest = min(simpler, key=ranks.__getitem__)
            if ranks[simplest] > ranks[best]:
                break
            self.tell(f"{_in_words(_but_for(best, simplest))} is taken back ({_figures(outcomes[simplest])})")
            best = simplest
        return best


def _rank(outcome: Outcome, goal: float) -> tuple[int, float]:
    """Cheapest first of those that reach the goal, then the others by how near they come, the useless last."""
    if outcome.why_not or math.isnan(outcome.quality):
        return 2, 0.0
    if outcome.quality >= goal - _NEGLIGIBLE * abs(goal):
        return 0, outcome.seconds
    return 1, goal - outcome.quality


def _candidates(
    around: Choices, known: dict[str, list[Any]], count: int, chance: random.Random, tried: Collection[Choices] = ()
) -> list[Choices]:
    """Settings near some, not yet tried: neighbours for one half, the others with two or three keys changed."""
    back = [choices for choices in _each_taken_back(around) if choices not in tried]
    single = [choices for choices in _neighbours(around, known) if choices not in {*tried, *back}]
    chance.shuffle(single)
    found = dict.fromkeys([*back, *single][: max(1, count // 2)])
    for _ in range(20 * count):
        if len(found) >= count:
            break
        keys = chance.sample(sorted(known), min(len(known), chance.choice((2, 3))))
        drawn = _with(around, {key: chance.choice(known[key]) for key in keys})
        if drawn != around and drawn not in tried:
            found.setdefault(drawn)
    return list(found)


def _neighbours(around: Choices, known: dict[str, list[Any]]) -> list[Choices]:
    """Settings that lack one of the choices of others, or differ from them in one key."""
    single = [_with(around, {key: value}) for key, values in known.items() for value in values]
    return [*_each_taken_back(around), *(choices for choices in single if choices != around)]


def _with(choices: Choices, more: dict[str, Any]) -> Choices:
    return tuple(sorted((dict(choices) | more).items()))


def _each_taken_back(choices: Choices) -> list[Choices]:
    """The choices without one of them, each in turn."""
    return [_but_for(choices, (one,)) for one in choices]


def _but_for(choices: Choices, these: Choices) -> Choices:
    return tuple(one for one in choices if one not in these)


def _reasons(job: EncodeJob, trials: Trials, best: Choices, data: int) -> list[Reason]:
    """Each choice taken back, the others kept."""
    (whole,) = trials.tried([best], data)
    reasons = []
    for (key, chosen), outcome in zip(best, trials.tried(_each_taken_back(best), data), strict=True):
        cost, quality = outcome.seconds / whole.seconds, outcome.quality - whole.quality
        figures = (None, None) if math.isnan(quality) else (cost, quality)
        reasons.append(Reason(key, _own_value(job, key), chosen, *figures))
    return reasons


def _own_value(job: EncodeJob, key: str) -> Any:
    if key == RATE_FACTOR:
        return 1.0
    if key == BETAS:
        return (job.optimizer.beta1, job.optimizer.beta2)
    section, _, name = key.partition(".")
    return getattr(getattr(job, section), name)


def _in_words(choices: Choices) -> str:
    return ", ".join(f"{key}={value}" for key, value in choices) or "the job's own settings"


def _figures(outcome: Outcome) -> str:
    return f"{1e3 * outcome.seconds:.1f} ms per datum, median {outcome.quality:.2f}"
