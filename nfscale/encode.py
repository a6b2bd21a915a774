"""What a worker does: read a shard, fit it, write its rows, commit them. And what comes before: the plan.

A shard is idempotent: its rows depend on the plan alone, its file has a name of its own, and of several
attempts the first to commit counts.
"""

import contextlib
import importlib.metadata
import os
import platform
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nfscale import checkpoint
from nfscale.ahead import ahead
from nfscale.apart import read_apart
from nfscale.datasets import Dataset, Datum, seeded_sample
from nfscale.datasets.base import ids_digest
from nfscale.datasets.tiled import PROBED_BLOCKS, Tiled
from nfscale.engine import (
    Calibration,
    Check,
    Fitted,
    LearnedStart,
    Snapshot,
    Stop,
    calibrate,
    fit_and_checks,
    learn_start,
)
from nfscale.engine.dispatch import StepName, chosen
from nfscale.engine.loop import SELECTS_WITHOUT_CHECK
from nfscale.engine.sampling import DRAWN_IN_FULL
from nfscale.engine.step import evaluate, predicted_at, stack_samples
from nfscale.errors import CallerError, EncodeError, OutputError, SupersededError
from nfscale.fields import Field, theta0_of
from nfscale.job import FORMAT_VERSION, EncodeJob
from nfscale.media import MEDIA, Medium
from nfscale.optim import Optimizer, Scaled, Solver
from nfscale.rng import datum_seed
from nfscale.signals import SIGNALS, Kind, Samples, Signal
from nfscale.signals.base import Apply
from nfscale.store.run_folder import Commit, Plan, RunFolder, Shard
from nfscale.store.schema import OK_STATUSES, STATUS, LabelType, Row, restored, stored, to_table, write_parquet
from nfscale.store.table import built

_SHARD_SECONDS = 15.0  # of work: what a lost worker costs, and short enough that all workers end together
_ASSUMED_FLOPS = {"cpu": 20e9, "cuda": 10e12}  # useful rate of one worker; only decides how data are cut
_SHARD_FIELDS = {"cpu": (4, 4096), "cuda": (64, 4096)}  # fewer would leave a batch half empty
_MINIMUM_SHARDS = 8
_REPORT_SECONDS = 0.5  # between two reports of progress: a message per field would cost more than it tells
_BEAT_SECONDS = 5.0  # where there is none
_MEASURED_TOGETHER = 16  # fields: their samples are held that long
_PROBED_DATA = 100  # data tried until enough are readable to decide what the signal leaves open
_DECIDING_DATA = 8  # readable ones that decide it: reading them is all that a plan costs


@dataclass(frozen=True)
class Progress:
    """Some fields of a shard are done, not yet committed."""

    shard: str
    qualities: list[float]


@dataclass(frozen=True)
class ShardReport:
    """What became of an attempt at a shard."""

    commit: Commit
    won: bool
    """False if another attempt had committed before; its rows count, these are gone."""
    cut: bool = False
    """Not won, because another driver had cut the shard: its parts are what can be committed."""


# --- the plan


