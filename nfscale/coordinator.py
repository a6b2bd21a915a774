"""Who does what next: leases of shards, retries, bisection, quarantine, second attempts. A pure state machine.

It knows no Ray, no files and no clock, and imports the standard library only: the driver tells it what happened and
when, and asks it what to do. A shard is anything with a `name`, a length and `halves()`.

Failures have classes. INFRA (a node lost, preempted or drained) is not counted: the shard waits a little longer each
time. CRASH (the process died on a live node, or gave no sign of progress) and TASK (an exception) are counted: a shard
has `attempts_before_bisection` of them, then it is cut. Its parts have one each, and the single datum that is left in
the end is quarantined: its lease writes a row that says so. A shard of n data is cut twice at first, so that none of
them is tried more than log2(n) + 2 times. STORAGE (a full disk, a lost permission, a store that does not answer): no
datum's fault and no attempt's, the run ends with what is committed. The same error on `fatal_shards` shards before
anything has succeeded is nobody's datum either: the run ends with that error (a CRASH, which may be chance, counts
where a shard is cut for it).

Danger: an attempt that is given up may be alive and commit yet. Commits are first-wins, and so is the cut of a shard:
`cuts` are carried out by the driver under the name of the shard's own commit, and whichever comes second is told so.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

_BACKOFF_SECONDS = (1.0, 60.0)
"""After the second INFRA failure of a shard, doubled for each further one, up to the second number."""
_MOST_DOUBLINGS = 10
_GAP_WEIGHT = 0.2  # of the newest gap between two signs of progress, in their running mean
_DEADLINE_GAPS = 10  # of them without a sign, and a worker is taken for stuck
_STRAGGLING = 2.0  # times what nine of ten leases took
_ENOUGH_LEASES = 3  # before that is known
_PORTIONS = [(0, 1)] * 3 + [(0, 2), (1, 2)] + [(start, 4) for start in range(4)]
"""First and step of the data that a calibration tries after as many crashes: all, then halves, then quarters."""


class ShardLike(Protocol):
    """What the coordinator needs to know of a shard."""

    @property
    def name(self) -> str: ...

    @property
    def part(self) -> str:
        """Which part of a shard that was cut; empty for a whole one."""
        ...

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
    crashes: int = 0
    """Of calibrations before this one, see `portion`."""
    epoch: int | None = None
    """Of the driver that gave it; None where drivers work side by side."""
    attempt: str = ""
    """Names its files, as no other attempt's are; the driver's to give."""


def portion(positions: tuple[int, ...], crashes: int) -> tuple[int, ...]:
    """Which data a calibration tries after this many that killed their worker.

    All of them, some times; then each half and each quarter, so that one deadly datum is not among some of these.
    """
    first, step = _PORTIONS[crashes]
    return positions[first::step]


@dataclass(eq=False)
class _Task:
    """A shard, or a part of one, that is to end in one commit."""

    shard: Any
    """None: the calibration."""
    attempts: int
    """Left before it is cut, or quarantined."""
    budget: int
    """Attempts left that may touch one datum of the whole shard it comes from."""
    within: tuple[str, ...] = ()
    """The names of the shards that it is a part of."""
    failures: int = 0
    setbacks: int = 0
    """Failures that are not counted."""
    quarantine: str | None = None
    flying: dict[int, "_Flight"] = field(default_factory=dict)

    @property
    def may_have_a_second(self) -> bool:
        """A second attempt beside the first, should that be slow: never where one of them may kill its worker."""
        return self.shard is not None and not (self.failures or self.shard.part or self.shard.again or self.quarantine)


@dataclass(eq=False)
class _Flight:
    lease: Lease
    task: _Task
    since: float
    sign: float
    """When it last gave a sign of progress."""


@dataclass
class Coordinator:
    """Leases shards until each has succeeded once. Times are seconds of any clock that only goes forward.

    Args:
        shards: what is not yet committed.
        calibrate: whether one calibration comes first.
        first_lease: where lease numbers start, above all that the run has used.
        lease_stride: from one number to the next, where others number the leases in between.
        epoch: of the driver, handed on with each lease.
        progress_seconds: that a lease may go without a sign of progress, at least; on a worker's first lease any time.
        straggler_seconds: that a lease is left alone, at least, before a second attempt is made beside it.
    """

    shards: Iterable[Any]
    calibrate: bool = False
    first_lease: int = 0
    lease_stride: int = 1
    epoch: int | None = None
    attempts_before_bisection: int = 2
    fatal_shards: int = 3
    progress_seconds: float = 900.0
    straggler_seconds: float = 10.0
    fatal: str | None = None
    """Why the run cannot go on, once it cannot."""

    _ready: deque[_Task] = field(default_factory=deque)
    _waiting: list[tuple[float, int, _Task]] = field(default_factory=list)
    """Until when, and what; a heap."""
    _cutting: dict[str, _Task] = field(default_factory=dict)
    _open: int = 0
    """Tasks that have not ended."""
    _flying: dict[int, _Flight] = field(default_factory=dict)
    _alone: dict[int, _Flight] = field(default_factory=dict)
    """Those that a second attempt may be made beside, the oldest first."""
    _given_up: list[Lease] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)
    """Workers that have ended a lease."""
    _seconds: list[float] = field(default_factory=list)
    """What leases took that succeeded, sorted."""
    _gap: float = 0.0
    _succeeded: bool = False
    _errors: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for shard in self.shards:
            self._add(self._task(shard))
        self._next = self.first_lease
        self._calibration = _Task(None, self.attempts_before_bisection, len(_PORTIONS))

    def _task(self, shard: Any) -> _Task:
        attempts = 1 if shard.part else self.attempts_before_bisection
        return _Task(shard, attempts, len(shard).bit_length() + 1)  # floor(log2(n)) + 2

    def _add(self, task: _Task) -> None:
        self._open += 1
        self._ready.append(task)

    # --- what there is to do

    @property
    def finished(self) -> bool:
        """Every shard has ended; attempts that lost may still be under way."""
        return not self._open and not self.calibrate

    @property
    def wanted(self) -> int:
        """How many workers would be of use: one for each shard, and a spare for each that may come back."""
        return max(1, self._open + len(self._flying))

    @property
    def in_flight(self) -> list[Lease]:
        return [flight.lease for flight in self._flying.values()]

    @property
    def cuts(self) -> list[Any]:
        """Shards to be cut: for each of them `cut` or `committed` says what came of it."""
        return [task.shard for task in self._cutting.values()]

    def given_up(self) -> list[Lease]:
        """Attempts that another has overtaken, each told once: whoever does them can stop."""
        leases, self._given_up = self._given_up, []
        return leases

    def expired(self, now: float) -> list[Lease]:
        """Leases that gave no sign of progress for too long: their workers are stuck, and `failed` says so."""
        longest = max(self.progress_seconds, _DEADLINE_GAPS * self._gap)
        return [
            flight.lease
            for flight in self._flying.values()
            if flight.lease.shard is not None and flight.lease.worker in self._known and now - flight.sign > longest
        ]

    def lease(self, worker: str, now: float) -> Lease | None:
        """Work for an idle worker, or None while there is none (there may be some later)."""
        if self.fatal:
            return None
        if self.calibrate:
            return None if self._calibration.flying else self._grant(self._calibration, worker, now)
        while self._waiting and self._waiting[0][0] <= now:
            self._ready.append(heapq.heappop(self._waiting)[2])
        if self._ready:
            return self._grant(self._ready.popleft(), worker, now)
        task = self._straggling(worker, now)
        return None if task is None else self._grant(task, worker, now)

    def _straggling(self, worker: str, now: float) -> _Task | None:
        """What has been under way for so long that a second attempt may well overtake it."""
        if len(self._seconds) < _ENOUGH_LEASES:
            return None
        usual = self._seconds[9 * len(self._seconds) // 10]
        longest = max(self.straggler_seconds, _STRAGGLING * usual)
        for flight in self._alone.values():
            if now - flight.since <= longest:
                return None
            if flight.lease.worker != worker:
                del self._alone[flight.lease.id]
                return flight.task
        return None

    def _grant(self, task: _Task, worker: str, now: float) -> Lease:
        crashes = task.failures if task.shard is None else 0
        lease = Lease(self._next, task.shard, worker, task.quarantine, crashes, self.epoch)
        self._next += self.lease_stride
        flight = _Flight(lease, task, now, now)
        if task.may_have_a_second and not task.flying:
            self._alone[lease.id] = flight
        self._flying[lease.id] = task.flying[lease.id] = flight
        return lease

    # --- what happened

    def progressed(self, lease: Lease, now: float) -> None:
        """The lease's worker gave a sign of progress."""
        if (flight := self._flying.get(lease.id)) is None:
            return
        if lease.worker in self._known:  # the first lease of a worker imports and compiles
            self._gap += (now - flight.sign - self._gap) * (_GAP_WEIGHT if self._gap else 1.0)
        flight.sign = now

    def succeeded(self, lease: Lease, now: float) -> None:
        """The lease's work is committed, by this attempt or another."""
        if (flight := self._landed(lease)) is None:
            return
        self._known.add(lease.worker)
        if lease.shard is None:
            self.calibrate = False
            return
        insort(self._seconds, now - flight.since)
        self._succeeded = True
        self._end(flight.task)

    def _landed(self, lease: Lease) -> _Flight | None:
        """The flight of a lease that has ended; None where that is known already."""
        flight = self._flying.pop(lease.id, None)
        if flight is not None:
            del flight.task.flying[lease.id]
            self._alone.pop(lease.id, None)
        return flight

    def _end(self, task: _Task) -> None:
        self._open -= 1
        for flight in list(task.flying.values()):
            self._landed(flight.lease)
            self._given_up.append(flight.lease)

    def failed(self, lease: Lease, failure: Failure, message: str, now: float) -> None:
        """The lease's attempt is over without a commit."""
        if (flight := self._landed(lease)) is None:
            return
        task = flight.task
        if failure is Failure.STORAGE:
            self.fatal = message
        elif failure is Failure.INFRA:
            self._wait(task, now)
        elif task.shard is None:
            self._calibration_failed(failure, message)
        else:
            self._count(task, failure, message)
        if failure is Failure.TASK:
            self._known.add(lease.worker)

    def _calibration_failed(self, failure: Failure, message: str) -> None:
        task = self._calibration
        if failure is Failure.CRASH:
            task.failures += 1
            task.budget -= 1
        else:
            task.attempts -= 1
        if not task.budget or not task.attempts:
            self.fatal = f"the calibration failed: {message}"

    def _count(self, task: _Task, failure: Failure, message: str) -> None:
        task.failures += 1
        task.attempts -= 1
        task.budget -= 1
        if task.flying:
            pass  # another attempt at it is under way, and may succeed
        elif task.attempts > 0 or (len(task.shard) == 1 and task.budget > 0):
            self._ready.append(task)
        elif task.quarantine is not None:
            self.fatal = f"{task.shard.name} cannot even be quarantined: {message}"
        elif task.shard.again:
            self._end(task)
        elif len(task.shard) > 1:
            self._cutting[task.shard.name] = task
        else:
            task.quarantine = f"{failure.value} in each attempt: {message}"
            task.attempts = self.attempts_before_bisection
            self._ready.append(task)
        self._note(task, failure, message)

    def _wait(self, task: _Task, now: float) -> None:
        """Queue a task again that was nobody's fault: at once at first, then later and later."""
        task.setbacks += 1
        if task.flying or task.shard is None:
            return
        if task.setbacks == 1:
            self._ready.appendleft(task)
            return
        first, longest = _BACKOFF_SECONDS
        until = now + min(longest, first * 2.0 ** min(task.setbacks - 2, _MOST_DOUBLINGS))
        heapq.heappush(self._waiting, (until, self._next, task))
        self._next += self.lease_stride  # no two entries compare equal

    def _note(self, task: _Task, failure: Failure, message: str) -> None:
        """End the run where the same error ends one shard after the other."""
        if self._succeeded or (failure is Failure.CRASH and task.attempts > 0):
            return
        seen = self._errors.setdefault(message, set())
        seen.difference_update(task.within)  # one datum's error ends the shard and the part that it is in
        seen.add(task.shard.name)
        if len(seen) >= self.fatal_shards:
            self.fatal = f"the same error ended {len(seen)} shards and none succeeded: {message}"

    def cut(self, shard: ShardLike) -> None:
        """It is cut, so that no attempt at the whole of it can be committed any more."""
        task = self._cutting.pop(shard.name, None)
        if task is None:
            return
        self._open -= 1
        for half in shard.halves():
            part = _Task(half, 1, task.budget, (*task.within, shard.name))
            self._open += 1
            if shard.part or len(half) == 1:
                self._ready.append(part)
            else:  # twice at once, see the top
                part.attempts = 0
                self._cutting[half.name] = part

    def committed(self, shard: ShardLike) -> None:
        """It cannot be cut: an attempt that was given up had committed it."""
        if self._cutting.pop(shard.name, None) is not None:
            self._succeeded = True
            self._open -= 1

    def was_cut(self, lease: Lease) -> None:
        """The lease's work cannot be committed: another driver had cut the shard."""
        flight = self._landed(lease)
        if flight is None:
            return
        task = flight.task
        for other in list(task.flying.values()):
            self._landed(other.lease)
            self._given_up.append(other.lease)
        self._cutting[task.shard.name] = task
        self.cut(task.shard)
