"""A few data of a job, fitted as its workers would fit them, in processes of their own, for as long as a budget lasts.

The sample is stratified by how hard the data are to fit: some are drawn, measured and sorted, and taken in an order in
which every beginning is spread evenly over the sorted ones. So the sample can end anywhere, and does when the time is
spent. Everything is what an encode runs: plan, calibration, shards, rows on disk; only the folder is a temporary one.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.datasets import Dataset, seeded_sample
from nfscale.difficulty import difficulties
from nfscale.errors import EncodeError
from nfscale.job import EncodeJob
from nfscale.plan.trials import as_worker, first_check, fitted_shard
from nfscale.planner import make_plan
from nfscale.rng import datum_seed
from nfscale.run import OpenRun, calibrate_run
from nfscale.store.run_folder import Commit, Plan, RunFolder

_POOL = 512  # data drawn at most
_FIRST_CHUNK, _LARGEST_CHUNK = 4, 256
"""Data that are fitted together: few at first, since how long one takes is not known, more as it is."""
_SPREAD_SECONDS = 0.2  # longer than handing over takes
_COLUMNS = ["datum_id", "index", "status", "quality", "steps", "steps_to_target", "wall_seconds"]


@dataclass(frozen=True)
class FittedSample:
    """What some data of a job came to."""

    plan: Plan
    rows: pa.Table
    """Of the sample: datum_id, index, status, quality, steps, steps_to_target, wall_seconds."""
    commits: list[Commit]
    """Of the chunks it was fitted in."""
    plan_seconds: float
    calibration_seconds: float
    slots: int
    """Fields that a batch of the job holds."""
    peak_bytes: int
    """Resident memory of a process, the largest of them."""

    def worker_seconds(self) -> np.ndarray:
        """By datum [n]: its part of the steps, and an equal part of all else that a shard takes.

        The latter by the largest chunks of the sample, since part of it comes once per shard, whatever its size.
        """
        fits = self.rows["wall_seconds"].fill_null(0.0).to_numpy().astype(float)
        edges = np.cumsum([0, *(commit.rows for commit in self.commits)])
        chunks = list(zip(self.commits, edges, edges[1:], strict=False))
        largest = max(commit.rows for commit in self.commits)
        large = [(commit, start, stop) for commit, start, stop in chunks if 2 * commit.rows > largest]
        other = sum(commit.seconds - fits[start:stop].sum() for commit, start, stop in large)
        return fits + max(0.0, other) / sum(commit.rows for commit, _, _ in large)


def fitted_sample(
    job: EncodeJob,
    *,
    seconds: float,
    processes: int,
    seed: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.monotonic,
) -> FittedSample:
    """Fit data of a job for about so many seconds, and at least `_FIRST_CHUNK` of them in each process.

    Args:
        seconds: of wall time for the fits; plan and calibration come on top.
        processes: that fit at once; 1: this one.
        seed: which data are drawn.

    Raises:
        CallerError: if the dataset is empty or none of its first data can be read.
        EncodeError: if too few data can be read for the calibration.
    """
    started = clock()
    plan = make_plan(job, device)
    with tempfile.TemporaryDirectory(prefix="nfscale-estimate-") as temporary:
        folder = RunFolder(temporary)
        folder.freeze(plan, job.read_steps())
        run = OpenRun(folder)
        planned = clock()
        if job.needs_calibration:
            calibrate_run(run)
        calibrated = clock()
        positions = stratified(run, seed)
        with _processes(processes) as executor:
            reports, slots = _fitted_for(executor, temporary, positions, seconds, processes, clock)
        if not reports:
            raise EncodeError("no datum of the sample was fitted")
        rows = pa.concat_tables(
            [pq.read_table(folder.files.source(report.commit.file), columns=_COLUMNS) for report in reports]
        )
    return FittedSample(
        plan=plan,
        rows=rows,
        commits=[report.commit for report in reports],
        plan_seconds=planned - started,
        calibration_seconds=calibrated - planned if job.needs_calibration else 0.0,
        slots=slots,
        peak_bytes=max(report.peak_bytes for report in reports),
    )


def stratified(run: OpenRun, seed: int) -> list[int]:
    """Positions of drawn data in an order of which every beginning is spread over easy and hard ones.

    Data of which no difficulty is known (no values on a grid, or no time left to read them) come in random order,
    among the others.
    """
    dataset = run.dataset
    drawn = seeded_sample(dataset.ids, _POOL, seed, "estimate")
    measured = difficulties(dataset, run.signal, drawn)
    known = sorted(measured, key=lambda position: measured[position]["high_frequency_percent"])
    if not known:
        return drawn
    spread = [known[place] for place in _spread_order(len(known), seed)]
    rest = [position for position in drawn if position not in measured]
    # In proportion: of the known ones every beginning is spread, of the rest any is random.
    return [position for _, position in sorted([*_evenly(spread), *_evenly(rest)])]


def _spread_order(count: int, seed: int) -> list[int]:
    """0 .. count - 1, every beginning spread evenly: their ranks' bits reversed (van der Corput), some bits flipped."""
    bits = max(1, (count - 1).bit_length())
    flipped = datum_seed(seed, "order") % (1 << bits)
    spread = (int(f"{rank:0{bits}b}"[::-1], 2) ^ flipped for rank in range(1 << bits))
    return list(dict.fromkeys(place * count >> bits for place in spread))


