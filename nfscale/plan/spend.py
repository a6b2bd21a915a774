"""A budget spent where it buys most: steps for each datum, so that as many of them as can be reach the target.

A sample is fitted at several lengths of the schedule. At each, the harder data are, the fewer reach the target and the
more steps they take: isotonic regression on their difficulty, which assumes no other shape. Difficulty is known of all
data without a fit, see `nfscale.difficulty.bits`. Then each datum gets the length that maximises

    its probability to reach the target - price x its expected steps

at the one price at which all of them take the budget (Everett, "Generalized Lagrange multiplier method", Operations
Research 1963): of the plans that are expected to cost as much, none expects more data at the target. Data that would
miss it at every length that is worth its price get the least one.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nfscale.difficulty import bits_at
from nfscale.engine.loop import LADDER_AND_PLAN
from nfscale.errors import CallerError, EncodeError
from nfscale.job import EncodeJob
from nfscale.plan.sample import FittedSample, stratified
from nfscale.plan.trials import as_worker, fitted_shard
from nfscale.planner import make_plan
from nfscale.run import OpenRun, calibrate_run
from nfscale.store import RunFolder

_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths to choose from, of the job's own; on photographs finer ones bought nothing. The least is what data have left
that are given up: less would save more, and leave worse fields."""
_FIRST_CHUNK = 32  # data that are fitted at all lengths whatever it takes
_ASSUMED_DB = 40.0  # where the target is no number of decibels
_CHEAPEST, _DEAREST = 1e-9, 1e9
"""Prices of a step: at the one steps are all but free, at the other they are all that counts."""
_ROUNDING = 1e-9
_COLUMNS = ["datum_id", "steps", "steps_to_target"]


