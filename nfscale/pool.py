"""Pools of workers: what the driver asks of one, what it is told, and the one that is this process.

The pool of Ray's actors is in `nfscale.distributed`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from nfscale.coordinator import Failure, Lease, portion
from nfscale.encode import Progress, ShardReport, encode_shard, new_attempt
from nfscale.errors import NfscaleError, OutputError, SupersededError
from nfscale.files import StoreError
from nfscale.run import OpenRun, calibrate_run
from nfscale.store.run_folder import RunFolder


@dataclass(frozen=True)
class Advanced:
    """A worker finished some fields of its lease."""

    worker: str
    progress: Progress


@dataclass(frozen=True)
class Succeeded:
    """A worker's lease is committed; `report` is None for the calibration."""

    worker: str
    report: ShardReport | None


@dataclass(frozen=True)
class Failed:
    """A worker's lease is over without a commit. A worker that is lost is no longer among the idle ones."""

    worker: str
    failure: Failure
    message: str


Event = Advanced | Succeeded | Failed


class Pool(Protocol):
    """Workers, each with at most one lease."""

    def idle(self) -> list[str]:
        """Workers that are alive and have no lease."""
        ...

    def start(self, lease: Lease) -> None:
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

    folder: RunFolder
    _lease: Lease | None = None
    _work: Iterator[Progress | ShardReport | None] | None = None
    _run: OpenRun | None = None

    def idle(self) -> list[str]:
        return [] if self._lease else ["in-process"]

    def start(self, lease: Lease) -> None:
        import torch

        torch.set_num_threads(1)
        self._run = self._run or OpenRun(self.folder)
        self._lease, self._work = lease, work_on(self._run, lease)

    def poll(self, seconds: float) -> list[Event]:
        if self._lease is None or self._work is None:
            time.sleep(seconds)  # until what waits may be tried again
            return []
        worker = self._lease.worker
        try:
            event = next(self._work)
        except Exception as error:
            self._lease = None
            return [Failed(worker, failure_of(error), explained(error))]
        if isinstance(event, Progress):
            return [Advanced(worker, event)]
        self._lease = None
        return [Succeeded(worker, event)]

    def cancel(self, worker: str) -> None:
        self._lease = self._work = None

    def want(self, workers: int) -> None: ...

    def waiting(self) -> str | None:
        return None

    def close(self) -> None:
        self._work = None


def work_on(run: OpenRun, lease: Lease, spare: int = 0) -> Iterator[Progress | ShardReport | None]:
    """A worker's whole work on a lease; the last thing it yields is the report (None for the calibration).

    Args:
        spare: workers on the same machine that wait for a calibration, which may take their cores.
    """
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
