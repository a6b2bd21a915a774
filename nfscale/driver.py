"""The loop that serves the coordinator: idle workers get leases, what happens to them is told back.

Everything durable is in the run folder, so a driver may die at any moment; the next one reads the
commits and continues. Observers are told what happens and decide for themselves what to do with it.
"""

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nfscale.coordinator import Coordinator, Failure, Lease
from nfscale.datasets.base import ids_digest
from nfscale.encode import Progress, ShardReport, new_attempt
from nfscale.errors import CallerError, EncodeError, SupersededError
from nfscale.job import EncodeJob
from nfscale.planner import make_plan
from nfscale.pool import Advanced, Event, Failed, Pool, Succeeded
from nfscale.store.run_folder import ESTIMATE, Commit, Plan, RunFolder, Shard

_POLL_SECONDS = 0.5
BEAT_SECONDS = 5.0
"""Between two signs of life; a driver that gave none for several times as long is taken for dead."""


class Observer(Protocol):
    """Someone who watches a run: a progress bar, a tracker."""

    def on_start(self, folder: RunFolder, plan: Plan, commits: list[Commit]) -> None: ...

    def on_progress(self, progress: Progress) -> None: ...

    def on_commit(self, commit: Commit) -> None: ...

    def on_waiting(self, what: str | None) -> None:
        """Every few seconds: what keeps the run from going on, if anything does."""
        ...

    def on_tick(self) -> None: ...


@dataclass
class Summary:
    """How a run stands, over all its drivers."""

    output: str
    name: str
    fields: int = 0
    failed: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    """Of this driver, first lease to last commit."""
    fitted_here: int = 0
    """Fields that this driver's workers committed."""
    workers: int = 0
    """That had a lease of this driver at the same time, at most."""
    spent: dict[str, float] = field(default_factory=dict)
    """Wall seconds of these workers by what they went into, see `Commit.spent`; all of theirs are
    `seconds` times `workers`."""
    tracking: dict[str, float] = field(default_factory=dict)
    """Seconds that MLflow took beside the work, see `Tracker.seconds`."""
    shards: int = 0
    """Committed, parts of those that were cut among them."""
    driver_cpu_seconds: float = 0.0
    """Of this driver, first lease to last commit; workers have processes of their own but with `workers=0`."""
    driver_peak_mb: float = 0.0
    """The most memory that its process has held."""
    first_lease_at: float | None = None
    """By `time.monotonic`."""
    was_complete: bool = False
    completed: bool = False
    """This driver has committed the last datum of the run."""

    @property
    def fields_per_second(self) -> float:
        return self.fitted_here / self.seconds if self.seconds else 0.0


def refuse_foreign(folder: RunFolder) -> bool:
    """Check that a folder is a run's or may become one; whether it is a run's already.

    Raises:
        CallerError: if it holds something else, is a file or cannot be looked into.
    """
    output = str(folder)
    try:
        if folder.has_plan:
            return True
        others = [name for name in folder.files.some_entries(4) if name != ESTIMATE][:3]
    except NotADirectoryError as error:
        raise CallerError(f"output {output!r} is a file; give a folder") from error
    except OSError as error:
        raise CallerError(f"cannot look into the output {output!r}: {error.strerror or error}") from error
    if others:
        raise CallerError(
            f"output {output!r} is not empty and not a run folder (it holds {', '.join(others)}); give a new folder"
        )
    return False


def open_run(job: EncodeJob, device: str = "cpu") -> tuple[RunFolder, Plan]:
    """The run folder with its frozen plan: made now, or found there.

    Raises:
        CallerError: if the folder belongs to another job or holds something else.
        MismatchError: if files that are committed are gone.
    """
    folder = RunFolder(job.output)
    planned = refuse_foreign(folder)
    if planned:
        plan = folder.plan()
        folder.refuse_other(plan, job.fingerprint(ids_digest(job.open_dataset().ids)), job.model_dump(mode="json"))
        folder.keep_steps(job.read_steps())  # if the first start ended before it did
        folder.refuse_missing_files()
        if folder.is_complete and sum(commit.rows for commit in folder.commits()) < plan.data_count:
            folder.unfinish()  # commits were removed since: their data are fitted again
        return folder, plan
    plan = make_plan(job, device)
    try:
        return folder, folder.freeze(plan, job.read_steps())
    except OSError as error:
        raise CallerError(f"cannot write the output {job.output!r}: {error.strerror or error}") from error


