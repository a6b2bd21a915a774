"""Settings of a job on trial: each fits the same few data, and tells what that took and came to.

A trial is a call to one of a pool's workers, which opens the dataset and has a folder of its own for the while of it:
what comes back is an `Outcome`. So it may be made again wherever its worker is lost.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from nfscale.coordinator import Failure
from nfscale.datasets import Dataset
from nfscale.datasets.base import Subset
from nfscale.encode import ShardReport, encode_shard, new_attempt
from nfscale.engine import Check
from nfscale.errors import EncodeError, NfscaleError
from nfscale.job import EncodeJob, job_from_settings
from nfscale.planner import make_plan
from nfscale.pool import Failed, Pool, call_all
from nfscale.run import OpenRun, calibrate_run, prepared_of
from nfscale.store import RunFolder, WeightsTable
from nfscale.store.run_folder import Commit, Shard

RATE_FACTOR = "learning_rate_factor"
"""Not a key of a job: what its learning rate, automatic or not, is multiplied with."""

BETAS = "optimizer.betas"
"""Not a key either: beta1 and beta2, which depend on each other."""

Choices = tuple[tuple[str, Any], ...]
"""Keys of a job and their values, where they are not the job's own."""


@dataclass(frozen=True)
class Outcome:
    """Of some settings on some data."""

    data: int
    seconds: float
    """Of the device, per datum: on a CPU those of its clock, which neighbours on the machine do not touch."""
    quality: float
    """Median over the data; NaN where the settings cannot be used."""
    weights: int
    """Of a field."""
    quality_name: str = ""
    why_not: str = ""
    """Why the settings cannot be used: they diverge, do not go together, or end the process that tries them."""


def unusable(data: int, why: str) -> Outcome:
    """Of settings that came to nothing on so many data."""
    return Outcome(data, float("nan"), float("nan"), 0, "", " ".join(why.split()))


def overrides_of(settings: dict[str, Any], choices: Choices) -> list[str]:
    """The overrides that make the choices.

    Raises:
        CallerError: if they do not go together.
    """
    texts = [f"{key}={json.dumps(value)}" for key, value in choices if key not in (RATE_FACTOR, BETAS)]
    if betas := dict(choices).get(BETAS):
        texts += [f"optimizer.beta{number}={beta}" for number, beta in enumerate(betas, 1)]
    factor = dict(choices).get(RATE_FACTOR)
    if factor is None:
        return texts
    job = job_from_settings(settings, texts)
    per_step = 4096 if job.fit.samples == "full" else job.fit.samples
    rate = getattr(job.build_optimizer(per_step), "learning_rate", None)
    return texts if rate is None else [*texts, f"optimizer.learning_rate={float(f'{factor * rate:.3g}')}"]


class Trials:
    """Fits settings to data, each by one of a pool's workers.

    Args:
        settings: of the job that is varied.
        positions: of the data in the dataset; a trial takes the first so many of them.
        pool: of workers for calls.
        tell: is told what the pool waits for, if it has to.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        positions: Sequence[int],
        pool: Pool,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self.positions, self._pool, self._tell = settings, list(positions), pool, tell
        self.outcomes: dict[tuple[Choices, int], Outcome] = {}

    def tried(self, several: Sequence[Choices], data: int, first: int = 0) -> list[Outcome]:
        """What became of each of these on `data` of the data, from the `first` one on.

        Raises:
            EncodeError: if a trial fails in a way that says nothing about its settings.
        """
        positions = self.positions[first : first + data]
        anew = [choices for choices in several if first or (choices, data) not in self.outcomes]
        made = call_all(self._pool, fitted, [(self.settings, choices, positions) for choices in anew], self._tell)
        done = dict(zip(anew, map(_outcome_of, made, [data] * len(made)), strict=True))
        if first:
            return [done[choices] for choices in several]
        self.outcomes |= {(choices, data): outcome for choices, outcome in done.items()}
        return [self.outcomes[choices, data] for choices in several]


def _outcome_of(made: Outcome | Failed, data: int) -> Outcome:
    if not isinstance(made, Failed):
        return made
    if made.failure is Failure.CRASH:
        return unusable(data, made.message)
    raise EncodeError(f"a trial failed: {made.message}")


def fitted(settings: dict[str, Any], choices: Choices, positions: list[int]) -> Outcome:
    """Fit some data with these choices, in a process that has done so before."""
    _warm_up(json.dumps(settings), positions[0])
    return _fitted(settings, choices, positions)


@cache
def _warm_up(settings: str, position: int) -> None:
    """Import and open what the first fit of a process does, 0.4 s on digits: that is no cost of the choices."""
    _fitted(json.loads(settings), (), [position])


def _fitted(settings: dict[str, Any], choices: Choices, positions: list[int]) -> Outcome:
    try:
        with tempfile.TemporaryDirectory(prefix="nfscale-trial-") as temporary, as_worker():
            job = job_from_settings(settings, [*overrides_of(settings, choices), f"output={temporary}"])
            return _fitted_by(job, positions)
    except NfscaleError as error:
        return unusable(len(positions), str(error))


def _fitted_by(job: EncodeJob, positions: list[int]) -> Outcome:
    folder = RunFolder(job.output)
    plan = folder.freeze(make_plan(job), job.read_steps())
    run = OpenRun(folder)
    if job.needs_calibration:
        calibrate_run(run)
    whole = run.dataset
    clock = time.process_time
    if torch.cuda.is_available():
        clock = time.perf_counter
        first_check(run, positions)  # for which kernels are compiled, by a clock that would tell
    started = clock()
    fitted_shard(run, whole, positions)
    seconds = clock() - started
    qualities = WeightsTable(folder).to_arrow(["quality"])["quality"].drop_null().to_pylist()
    median = statistics.median(qualities) if qualities else float("nan")
    return Outcome(len(positions), seconds / len(positions), median, plan.layout.size, plan.quality_name)


def first_check(run: OpenRun, positions: Sequence[int]) -> int:
    """Fit the first readable one of these data up to its first check, which loads or compiles the step.

    Returns:
        How many fields the job fits together; 0 where no datum can be read.
    """
    for position in positions:
        samples = prepared_of(run.signal, run.dataset.read(position), run.job.fit.samples == "full")
        if isinstance(samples, str):
            continue
        every = getattr(run.optimizer, "update_every", 1)
        stop = replace(run.job.fit.stop(), max_steps=every, check_every=every)
        events = list(run.fits(iter([("one", samples)]), stop=stop))
        return max(event.slots for event in events if isinstance(event, Check))
    return 0


def fitted_shard(run: OpenRun, whole: Dataset, positions: Sequence[int], number: int = 0) -> Commit:
    """Fit and commit some of a run's data as one shard, which has this number among those of the folder."""
    run.dataset = Subset(whole, positions)
    shard = Shard(number, 0, len(positions))
    *_, report = encode_shard(run, shard, attempt=new_attempt(), order=number, worker=str(os.getpid()))
    assert isinstance(report, ShardReport)
    return report.commit


@contextlib.contextmanager
def as_worker() -> Iterator[None]:
    """On one thread, as a worker on a CPU is."""
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