def make_plan(job: EncodeJob, device: str = "cpu") -> Plan:
    """Everything that is decided once per run, from the job and the dataset.

    Raises:
        CallerError: if the dataset is empty or none of its first data can be read.
    """
    data = job.open_dataset()
    if not data.ids:
        raise CallerError("the dataset is empty")
    digest, blocks = ids_digest(data.ids), job.counted_blocks(data)
    dataset = job.blocks_of(data, blocks)
    if (steps := job.read_steps()) is not None and steps.keys().isdisjoint(dataset.ids):
        raise CallerError(
            f"fit.step_plan: {job.fit.step_plan!r} names none of the {len(dataset.ids)} data of this dataset"
        )
    probed = _probed(job, dataset)
    signal = probed.signal
    fingerprint = job.fingerprint(digest)
    job = job.settled(signal, probed.contents)
    field = job.build_field(signal.dimensions, signal.channels)
    samples = signal.samples(probed.contents[0])
    if job.fit.sampling == "error" and samples.check is not None:
        raise CallerError(f"fit.{SELECTS_WITHOUT_CHECK}")
    if job.fit.samples == "full" and samples.source is not None:
        raise CallerError(f"fit.{DRAWN_IN_FULL}")
    available = samples.count
    per_step = available if job.fit.samples == "full" else min(job.fit.samples, available)
    optimizer = job.build_optimizer(per_step)
    if isinstance(optimizer, Solver) and (why := optimizer.too_large(field.layout.size, per_step * signal.channels)):
        raise CallerError(f"optimizer.kind={job.optimizer.kind} cannot be used: {why}")
    theta0, learned, factors = None, {}, None
    if job.field.init == "learned":
        start = _learned_start(job, dataset, signal, field, per_step)
        theta0, learned = start.theta0.numpy(), start.figures()
        factors = None if start.factors is None else start.factors.numpy()
    elif job.field.init == "shared":
        theta0 = theta0_of(field, job.seed).numpy()
    positions: list[int] = []
    if job.needs_calibration:
        wanted = job.optimizer.calibration_data
        positions = seeded_sample(dataset.ids, 4 * wanted, job.seed, "calibration")
    return Plan(
        id=uuid.uuid4().hex,
        fingerprint=fingerprint,
        job=job.model_dump(mode="json"),
        data_count=len(dataset.ids),
        ids_sha256=digest,
        label_type=probed.label_type,
        samples_per_step=per_step,
        shard_fields=_shard_fields(job, field, per_step * signal.points_per_sample, len(dataset.ids), device),
        layout=field.layout,
        forward={"field": field.forward_description(), "signal": signal.forward_description()} | job.tile_description(),
        theta0=theta0,
        calibration_positions=tuple(positions),
        blocks=blocks,
        learned=learned,
        factors=factors,
        versions=_versions(),
        format=FORMAT_VERSION,
    )


def _learned_start(job: EncodeJob, dataset: Dataset, signal: Signal, field: Field, per_step: int) -> LearnedStart:
    """theta0 from a sample of the dataset; a resume finds it in the plan.

    Raises:
        CallerError: if the dataset is smaller than the sample, or nothing was learned.
    """
    learner = job.build_learner()
    if len(dataset.ids) < learner.data:
        raise CallerError(
            f"field.init=learned learns from learning.data={learner.data} data, and the dataset has "
            f"{len(dataset.ids)}; use learning.data={len(dataset.ids)}, a larger dataset or field.init=shared"
        )
    positions = seeded_sample(dataset.ids, 4 * learner.data, job.seed, "learning")
    data = _samples_of_one_kind(dataset, signal, positions, learner.data, job.fit.samples == "full")
    if not data:
        raise CallerError("field.init=learned: none of the data drawn to learn from can be read; use field.init=shared")
    try:
        return learn_start(
            field,
            signal,
            data,
            learner=learner,
            **job.learning_rate_and_betas(per_step),
            seed=job.seed,
            samples=job.fit.samples,
            sampling=job.fit.sampling,
            step=job.fit.step,
        )
    except ValueError as error:
        raise CallerError(f"field.init=learned: {error}") from error


@dataclass(frozen=True)
class _Probed:
    """What the first data say of the rest."""

    signal: Signal
    contents: list[Any]
    """The first few data that can be read."""
    label_type: LabelType


def _probed(job: EncodeJob, dataset: Dataset) -> _Probed:
    """Read data until the signal and the type of the labels are decided.

    The first ones; where none of them can be read, some that are spread over the dataset.
    """
    contents: list[Any] = []
    labels: list[str | int] = []
    reason = ""
    tried = 0
    deciding = PROBED_BLOCKS if isinstance(dataset, Tiled) else _DECIDING_DATA
    with contextlib.closing(read_apart(dataset, _probed_positions(job, dataset))) as coming:
        for datum in coming:
            if tried >= _PROBED_DATA and contents:
                break
            tried += 1
            if datum.label is not None:
                labels.append(datum.label)
            if datum.content is None:
                reason = f"{datum.id}: {datum.error}"
            elif len(contents) < deciding:
                try:
                    job.build_signal([datum.content]).samples(datum.content)
                    contents.append(datum.content)
                except ValueError as error:
                    reason = f"{datum.id}: {error}"
            if len(contents) == deciding and labels:
                break
    if not contents:
        raise CallerError(f"none of {tried} data that were tried can be read; the last of them, {reason}")
    signal = job.build_signal(contents)
    label_type = "int64" if labels and isinstance(labels[0], int) else "string"
    return _Probed(signal, contents, label_type)