def remaining(shards: Sequence[Shard], commits: Sequence[Commit], cuts: Collection[str] = ()) -> list[Shard]:
    """What is not committed yet; a shard that was cut, or of which a part is committed, stays cut where it was cut."""
    done = {commit.shard for commit in commits}
    cut = set(cuts)
    for name in done:
        whole, _, part = name.removeprefix("shard-").partition("-")
        cut.update(f"shard-{whole}" + (f"-{part[:end]}" if end else "") for end in range(len(part)))
    open_shards: list[Shard] = []

    def visit(shard: Shard) -> None:
        if shard.name in done:
            return
        if shard.name in cut:
            for half in shard.halves():
                visit(half)
        else:
            open_shards.append(shard)

    for shard in shards:
        visit(shard)
    return open_shards


@dataclass(frozen=True)
class Share:
    """What one of several drivers of a run does: every `of`-th shard, from number `index` on.

    They know nothing of each other: shards are committed put-if-absent, and lease numbers are theirs by the remainder.
    A driver of the whole run that starts later takes their shares over; two drivers of one share do its work twice.
    """

    index: int
    of: int

    @classmethod
    def parsed(cls, text: str) -> "Share":
        """`3/16`: the fourth of sixteen.

        Raises:
            CallerError: if it is none.
        """
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise CallerError(f"--shards {text!r} is no share; write i/n with i from 0 to n - 1, such as 3/16")
        return cls(int(index), int(of))

    def holds(self, shard: Shard) -> bool:
        """Whether this shard, or the one that it is a part of, belongs to the share."""
        return shard.index % self.of == self.index

    def first_lease(self, used: int) -> int:
        """The first lease number of this share that is not below `used`."""
        return used + (self.index - used) % self.of

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


_ALL = Share(0, 1)


def with_failures(commits: Sequence[Commit]) -> list[Shard]:
    """The committed shards that hold failed data."""
    return [
        Shard(c.index, c.start, c.stop, c.shard.partition("-")[2].partition("-")[2], again=True)
        for c in commits
        if c.failed
    ]