@dataclass(frozen=True)
class Tried:
    """A sample of n data, each fitted at L lengths."""

    lengths: tuple[int, ...]
    difficulty: np.ndarray
    """[n]"""
    reached: np.ndarray
    """bool [L, n]: the target."""
    steps: np.ndarray
    """[L, n]: taken, fewer than the length where the target was reached before."""

    def expected(self, difficulty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability to reach the target and steps of data of this difficulty [N], at each length: [L, N] each."""
        chances = [_monotone(self.difficulty, row, difficulty, rises=False) for row in self.reached.astype(float)]
        return np.stack(chances), np.stack([_monotone(self.difficulty, row, difficulty) for row in self.steps])


def _monotone(known: np.ndarray, values: np.ndarray, at: np.ndarray, rises: bool = True) -> np.ndarray:
    from scipy.optimize import isotonic_regression  # half a second, of which most commands need nothing

    places, which, counts = np.unique(known, return_inverse=True, return_counts=True)
    means = np.bincount(which, values) / counts
    return np.interp(at, places, isotonic_regression(means, weights=counts, increasing=rises).x)


@dataclass(frozen=True)
class Spent:
    """A plan, beside one length for all at the same budget. Shares are expected ones, of the data that have a plan."""

    steps: dict[str, int]
    """By datum's id, of all that can be read."""
    budget_hours: float
    """Of all workers together, as what follows."""
    device_hours: float
    """Less than the budget where more steps would bring no other datum to the target."""
    share_at_target: float
    uniform_steps: int
    """One length that takes the budget, or the longest there is."""
    uniform_hours: float
    uniform_share_at_target: float
    equal_share_hours: float
    """What a plan takes for as many data at the target as the one length brings there."""
    sampled: int
    knows_difficulty: bool
    """False: the data are no grids, so that chance decides who gets the longer of two lengths."""

    def figures(self) -> dict[str, Any]:
        """For JSON: plain numbers, and how many data have each length."""
        figures = {name: value for name, value in vars(self).items() if name != "steps"}
        lengths, counts = np.unique(list(self.steps.values()), return_counts=True)
        return figures | {"data_by_steps": {str(length): int(n) for length, n in zip(lengths, counts, strict=True)}}


def refuse_unplannable(job: EncodeJob) -> None:
    """Check that steps can be planned for a job.

    Raises:
        CallerError: if it has no target, or a ladder.
    """
    if job.fit.target is None:
        raise CallerError(
            "a budget is spent on data that reach fit.target, and this job has none; give one, such as fit.target=40"
        )
    if job.fit.first_steps is not None:
        raise CallerError(f"{LADDER_AND_PLAN}: fit.first_steps=null")


def spend(
    job: EncodeJob, sample: FittedSample, budget_seconds: float, *, seconds: float, seed: int, device: str = "cpu"
) -> Spent:
    """Plan the steps of each datum of a job so that all of them take a budget.

    Args:
        sample: of the job as it is, which says what a step takes, and a datum beside its steps.
        budget_seconds: of all workers together, in shards.
        seconds: of wall time that fits at several lengths may take, about; reading all data for their difficulty comes
            on top.
        seed: which data are fitted.

    Raises:
        CallerError: if steps cannot be planned for the job, or the budget is not enough for the least of them.
        EncodeError: if no datum of the sample can be fitted.
    """
    refuse_unplannable(job)
    job = job.model_copy(update={"fit": job.fit.model_copy(update={"step_plan": None})})
    plan = make_plan(job, device)
    with tempfile.TemporaryDirectory(prefix="nfscale-spend-") as temporary, as_worker():
        folder = RunFolder(temporary)
        folder.freeze(plan)
        run = OpenRun(folder)
        ids = run.dataset.ids
        found = bits_at(run.dataset, run.signal, range(len(ids)), _target_db(job, plan.quality_name))
        difficulty = np.array([found.get(position, math.nan) for position in range(len(ids))])
        if not found:
            difficulty = np.zeros(len(ids))
        known = np.flatnonzero(np.isfinite(difficulty)).tolist()
        tried = _tried(run, difficulty, seconds, seed)
    chances, steps = tried.expected(difficulty[known])
    fits, taken = (sample.rows[name].fill_null(0).to_numpy().sum() for name in ("wall_seconds", "steps"))
    per_step = float(fits) / max(int(taken), 1)
    beside = len(ids) * (sample.worker_seconds().mean() - fits / len(sample.rows))
    return _spent(tried, [ids[place] for place in known], chances, steps, per_step, beside, budget_seconds, bool(found))


def _target_db(job: EncodeJob, quality_name: str) -> float:
    assert job.fit.target is not None, "refused at the door"
    return job.fit.target if quality_name.endswith("_db") else _ASSUMED_DB


def _tried(run: OpenRun, difficulty: np.ndarray, seconds: float, seed: int) -> Tried:
    """Fit data of all difficulties at each length until the time is spent."""
    if run.job.needs_calibration:
        calibrate_run(run)
    whole, lengths = run.dataset, lengths_of(run.job)
    positions = [position for position in stratified(run, seed) if np.isfinite(difficulty[position])]
    places = {whole.ids[position]: position for position in positions}
    found: dict[str, list[tuple[bool, int]]] = {}
    started, taken, chunk, number = time.monotonic(), 0, _FIRST_CHUNK, 0
    while chunk and taken < len(positions):
        part = positions[taken : taken + chunk]
        for length in lengths:
            run.steps = dict.fromkeys((whole.ids[position] for position in part), length)
            commit = fitted_shard(run, whole, part, number)
            for row in pq.read_table(run.folder.files.source(commit.file), columns=_COLUMNS).to_pylist():
                if row["steps"] is not None:
                    found.setdefault(row["datum_id"], []).append((row["steps_to_target"] is not None, row["steps"]))
            number += 1
        taken += len(part)
        spent = time.monotonic() - started
        chunk = max(0, min(2 * chunk, int((seconds - spent) * taken / spent)))
    run.dataset = whole
    if not found:
        raise EncodeError("no datum of the sample could be fitted")
    outcomes = np.array(list(found.values()), float)  # [n, L, 2]
    known = np.array([difficulty[places[datum_id]] for datum_id in found])
    return Tried(lengths, known, outcomes[..., 0].T > 0, outcomes[..., 1].T)


def lengths_of(job: EncodeJob) -> tuple[int, ...]:
    """That a plan chooses from: each ends at a check."""
    cadence = job.fit.stop().cadence
    return tuple(sorted({max(1, math.ceil(share * job.fit.max_steps / cadence)) * cadence for share in _SHARES}))


def _spent(
    tried: Tried,
    ids: Sequence[str],
    chances: np.ndarray,
    steps: np.ndarray,
    seconds_per_step: float,
    beside: float,
    budget: float,
    knows_difficulty: bool,
) -> Spent:
    """The plan of data with these chances and expected steps [L, N], and what is to be said of it.

    Args:
        beside: seconds that all data take beside their steps.
        budget: seconds.
    """
    affordable = (budget - beside) / seconds_per_step
    least = steps.min(axis=0).sum()
    if affordable < least:
        raise CallerError(
            f"a budget of {budget / 3600:.3g} h is not enough: {len(ids):,} data of {tried.lengths[0]} steps each take "
            f"{(beside + seconds_per_step * least) / 3600:.3g} h of the device; give more, or a lower fit.max_steps"
        )
    chosen = allotted(chances, steps, affordable)
    every = np.arange(len(ids))
    uniform_steps, uniform_cost, uniform_share = _uniform(tried.lengths, chances, steps, affordable)

    def hours(all_steps: float) -> float:
        return float(beside + seconds_per_step * all_steps) / 3600

    return Spent(
        steps={datum_id: tried.lengths[which] for datum_id, which in zip(ids, chosen.tolist(), strict=True)},
        budget_hours=budget / 3600,
        device_hours=hours(steps[chosen, every].sum()),
        share_at_target=float(chances[chosen, every].mean()),
        uniform_steps=uniform_steps,
        uniform_hours=hours(uniform_cost),
        uniform_share_at_target=uniform_share,
        equal_share_hours=hours(cost_of_share(chances, steps, uniform_share)),
        sampled=len(tried.difficulty),
        knows_difficulty=knows_difficulty,
    )


def _uniform(lengths: Sequence[int], chances: np.ndarray, steps: np.ndarray, budget: float) -> tuple[int, float, float]:
    """One length for all that takes the budget, its steps of all data and its share: between those that were tried."""
    costs = np.maximum.accumulate(steps.sum(axis=1))
    found = [np.interp(budget, costs, values) for values in (lengths, costs, chances.mean(axis=1))]
    return round(float(found[0])), float(found[1]), float(found[2])


def allotted(chances: np.ndarray, steps: np.ndarray, budget: float) -> np.ndarray:
    """Which length each datum gets: [L, N], [L, N] -> int64 [N], of the highest chances that take so many steps in all.

    Raises:
        ValueError: if the least steps of all are more.
    """
    every = np.arange(chances.shape[1])

    def cost(chosen: np.ndarray) -> float:
        return float(steps[chosen, every].sum())

    least = cost(_chosen(chances, steps, _DEAREST))
    if least > budget:
        raise ValueError(f"{least:.0f} steps at least, and a budget of {budget:.0f}")
    cheap, dear = _bracketed(lambda price: cost(_chosen(chances, steps, price)) > budget)
    # Between two prices that differ by rounding, data are indifferent: as many as there is budget for get more.
    more, chosen = _chosen(chances, steps, cheap), _chosen(chances, steps, dear)
    extra = np.cumsum(steps[more, every] - steps[chosen, every])
    return np.where(extra <= budget - cost(chosen), more, chosen)


def cost_of_share(chances: np.ndarray, steps: np.ndarray, share: float) -> float:
    """The least steps of all data [L, N] that are expected to bring this share of them to the target, if any does."""
    every = np.arange(chances.shape[1])

    def reaches(price: float) -> bool:
        return chances[_chosen(chances, steps, price), every].mean() >= share - _ROUNDING

    cheap, _ = _bracketed(reaches)
    return float(steps[_chosen(chances, steps, cheap), every].sum())


def _chosen(chances: np.ndarray, steps: np.ndarray, price: float) -> np.ndarray:
    return (chances - price * steps).argmax(axis=0)


def _bracketed(holds: Callable[[float], bool]) -> tuple[float, float]:
    """The highest price of a step for which something holds that holds below it, and the next one above it."""
    cheap, dear = _CHEAPEST, _DEAREST
    if not holds(cheap):
        return cheap, cheap
    for _ in range(100):
        middle = math.sqrt(cheap * dear)
        cheap, dear = (middle, dear) if holds(middle) else (cheap, middle)
    return cheap, dear