def _probed_positions(job: EncodeJob, dataset: Dataset) -> Iterator[int]:
    if isinstance(dataset, Tiled):
        yield from dataset.probe_positions()
    first = min(_PROBED_DATA, len(dataset.ids))
    yield from range(first)
    if first < len(dataset.ids):
        yield from seeded_sample(dataset.ids, 2 * _PROBED_DATA, job.seed, "probe")


def _label(datum: Datum, label_type: LabelType) -> str | int | None:
    """The datum's label in the type that the run has settled on; null where it is of another."""
    if label_type == "string":
        return None if datum.label is None else str(datum.label)
    return datum.label if isinstance(datum.label, int) else None


def _shard_fields(job: EncodeJob, field: Field, points: int, count: int, device: str) -> int:
    """How many fields a shard has, by what a fit of `points` points per step costs."""
    if job.store.shard_fields != "auto":
        return job.store.shard_fields
    flops = 6 * field.layout.size * points * job.fit.max_steps  # forward and backward of one fit
    by_time = int(_SHARD_SECONDS * _ASSUMED_FLOPS[device] / flops)
    low, high = _SHARD_FIELDS[device]
    return max(low, min(by_time, high, -(-count // _MINIMUM_SHARDS)))


def _versions() -> dict[str, str]:
    packages = ("nfscale", "torch", "numpy", "pyarrow")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": platform.python_version()}


# --- a run as a worker sees it


class OpenRun:
    """A run folder opened for work: the plan, and what is built from it, each once per process."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.plan = folder.plan()
        self.job = EncodeJob.model_validate(self.plan.job)
        self.signal: Signal = built(SIGNALS, self.plan.forward["signal"])
        self.field: Field = self.job.build_field(self.signal.dimensions, self.signal.channels)
        optimizer: Any = self.job.build_optimizer(self.plan.samples_per_step)
        if self.plan.factors is not None:
            optimizer = Scaled(optimizer, torch.from_numpy(self.plan.factors))
        self.optimizer: Optimizer | Solver = optimizer
        self.committed_at: float | None = None
        """When this process last had rows ready to be committed, by `time.perf_counter`."""
        if self.field.layout != self.plan.layout:
            raise EncodeError("the field of this nfscale has another layout than the run's; use the run's version")

    @cached_property
    def apply(self) -> Callable[[Field, Tensor], Apply]:
        """The fastest evaluation of fields in this process, equal to `plain_apply` but for rounding."""
        step: StepName = "plain" if self.job.fit.step == "plain" else "auto"  # the fit's own may be of a GPU
        return chosen(step, torch.device("cpu"), self.field, self.signal, self.optimizer).apply

    @property
    def medium(self) -> Medium:
        """How the data of this run are read, written and shown."""
        return MEDIA[self.job.signal.kind]

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, with the ids that the plan was made for.

        Raises:
            EncodeError: if they are others by now.
        """
        data, blocks = self.job.open_dataset(), self.plan.blocks
        if ids_digest(data.ids) != self.plan.ids_sha256:
            then = self.plan.data_count if blocks is None else sum(times for times, _ in blocks)
            raise EncodeError(
                f"the dataset has other ids than when the run was planned ({len(data.ids)} data now, "
                f"{then} then); data were added, removed or renamed: restore them, or use a new output"
            )
        return self.job.blocks_of(data, blocks)

    @property
    def theta0(self) -> Tensor | None:
        return None if self.plan.theta0 is None else torch.from_numpy(self.plan.theta0)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the fields share, as the run's first lease stored it."""
        if not self.job.needs_calibration:
            return None
        _, step_rms, diagonal = self.folder.calibration()
        every = self.job.optimizer.update_every
        return Calibration(torch.from_numpy(diagonal.copy()), torch.from_numpy(step_rms.copy()), every)

    @cached_property
    def steps(self) -> dict[str, int] | None:
        """The job's step plan, if it has one."""
        return None if self.job.fit.step_plan is None else self.folder.steps()

    def fits(
        self, data: Iterator[tuple[str, Samples]], *, stop: Stop | None = None, resume: Snapshot | None = None
    ) -> Iterator[Fitted | Check]:
        """Fit data as the job says, but for where to `stop`, if that is given; see `fit_and_checks`."""
        job, theta0 = self.job, self.theta0
        return fit_and_checks(
            self.field,
            self.signal,
            data,
            optimizer=self.optimizer,
            stop=stop or job.fit.stop(),
            seed=job.seed,
            init="per_datum" if theta0 is None else theta0,
            samples=job.fit.samples,
            sampling=job.fit.sampling,
            calibration=self.calibration,
            batch=job.fit.batch,
            step=job.fit.step,
            clock=time.perf_counter,
            resume=resume,
            step_plan=self.steps,
        )


def calibrate_run(run: OpenRun, positions: Sequence[int] | None = None) -> None:
    """Estimate what the fields share and store it, put-if-absent: the first lease of a run.

    Args:
        positions: of the data to try, in place of all that the plan has drawn.

    Raises:
        EncodeError: if too few data of the calibration sample can be read.
    """
    calibration = calibrate(
        run.field,
        run.signal,
        _calibration_samples(run, run.plan.calibration_positions if positions is None else positions),
        optimizer=run.optimizer,  # type: ignore[arg-type] (the job refuses other kinds)
        stop=run.job.fit.stop(),
        seed=run.job.seed,
        theta0=run.theta0,
        samples=run.job.fit.samples,
        sampling=run.job.fit.sampling,
        step=run.job.fit.step,
    ).to("cpu")
    steps = [row * calibration.every for row in range(len(calibration.diagonal))]
    if not bool(torch.isfinite(calibration.diagonal).all()):
        raise EncodeError(
            "the calibration diverged, so the fields would have no curvature to share; "
            "use a smaller optimizer.learning_rate, or optimizer.kind=adam"
        )
    run.folder.write_calibration(steps, calibration.step_rms.numpy(), calibration.diagonal.numpy())


def _calibration_samples(run: OpenRun, positions: Sequence[int]) -> list[tuple[str, Samples]]:
    """Of the calibration; see `_samples_of_one_kind`."""
    wanted = run.job.optimizer.calibration_data
    data = _samples_of_one_kind(run.dataset, run.signal, positions, wanted, run.job.fit.samples == "full")
    if not data:
        raise EncodeError("none of the data drawn for the calibration can be read; see `nfscale status` after a fit")
    return data


def _samples_of_one_kind(
    dataset: Dataset, signal: Signal, positions: Sequence[int], wanted: int, in_full: bool
) -> list[tuple[str, Samples]]:
    """The first `wanted` readable data of one kind at these positions, or all of the commonest kind."""
    by_kind: dict[Kind, list[tuple[str, Samples]]] = {}
    for position in positions:
        datum = dataset.read(position)
        prepared = prepared_of(signal, datum, in_full)
        if isinstance(prepared, Samples):
            prepared = replace(prepared, heldout=None)
            group = by_kind.setdefault(prepared.kind, [])
            group.append((datum.id, prepared))
            if len(group) == wanted:
                return group
    return max(by_kind.values(), key=len, default=[])


def prepared_of(signal: Signal, datum: Datum, in_full: bool) -> Samples | str:
    """A datum's samples, or the reason why it has none.

    Args:
        in_full: every step takes all of them.
    """
    if datum.content is None:
        return datum.error or "unreadable"
    try:
        samples = signal.samples(datum.content)
        return f"fit.{DRAWN_IN_FULL}" if in_full and samples.source is not None else samples
    except ValueError as error:
        return str(error)
    except MemoryError:
        return f"{_described(datum.content)} does not fit into the worker's memory"


def _described(content: Any) -> str:
    return f"an array of shape {list(content.shape)}" if isinstance(content, np.ndarray) else "the datum"


# --- a shard


def encode_shard(
    run: OpenRun,
    shard: Shard,
    *,
    attempt: str,
    order: int,
    worker: str,
    quarantine: str | None = None,
    epoch: int | None = None,
) -> Iterator[Progress | ShardReport]:
    """Fit the data of a shard, write their rows and commit them; the report comes last.

    A shard that is to be fitted `again` keeps its rows that are ok as they are.

    Args:
        attempt: names this attempt's file.
        order: the rank of this lease.
        quarantine: write the rows as `crashed` with this reason, without fitting.
        epoch: commit only while no driver of a later one has taken over.

    Raises:
        EncodeError: if the rows that were written are not the rows that are read back.
        SupersededError: if another driver has taken over.
    """
    started = time.perf_counter()
    rows: dict[str, Row] = {}
    spent = _Spent()
    if run.committed_at is not None:
        spent.seconds["between"] = started - run.committed_at
    former = run.folder.commit_of(shard) if shard.again else None
    kept = run.plan.table_schema().empty_table() if former is None else _ok_rows(run, former)
    begun = None if former is not None else checkpoint.load(run.folder, shard, run.plan.table_schema())
    if begun is not None:
        kept = begun.finished.filter(pc.field("datum_id").isin(list(run.dataset.ids[shard.start : shard.stop])))
    known = set(kept["datum_id"].to_pylist())
    if quarantine is None:
        resume = None if begun is None else begun.under_way
        for finished in _fitted(run, shard, attempt, rows, kept, resume, spent):
            yield Progress(shard.name, [f.quality for f in finished])
    else:
        for position in range(shard.start, shard.stop):
            datum_id = run.dataset.ids[position]
            if datum_id in known:
                continue
            seed = datum_seed(run.job.seed, datum_id)
            index = run.dataset.index_of(position)
            rows[datum_id] = Row(datum_id, index, "crashed", shard.index, attempt, seed, reason=quarantine)
    name = run.folder.data_file(shard, attempt)
    with spent.on("writing"):
        table = to_table(list(rows.values()), run.plan.table_schema(), run.plan.theta0)
        if len(kept):
            table = pa.concat_tables([kept, table], promote_options="none")
        table = table.sort_by("index")
        _write(run, shard, table, name)
        checksum = run.folder.files.sha256(name)
    commit = _commit_of(run, shard, table, name, checksum, attempt, order, worker, started, spent)
    run.committed_at = time.perf_counter()
    with _output(run, name):
        won = _is_first(run, commit, replaces=former is not None, epoch=epoch)
    if won and former is not None:
        run.folder.files.remove(former.file)
    if begun is not None or spent.seconds["keeping"]:
        run.folder.files.remove(run.folder.checkpoint_file(shard))
    yield ShardReport(commit, won, cut=not won and run.folder.is_cut(shard))


def _is_first(run: OpenRun, commit: Commit, replaces: bool, epoch: int | None) -> bool:
    """Commit, unless another attempt or another driver came before; then remove the file."""
    try:
        if epoch is not None:
            run.folder.refuse_superseded(epoch)
    except SupersededError:
        run.folder.files.remove(commit.file)
        raise
    won = run.folder.recommit(commit) if replaces else run.folder.commit(commit)
    if not won:
        run.folder.files.remove(commit.file)
    return won


class _Spent:
    """Wall seconds of a shard by what they went into, see `Commit.spent`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - before

    def on_check(self, check: Check) -> None:
        self.seconds["steps"] += check.step_seconds
        self.seconds["checks"] += check.check_seconds


def _ok_rows(run: OpenRun, commit: Commit) -> pa.Table:
    """The rows of a committed shard that need no other attempt."""
    table = pq.read_table(run.folder.files.source(commit.file)).cast(run.plan.table_schema())
    return table.filter(STATUS.isin(OK_STATUSES))


@dataclass(frozen=True)
class _Read:
    """A datum of a shard, and its samples if it has any."""

    row: Row
    content: Any = None
    samples: Samples | None = None

    @property
    def bytes(self) -> int:
        """What it takes in memory, about."""
        return getattr(self.content, "nbytes", 0) + (0 if self.samples is None else self.samples.bytes)


def _read(run: OpenRun, shard: Shard, attempt: str, known: set[str]) -> Generator[_Read, None, None]:
    """The data of a shard but for those that are `known`."""
    for position in range(shard.start, shard.stop):
        if run.dataset.ids[position] in known:
            continue
        datum = run.dataset.read(position)
        seed = datum_seed(run.job.seed, datum.id)
        label = _label(datum, run.plan.label_type)
        row = Row(datum.id, datum.index, "decode_error", shard.index, attempt, seed, datum.split, label)
        prepared = prepared_of(run.signal, datum, run.job.fit.samples == "full")
        if isinstance(prepared, str):
            row.reason = prepared
            yield _Read(row)
            continue
        row.metrics = run.signal.measures(datum.content) | datum.metrics
        if datum.repeat:
            row.metrics["repeat"] = float(datum.repeat)
        yield _Read(row, datum.content, prepared)


def _fitted(
    run: OpenRun,
    shard: Shard,
    attempt: str,
    rows: dict[str, Row],
    kept: pa.Table,
    resume: Snapshot | None,
    spent: _Spent,
) -> Iterator[list[Fitted]]:
    """Fit the shard but for the data whose rows are `kept`, filling `rows`.

    Yields the fields that finished since it last did; none, now and then, while all of them take long.
    """
    known = set(kept["datum_id"].to_pylist())
    in_work: dict[str, tuple[Any, Samples]] = {}

    def data() -> Iterator[tuple[str, Samples]]:
        in_turn = _read(run, shard, attempt, known)
        coming = in_turn if run.dataset.is_thread_bound else ahead(in_turn, lambda read: read.bytes)
        with contextlib.closing(coming):
            while True:
                with spent.on("reading"):
                    read = next(coming, None)
                if read is None:
                    return
                rows[read.row.datum_id] = read.row
                if read.samples is not None:
                    in_work[read.row.datum_id] = read.content, read.samples
                    yield read.row.datum_id, read.samples

    events = run.fits(data(), resume=resume)
    together: list[Fitted] = []
    unmeasured: list[Row] = []
    reported = saved = time.perf_counter()

    def measure() -> None:
        with spent.on("measuring"):
            _measure(run, [(row, *in_work.pop(row.datum_id)) for row in unmeasured])
        unmeasured.clear()

    def save(under_way: Snapshot) -> None:
        measure()
        with spent.on("keeping"), _output(run, run.folder.checkpoint_file(shard)):
            done = [row for row in rows.values() if row.weights is not None]
            table = to_table(done, run.plan.table_schema(), run.plan.theta0)
            table = pa.concat_tables([kept, table], promote_options="none")
            checkpoint.save(run.folder, shard, checkpoint.Checkpoint(table, under_way))

    for event in events:
        if isinstance(event, Fitted):
            row = rows[event.id]
            _fill(row, event)
            together.append(event)
            unmeasured.append(row)
            if len(unmeasured) == _MEASURED_TOGETHER:
                measure()
        else:
            spent.on_check(event)
            if time.perf_counter() - saved > 60 * run.job.checkpoint_minutes and event.snapshot is not None:
                save(event.snapshot())
                saved = time.perf_counter()
        if time.perf_counter() - reported > (_REPORT_SECONDS if together else _BEAT_SECONDS):
            yield together
            together, reported = [], time.perf_counter()
    measure()
    if together:
        yield together


def _fill(row: Row, fitted: Fitted) -> None:
    row.status, row.weights = str(fitted.result), fitted.weights.numpy()
    row.loss, row.quality, row.quality_heldout = fitted.loss, fitted.quality, fitted.quality_heldout
    row.steps, row.steps_to_target = fitted.steps, fitted.steps_to_target
    row.history_step, row.history_quality = fitted.history_step, fitted.history_quality
    row.wall_seconds = fitted.wall_seconds
    if fitted.restarts:
        row.metrics["restarts"] = float(fitted.restarts)
    if not fitted.result.ok:
        row.reason = (
            f"diverged in each of {fitted.restarts + 1} attempts, the last at 1/{2**fitted.restarts} of the "
            "learning rate; the weights are the best that any check saw"
        )


def _measure(run: OpenRun, data: list[tuple[Row, Any, Samples]]) -> None:
    """Record what readers of the stored weights will find: further measures, and where storage rounds loss and quality.

    What fits measure themselves is measured in float32, whatever their steps compute in, as readers do it.
    """
    by_kind: dict[Kind, list[tuple[Row, Samples]]] = {}
    by_shape: dict[tuple[Any, ...], list[tuple[Row, Any]]] = {}
    for row, content, samples in data:
        by_kind.setdefault(samples.kind, []).append((row, samples))
        if samples.source is not None:  # more than is decoded at once
            continue
        original = run.signal.original(content)
        if run.medium.measurable(original):
            by_shape.setdefault(run.signal.shape_of(row.metrics), []).append((row, original))
    for shape, shown in by_shape.items():
        weights = _as_stored(run, [row for row, _ in shown])
        values = predicted_at(run.field, run.signal, weights, run.signal.coordinates(shape), run.apply)
        for (row, original), rebuilt in zip(shown, run.signal.reconstruct(values, shape), strict=True):
            row.metrics |= run.medium.measures(original, rebuilt)
    if run.plan.dtype == "float32":
        return
    for group in by_kind.values():
        alike = group if len(group) > 1 else group * 2  # a lone field rounds differently, see field_chunks
        weights = _as_stored(run, [row for row, _ in alike])
        stacked = stack_samples([samples for _, samples in alike], torch.device("cpu"))
        loss, quality = (measured.tolist() for measured in evaluate(run.field, run.signal, weights, stacked))
        held_back: list[float | None] = [None] * len(alike)
        if stacked.heldout is not None:
            held_back = evaluate(run.field, run.signal, weights, stacked.heldout)[1].tolist()
        for place, (row, _) in enumerate(group):
            row.loss, row.quality, row.quality_heldout = loss[place], quality[place], held_back[place]


def _as_stored(run: OpenRun, rows: list[Row]) -> Tensor:
    """The weights that a reader will find: float32 [F, P]."""
    weights = np.stack([row.weights for row in rows if row.weights is not None])
    dtype, theta0 = run.plan.dtype, run.plan.theta0
    return torch.from_numpy(restored(stored(weights, dtype, theta0), dtype, theta0))


@contextlib.contextmanager
def _output(run: OpenRun, name: str) -> Iterator[None]:
    """An output that cannot be written ends the run: no other shard would fare better."""
    try:
        yield
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else str(error)
        place = run.folder.files.place(name)
        raise OutputError(
            f"cannot write {place}: {what}; what is committed stays, and the same command goes on"
        ) from error


def _write(run: OpenRun, shard: Shard, table: pa.Table, name: str) -> None:
    """Write the rows and read them back: what is committed is what is stored."""
    files = run.folder.files
    with _output(run, name):
        with files.writing(name) as stream:
            write_parquet(table, stream)
        with pq.ParquetFile(files.source(name)) as opened:
            written = opened.read(columns=["datum_id"])["datum_id"]
            schema = opened.schema_arrow
    if written.to_pylist() != table["datum_id"].to_pylist() or len(written) != len(shard):
        files.remove(name)
        raise EncodeError(f"{name} holds {len(written)} rows after writing {len(table)} of {len(shard)} data")
    if not schema.equals(table.schema):
        files.remove(name)
        raise EncodeError(f"{name} was read back with another schema than it was written with")


def _commit_of(
    run: OpenRun,
    shard: Shard,
    table: pa.Table,
    name: str,
    checksum: str,
    attempt: str,
    order: int,
    worker: str,
    started: float,
    spent: "_Spent",
) -> Commit:
    qualities = table["quality"].drop_null().to_numpy()
    qualities = qualities[np.isfinite(qualities)]
    quality = {}
    if len(qualities):
        p05, p50, p95 = np.percentile(qualities, [5, 50, 95])
        quality = {"mean": float(qualities.mean()), "p05": float(p05), "p50": float(p50), "p95": float(p95)}
    steps = table["steps"].drop_null().to_numpy()
    return Commit(
        shard=shard.name,
        index=shard.index,
        start=shard.start,
        stop=shard.stop,
        file=name,
        rows=len(table),
        bytes=run.folder.files.size(name) or 0,
        sha256=checksum,
        attempt=attempt,
        order=order,
        worker=worker,
        committed_at=time.time(),
        seconds=time.perf_counter() - started,
        fit_seconds=spent.seconds["steps"] + spent.seconds["checks"],
        spent=dict(spent.seconds),
        counts=dict(Counter(table["status"].to_pylist())),
        quality=quality,
        steps_mean=float(steps.mean()) if len(steps) else 0.0,
    )


def new_attempt() -> str:
    """A name that no other attempt has."""
    return uuid.uuid4().hex[:12]