def serve(
    folder: RunFolder,
    plan: Plan,
    pool: Pool,
    observers: Sequence[Observer],
    retry_failed: bool = False,
    share: Share | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Give out leases until every datum has a committed row, or every one of the share.

    Args:
        retry_failed: fit the data anew whose committed rows have failed, beside what has no row yet.
        share: do these shards alone, beside drivers of other shares; without, take the run over from all others.
        clock: seconds.

    Raises:
        EncodeError: if the run cannot go on; what is committed stays.
        SupersededError: if another driver has taken over.
    """
    if folder.is_complete and not retry_failed:
        return Summary(str(folder), plan.job["name"])
    epoch = folder.take_over() if share is None else folder.epoch
    name = None if share is None else str(share)
    try:
        summary = _Service(folder, plan, pool, observers, retry_failed, share, epoch, clock).run()
    except SupersededError:
        raise  # what says that a driver runs is the other's by now
    except BaseException:
        folder.driver_left(name)
        raise
    folder.driver_left(name)
    return summary


class _Service:
    """A driver at work."""

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        pool: Pool,
        observers: Sequence[Observer],
        retry_failed: bool,
        share: Share | None,
        epoch: int | None,
        clock: Callable[[], float],
    ) -> None:
        self.folder, self.plan, self.pool, self.observers = folder, plan, pool, observers
        self.share, self.epoch, self.clock = share, epoch, clock
        ours = share or _ALL
        job = EncodeJob.model_validate(plan.job)
        commits, cuts = folder.commits_and_cuts()
        again = with_failures(commits) if retry_failed else []
        self.coordinator = Coordinator(
            filter(ours.holds, remaining(plan.shards(), commits, cuts) + again),
            calibrate=job.needs_calibration and not folder.has_calibration,
            first_lease=ours.first_lease(max((commit.order for commit in commits), default=-1) + 1),
            lease_stride=ours.of,
            epoch=epoch,
        )
        self.summary = Summary(str(folder), job.name)
        self.leases: dict[str, Lease] = {}
        """By worker."""
        self.ended: list[str] = []
        """Attempts that this driver has ended."""
        self.beaten = -math.inf

    def run(self) -> Summary:
        coordinator, summary, begun = self.coordinator, self.summary, time.process_time()
        while not coordinator.finished:
            if self.clock() - self.beaten > BEAT_SECONDS:
                self.beaten = self.clock()
                self._beat()
            if coordinator.fatal:
                self._refuse_superseded()
                raise EncodeError(coordinator.fatal)
            self._cut()
            self.pool.want(coordinator.wanted)
            self._lease()
            for event in self.pool.poll(_POLL_SECONDS):
                self._hear(event)
            for lease in coordinator.given_up():
                self._end(lease)
            for observer in self.observers:
                observer.on_tick()
        now = self.clock()
        summary.seconds = now - summary.first_lease_at if summary.first_lease_at is not None else 0.0
        summary.driver_cpu_seconds, summary.driver_peak_mb = time.process_time() - begun, peak_mb()
        self.folder.remove_attempts(self.ended)
        rows = sum(commit.rows for commit in self.folder.commits())
        if rows != self.plan.data_count:
            if self.share is not None and not self._left_over():
                return summary  # the others are at work
            raise EncodeError(
                f"the commits hold {rows} rows of {self.plan.data_count} data; `nfscale verify` says which"
            )
        summary.completed = self.folder.finish(rows)
        return summary

    def _left_over(self) -> list[Shard]:
        """Shards that should be committed by now, and are not."""
        commits, cuts = self.folder.commits_and_cuts()
        return list(filter((self.share or _ALL).holds, remaining(self.plan.shards(), commits, cuts)))

    def _refuse_superseded(self) -> None:
        if self.epoch is not None:
            self.folder.refuse_superseded(self.epoch)

    def _beat(self) -> None:
        """Say that this driver lives, and end the workers that do not."""
        self._refuse_superseded()
        self.folder.beat(_sign_of_life(self.leases), self.share and str(self.share))
        waiting = self.pool.waiting()
        for observer in self.observers:
            observer.on_waiting(waiting)
        for lease in self.coordinator.expired(self.clock()):
            self._end(lease)
            self.coordinator.failed(lease, Failure.CRASH, "no sign of progress for too long", self.clock())

    def _end(self, lease: Lease) -> None:
        """End an attempt from outside."""
        if (known := self.leases.get(lease.worker)) is None or known.id != lease.id:
            return
        del self.leases[lease.worker]
        self.ended.append(known.attempt)
        self.pool.cancel(lease.worker)

    def _cut(self) -> None:
        while cuts := self.coordinator.cuts:
            self._refuse_superseded()
            for shard in cuts:
                (self.coordinator.cut if self.folder.cut(shard) else self.coordinator.committed)(shard)

    def _lease(self) -> None:
        for worker in self.pool.idle():
            if (lease := self.coordinator.lease(worker, self.clock())) is None:
                return
            if self.summary.first_lease_at is None:
                self.summary.first_lease_at = self.clock()
            self.leases[worker] = replace(lease, attempt=new_attempt())
            self.summary.workers = max(self.summary.workers, len(self.leases))
            self.pool.start(self.leases[worker])

    def _hear(self, event: Event) -> None:
        now = self.clock()
        match event:
            case Advanced(worker, progress):
                if lease := self.leases.get(worker):
                    self.coordinator.progressed(lease, now)
                for observer in self.observers:
                    observer.on_progress(progress)
            case Succeeded(worker, report):
                if lease := self.leases.pop(worker, None):
                    self._succeeded(lease, report, now)
            case Failed(worker, failure, message):
                if lease := self.leases.pop(worker, None):
                    self.coordinator.failed(lease, failure, message, now)

    def _succeeded(self, lease: Lease, report: ShardReport | None, now: float) -> None:
        if report is not None and report.cut:
            self.coordinator.was_cut(lease)
            return
        self.coordinator.succeeded(lease, now)
        spent = self.summary.spent
        if report is None:
            spent["calibration"] = now - (self.summary.first_lease_at or 0.0)
        elif report.won:
            self.summary.fitted_here += report.commit.rows
            for what, seconds in report.commit.spent.items():
                spent[what] = spent.get(what, 0.0) + seconds
            for observer in self.observers:
                observer.on_commit(report.commit)


def _sign_of_life(leases: dict[str, Lease]) -> dict[str, Any]:
    in_flight = {w: lease.shard.name if lease.shard else "calibration" for w, lease in leases.items()}
    return {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), "in_flight": in_flight}


def peak_mb() -> float:
    """The most memory that this process has held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def totals(folder: RunFolder, summary: Summary) -> Summary:
    """Fill in the counts over all commits."""
    commits = folder.commits()
    summary.counts, summary.fields, summary.failed, summary.shards = {}, 0, 0, len(commits)
    for commit in commits:
        summary.fields += commit.rows
        summary.failed += commit.failed
        for status, count in commit.counts.items():
            summary.counts[status] = summary.counts.get(status, 0) + count
    return summary
