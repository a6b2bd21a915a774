"""Who does what next: leases of shards, retries, bisection, quarantine. A pure state machine.

It knows no Ray, no files and no clock, and imports the standard library only; the driver tells it what
happened and asks it what to do. A shard is anything with a `name`, a length and `halves()`.

Failures have classes. INFRA (a node lost, preempted or drained): the shard goes back to the queue and
nothing is counted. CRASH (the process died on a live node) and TASK (an exception): counted, and after
`attempts_before_bisection` the shard is cut in two, down to the one datum that does it, which is then
quarantined: its lease writes a row that says so. STORAGE (a full disk, a lost permission, a store that
does not answer): no datum's fault and no attempt's, the run ends with what is committed. The same TASK error
on `fatal_shards` shards before anything has succeeded is nobody's datum: the run ends with that error.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol


class ShardLike(Protocol):
    """What the coordinator needs to know of a shard."""

    @property
    def name(self) -> str: ...

    @property
    def again(self) -> bool:
        """It is committed already and tried anew; if that fails, it stays as it is."""
        ...

    def __len__(self) -> int: ...

    def halves(self) -> tuple[Any, Any]: ...


class Failure(Enum):
    """Whose fault it was."""

    INFRA = "infra"
    CRASH = "crash"
    TASK = "task"
    STORAGE = "storage"


@dataclass(frozen=True)
class Lease:
    """One attempt at a shard, or at the calibration that comes before all shards."""

    id: int
    """Unique in a run, also over restarts of the driver: the order of commits."""
    shard: Any
    """None: the calibration."""
    worker: str
    quarantine: str | None = None


@dataclass
class _Task:
    shard: ShardLike
    failures: int = 0
    quarantine: str | None = None


@dataclass
class Coordinator:
    """Leases shards until each has succeeded once.

    Args:
        shards: what is not yet committed.
        calibrate: whether one calibration comes first.
        first_lease: where lease numbers start, above all that the run has used.
    """

    shards: Iterable[Any]
    calibrate: bool = False
    first_lease: int = 0
    attempts_before_bisection: int = 2
    fatal_shards: int = 3
    fatal: str | None = None
    """Why the run cannot go on, once it cannot."""

    _queue: deque[_Task] = field(default_factory=deque)
    _flying: dict[int, tuple[Lease, _Task | None]] = field(default_factory=dict)
    _succeeded: int = 0
    _errors: dict[str, set[str]] = field(default_factory=dict)
    _calibration_failures: int = 0

    def __post_init__(self) -> None:
        self._queue = deque(_Task(shard) for shard in self.shards)
        self._next = self.first_lease

    @property
    def finished(self) -> bool:
        """Nothing is left to do and nothing is under way."""
        return not self._queue and not self._flying and not self.calibrate

    @property
    def in_flight(self) -> list[Lease]:
        return [lease for lease, _ in self._flying.values()]

    def lease(self, worker: str) -> Lease | None:
        """Work for an idle worker, or None while there is none (there may be some later)."""
        if self.fatal:
            return None
        if self.calibrate:
            if any(lease.shard is None for lease in self.in_flight):
                return None
            return self._grant(None, worker)
        return self._grant(self._queue.popleft(), worker) if self._queue else None

    def _grant(self, task: _Task | None, worker: str) -> Lease:
        lease = Lease(self._next, task and task.shard, worker, task and task.quarantine)
        self._next += 1
        self._flying[lease.id] = (lease, task)
        return lease

    def succeeded(self, lease: Lease) -> None:
        """The lease's work is committed, by this attempt or another."""
        if self._flying.pop(lease.id, None) is None:
            return
        if lease.shard is None:
            self.calibrate = False
        else:
            self._succeeded += 1

    def failed(self, lease: Lease, failure: Failure, message: str) -> None:
        """The lease's attempt is over without a commit."""
        if failure is Failure.STORAGE:
            self.fatal = message
        _, task = self._flying.pop(lease.id, (None, None))
        if task is None:
            if lease.shard is None and failure is not Failure.INFRA:
                self._calibration_failures += 1
                if self._calibration_failures >= self.attempts_before_bisection:
                    self.fatal = f"the calibration failed: {message}"
            return
        if failure is Failure.INFRA:
            self._queue.appendleft(task)
            return
        if failure is Failure.TASK and not self._succeeded:
            seen = self._errors.setdefault(message, set())
            seen.add(task.shard.name)
            if len(seen) >= self.fatal_shards:
                self.fatal = f"the same error ended {len(seen)} shards and none succeeded: {message}"
        task.failures += 1
        if task.quarantine is not None:
            self.fatal = f"{task.shard.name} cannot even be quarantined: {message}"
        elif task.failures < self.attempts_before_bisection:
            self._queue.append(task)
        elif task.shard.again:
            return
        elif len(task.shard) > 1:
            self._queue.extend(_Task(half) for half in task.shard.halves())
        else:
            self._queue.append(_Task(task.shard, quarantine=f"{failure.value} in each attempt: {message}"))
