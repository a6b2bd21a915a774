"""Settings of a job on trial: each fits the same few data, and tells what that took and came to."""

import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from nfscale.datasets import Dataset
from nfscale.datasets.base import Subset
from nfscale.encode import ShardReport, encode_shard, new_attempt
from nfscale.errors import NfscaleError
from nfscale.job import EncodeJob, job_from_settings
from nfscale.planner import make_plan
from nfscale.run import OpenRun, calibrate_run
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
    """Why the settings cannot be used: they diverge, or do not go together."""


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
    """Fits settings to data, each in one of several processes.

    Args:
        settings: of the job that is varied.
        positions: of the data in the dataset; a trial takes the first so many of them.
        processes: at once.
    """

    def __init__(self, settings: dict[str, Any], positions: Sequence[int], processes: int) -> None:
        self.settings, self.positions, self._processes = settings, list(positions), processes
        self.outcomes: dict[tuple[Choices, int], Outcome] = {}

    @cached_property
    def _executor(self) -> Executor:
        return processes_of(self._processes)

    def tried(self, several: Sequence[Choices], data: int, first: int = 0) -> list[Outcome]:
        """What became of each of these on `data` of the data, from the `first` one on."""
        positions = self.positions[first : first + data]
        futures = {
            choices: self._executor.submit(_fitted, self.settings, choices, positions)
            for choices in several
            if first or (choices, data) not in self.outcomes
        }
        done = {choices: future.result() for choices, future in futures.items()}
        if first:
            return [done[choices] for choices in several]
        self.outcomes |= {(choices, data): outcome for choices, outcome in done.items()}
        return [self.outcomes[choices, data] for choices in several]

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _fitted(settings: dict[str, Any], choices: Choices, positions: list[int]) -> Outcome:
    try:
        with tempfile.TemporaryDirectory(prefix="nfscale-trial-") as temporary, as_worker():
            job = job_from_settings(settings, [*overrides_of(settings, choices), f"output={temporary}"])
            return _fitted_by(job, positions)
    except NfscaleError as error:
        return Outcome(len(positions), float("nan"), float("nan"), 0, "", " ".join(str(error).split()))


def _fitted_by(job: EncodeJob, positions: list[int]) -> Outcome:
    folder = RunFolder(job.output)
    plan = folder.freeze(make_plan(job), job.read_steps())
    run = OpenRun(folder)
    if job.needs_calibration:
        calibrate_run(run)
    whole = run.dataset
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    fitted_shard(run, whole, positions)
    seconds = clock() - started
    qualities = WeightsTable(folder).to_arrow(["quality"])["quality"].drop_null().to_pylist()
    median = statistics.median(qualities) if qualities else float("nan")
    return Outcome(len(positions), seconds / len(positions), median, plan.layout.size, plan.quality_name)


def processes_of(count: int) -> Executor:
    """So many processes that fit; one is this one."""
    if count == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


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