def _evenly(items: Sequence[int]) -> list[tuple[float, int]]:
    return [((rank + 0.5) / len(items), item) for rank, item in enumerate(items)]


@dataclass(frozen=True)
class _Report:
    """Of a chunk."""

    commit: Commit
    peak_bytes: int


def _processes(count: int) -> Executor:
    """So many that fit; one is this one."""
    if count == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def _fitted_for(
    executor: Executor, folder: str, positions: list[int], seconds: float, processes: int, clock: Callable[[], float]
) -> tuple[list[_Report], int]:
    """Chunks of the positions, one per process at a time, until the time is spent; and the slots of a batch."""
    reports: list[_Report] = []
    flying: list[Future[_Report]] = []
    ready = [executor.submit(_warmed, folder, positions) for _ in range(processes)]
    slots = max(future.result() for future in ready)
    started, taken, number, per_datum = clock(), 0, 0, 0.0
    while True:
        left = seconds - (clock() - started)
        while len(flying) < processes and taken < len(positions):
            chunk = _FIRST_CHUNK
            if reports:
                chunk = min(_LARGEST_CHUNK, max(reports[-1].commit.rows * 2, _FIRST_CHUNK), int(left / per_datum / 2))
                if chunk < 1:
                    break
            part = positions[taken : taken + chunk]
            flying.append(executor.submit(_fit_chunk, folder, number, part))
            taken, number = taken + len(part), number + 1
        if not flying:
            return reports, slots
        report = flying.pop(0).result()
        reports.append(report)
        per_datum = report.commit.seconds / report.commit.rows


@lru_cache(maxsize=1)
def _opened(folder: str) -> tuple[OpenRun, Dataset]:
    """The temporary run and its whole dataset: opened once in a process, as a worker does."""
    run = OpenRun(RunFolder(folder))
    return run, run.dataset


def _warmed(folder: str, positions: Sequence[int]) -> int:
    """Open the run and load or compile its step, which the sample's costs are not to hold; the slots of a batch."""
    with as_worker():
        run, whole = _opened(folder)
        run.dataset = whole
        slots = first_check(run, positions)
        time.sleep(_SPREAD_SECONDS)  # so that no process warms up twice and another not at all
        return slots


def _fit_chunk(folder: str, number: int, positions: list[int]) -> _Report:
    """Fit some data as one shard."""
    with as_worker():
        run, whole = _opened(folder)
        commit = fitted_shard(run, whole, positions, number)
    return _Report(commit, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
