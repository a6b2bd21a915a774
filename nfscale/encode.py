"""What a worker does: read a shard, fit it, write its rows, commit them.

A shard is idempotent: its rows depend on the plan alone, its file has a name of its own, and of several
attempts the first to commit counts.
"""

import contextlib
import os
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nfscale import checkpoint
from nfscale.ahead import ahead
from nfscale.datasets import Datum
from nfscale.engine import Check, Fitted, Snapshot
from nfscale.engine.staging import Staged, staging
from nfscale.engine.step import evaluate, predicted_at, stack_samples
from nfscale.errors import EncodeError, OutputError, SupersededError
from nfscale.rng import datum_seed
from nfscale.run import OpenRun, prepared_of
from nfscale.signals import Kind, Samples
from nfscale.store.run_folder import Commit, Shard
from nfscale.store.schema import OK_STATUSES, STATUS, LabelType, Row, restored, stored, to_table, write_parquet

_REPORT_SECONDS = 0.5  # between two reports of progress: a message per field would cost more than it tells
_BEAT_SECONDS = 5.0  # where there is none
_MEASURED_TOGETHER = 16  # fields: their samples are held that long


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
    coming: Samples | Staged | None = None
    """The samples, or that they are on their way to the device of the fit."""

    @property
    def bytes(self) -> int:
        """What it takes in memory, about."""
        return getattr(self.content, "nbytes", 0) + (0 if self.samples is None else self.samples.bytes)


def _read(
    run: OpenRun, shard: Shard, attempt: str, known: set[str], staged: Callable[[Samples], Samples | Staged]
) -> Generator[_Read, None, None]:
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
        yield _Read(row, datum.content, prepared, staged(prepared))


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

    def data() -> Iterator[tuple[str, Samples | Staged]]:
        in_turn = _read(run, shard, attempt, known, staging())
        coming = in_turn if run.dataset.is_thread_bound else ahead(in_turn, lambda read: read.bytes)
        with contextlib.closing(coming):
            while True:
                with spent.on("reading"):
                    read = next(coming, None)
                if read is None:
                    return
                rows[read.row.datum_id] = read.row
                if read.samples is not None and read.coming is not None:
                    in_work[read.row.datum_id] = read.content, read.samples
                    yield read.row.datum_id, read.coming

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


def _label(datum: Datum, label_type: LabelType) -> str | int | None:
    """The datum's label in the type that the run has settled on; null where it is of another."""
    if label_type == "string":
        return None if datum.label is None else str(datum.label)
    return datum.label if isinstance(datum.label, int) else None
