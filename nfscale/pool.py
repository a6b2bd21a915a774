"""Pools of workers: what the driver asks of one, what it is told, and the one that is this process.

The pool of Ray's actors is in `nfscale.distributed`.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nfscale.coordinator import Failure, Lease, portion
from nfscale.encode import Progress, ShardReport, encode_shard, new_attempt
from nfscale.errors import NfscaleError, OutputError, SupersededError
from nfscale.files import StoreError
from nfscale.run import OpenRun, calibrate_run
from nfscale.store.run_folder import RunFolder

_POLL_SECONDS = 0.5
_CRASHES = 2  # of one call, the first of which may have been its worker's bad luck


@dataclass(frozen=True)
class Call:
    """A lease of another kind: a function of a module and what it is called with, which have nothing to do with a
    run. Arguments and result pass through the driver, so they are small."""

    worker: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Advanced:
    """A worker finished some fields of its lease."""

    worker: str
    progress: Progress


@dataclass(frozen=True)
class Succeeded:
    """A worker's lease is committed; `report` is None for the calibration, and the result of a `Call`."""

    worker: str
    report: Any


@dataclass(frozen=True)
class Failed:
    """A worker's lease is over, and nothing came of it. A worker that is lost is no longer among the idle ones."""

    worker: str
    failure: Failure
    message: str


Event = Advanced | Succeeded | Failed


class Pool(Protocol):
    """Workers, each with at most one lease."""

    def idle(self) -> list[str]:
        """Workers that are alive and have no lease."""
        ...

    def start(self, lease: Lease | Call) -> None:
        """Let `lease.worker` begin."""
        ...

    def poll(self, seconds: float) -> list[Event]:
        """What happened, after waiting at most this long for something to happen."""
        ...

    def cancel(self, worker: str) -> None:
        """End what a worker does, and the worker with it where it cannot be asked to; no event comes of it."""
        ...

    def want(self, workers: int) -> None:
        """So many workers would be of use from now on; a pool of a fixed size need not care."""
        ...

    def waiting(self) -> str | None:
        """What the pool waits for, where it has had no worker for a while."""
        ...

    def close(self) -> None: ...


@dataclass
class InProcessPool:
    """One worker in this process, without Ray, for debugging. On one thread, as every worker on a CPU is."""

    folder: RunFolder | None
    """Of the run; None for calls."""
    _lease: Lease | Call | None = None
    _events: Iterator[Any] | None = None
    _work: "Work" = field(init=False)

    def __post_init__(self) -> None:
        self._work = Work(self.folder)

    def idle(self) -> list[str]:
        return [] if self._lease else ["in-process"]

    def start(self, lease: Lease | Call) -> None:
        import torch

        torch.set_num_threads(1)
        self._lease, self._events = lease, self._work.on(lease)

    def poll(self, seconds: float) -> list[Event]:
        if self._lease is None or self._events is None:
            time.sleep(seconds)  # until what waits may be tried again
            return []
        worker = self._lease.worker
        try:
            event = next(self._events)
        except Exception as error:
            self._lease = None
            return [Failed(worker, failure_of(error), explained(error))]
        if isinstance(event, Progress):
            return [Advanced(worker, event)]
        self._lease = None
        return [Succeeded(worker, event)]

    def cancel(self, worker: str) -> None:
        self._lease = self._events = None

    def want(self, workers: int) -> None: ...

    def waiting(self) -> str | None:
        return None

    def close(self) -> None:
        self._events = None


class Work:
    """What a worker does, one lease after the other, all in one process."""

    def __init__(self, folder: RunFolder | None) -> None:
        """Args:
        folder: of the run, which the first of its leases opens; None for a worker of calls.
        """
        self._folder = folder
        self._run: OpenRun | None = None

    def on(self, lease: Lease | Call, spare: int = 0) -> Iterator[Any]:
        """All of the work on a lease; what comes last is the report (None for the calibration), or the result.

        Args:
            spare: workers on the same machine that wait for a calibration, which may take their cores.
        """
        if isinstance(lease, Call):
            yield lease.function(*lease.arguments)
            return
        if self._run is None:
            assert self._folder is not None
            self._run = OpenRun(self._folder)
        yield from _work_on(self._run, lease, spare)


def _work_on(run: OpenRun, lease: Lease, spare: int) -> Iterator[Progress | ShardReport | None]:
    if lease.shard is None:
        calibrate_run(run, portion(run.plan.calibration_positions, lease.crashes), threads=1 + spare)
        yield None
        return
    yield from encode_shard(
        run,
        lease.shard,
        attempt=lease.attempt or new_attempt(),
        order=lease.id,
        worker=lease.worker,
        quarantine=lease.quarantine,
        epoch=lease.epoch,
    )


def failure_of(error: BaseException) -> Failure:
    """The class of an exception that ended a lease: no other would fare better where the output is lost."""
    return Failure.STORAGE if isinstance(error, OutputError | StoreError | SupersededError) else Failure.TASK


def explained(error: BaseException) -> str:
    """One line about an exception, with its type where the message alone does not say enough."""
    text = " ".join(str(error).split())
    return text if isinstance(error, NfscaleError) else f"{type(error).__name__}: {text}"[:1000]


def call_all(
    pool: Pool, function: Callable[..., Any], several: Sequence[tuple], tell: Callable[[str], None] = lambda text: None
) -> list[Any]:
    """What a function makes of each of these arguments, by the workers of a pool; see `Call`.

    A call whose node is lost is made again, and one whose process died is too, once.

    Args:
        tell: is told what the pool waits for, if it has to.

    Returns:
        The results in the order of the arguments; a `Failed` in place of one that there is not.
    """
    results: list[Any] = [None] * len(several)
    ahead = deque(range(len(several)))
    flying: dict[str, int] = {}
    crashes: Counter[int] = Counter()
    has_told = False
    while ahead or flying:
        for worker in pool.idle()[: len(ahead)]:
            flying[worker] = ahead.popleft()
            pool.start(Call(worker, function, several[flying[worker]]))
        waiting = pool.waiting()
        if waiting and not has_told:
            tell(f"waiting for {waiting}")
        has_told = waiting is not None
        for event in pool.poll(_POLL_SECONDS):
            call = flying.pop(event.worker)
            if isinstance(event, Failed):
                crashes[call] += event.failure is Failure.CRASH
                if event.failure is Failure.INFRA or (event.failure is Failure.CRASH and crashes[call] < _CRASHES):
                    ahead.appendleft(call)
                    continue
            results[call] = event.report if isinstance(event, Succeeded) else event
    return results
