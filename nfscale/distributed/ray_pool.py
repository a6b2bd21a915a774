"""Workers as Ray actors, one per device: in-process Ray by default, the cluster of `RAY_ADDRESS` when set.

Dangers, each guarded here:
- Ray's own retries refit invisibly and reorder calls, so actors have none; the coordinator owns retries.
- A worker that Ray declares dead may still be alive and commit; commits are first-wins.
- Ray sets thread counts that torch has already read; each actor sets its own.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

from nfscale.coordinator import Failure, Lease
from nfscale.driver import Advanced, Event, Failed, Succeeded, explained, failure_of, work_on
from nfscale.encode import OpenRun, Progress
from nfscale.errors import EncodeError
from nfscale.store.run_folder import RunFolder

_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # with it off, a local cluster listens on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes every worker resolve the environment anew
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",  # Ray's default for local clusters, said aloud so that Ray does not
}
_OBJECT_STORE_BYTES = 80 << 20  # the smallest Ray takes: neither data nor weights pass through it
_START_ATTEMPTS = 3
_ADDRESSES_BYTES = 4 << 30  # that a process of local Ray needs: at 2.5 GB it aborts in C++, at 4 GB it runs


@dataclass
class _Worker:
    name: str
    actor: Any
    starting: Any = None
    """Reference to the call that says where the actor runs; None once it is up."""
    node: str = ""
    lease: Lease | None = None
    stream: Any = None


class RayPool:
    """As many actors as asked for; one that dies is replaced."""

    def __init__(self, folder: RunFolder, workers: int | Literal["auto"], max_workers: int | None = None) -> None:
        on_cluster = bool(os.environ.get("RAY_ADDRESS"))
        if not on_cluster:
            for name, value in _LOCAL_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self._folder = folder.files.absolute()
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            self._connect(on_cluster, workers)
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        if workers == "auto":
            workers = gpus or max(1, int(resources.get("CPU", 1)))
        self._wanted = min(workers, max_workers or workers)
        self._options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 1}
        self._workers: dict[str, _Worker] = {}
        self._started = 0
        self._failed_starts = 0
        while len(self._workers) < self._wanted:
            self._add()

    def _connect(self, on_cluster: bool, workers: int | Literal["auto"]) -> None:
        if not on_cluster and (limit := _address_limit()) is not None and limit < _ADDRESSES_BYTES:
            raise EncodeError(
                f"Ray needs {_ADDRESSES_BYTES >> 30} GiB of addresses for each of its processes, and this one may have "
                f"{limit / (1 << 30):.1f}; raise the limit (`ulimit -v`), or use workers=0"
            )
        if on_cluster:
            self._ray.init(log_to_driver=False, configure_logging=False)
            return
        self._ray.init(
            address="local",
            num_cpus=None if workers == "auto" else max(1, workers),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=_OBJECT_STORE_BYTES,
        )

    def _add(self) -> None:
        worker_class = self._ray.remote(max_restarts=0, max_task_retries=0, **self._options)(_FitWorker)
        actor = worker_class.remote(self._folder)
        name = f"worker-{self._started}"
        self._started += 1
        self._workers[name] = _Worker(name, actor, starting=actor.node.remote())

    def idle(self) -> list[str]:
        return [w.name for w in self._workers.values() if w.starting is None and w.lease is None]

    def start(self, lease: Lease) -> None:
        worker = self._workers[lease.worker]
        worker.lease = lease
        worker.stream = worker.actor.work.options(num_returns="streaming").remote(lease)

    def poll(self, seconds: float) -> list[Event]:
        waiting = {w.starting or w.stream: w for w in self._workers.values() if w.starting or w.stream}
        if not waiting:
            return []
        ready, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=seconds)
        events: list[Event] = []
        for reference in ready:
            worker = waiting[reference]
            event = self._came_up(worker) if worker.starting else self._next_event(worker)
            if event is not None:
                events.append(event)
        return events

    def _came_up(self, worker: _Worker) -> None:
        try:
            worker.node = self._ray.get(worker.starting)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            del self._workers[worker.name]
            if self._failed_starts >= _START_ATTEMPTS and not any(w.starting is None for w in self._workers.values()):
                raise EncodeError(f"no worker could be started: {explained(error)}") from error
            self._add()
            return
        worker.starting = None
        self._failed_starts = 0

    def _next_event(self, worker: _Worker) -> Event | None:
        errors = self._ray.exceptions
        try:
            event = self._ray.get(next(worker.stream))
        except StopIteration:
            worker.stream = None
            return None
        except errors.RayTaskError as error:
            self._release(worker)
            cause = error.cause or error
            return Failed(worker.name, failure_of(cause), explained(cause))
        except errors.RayActorError as error:
            failure = Failure.INFRA if self._node_is_gone(worker, error) else Failure.CRASH
            self._replace(worker)
            return Failed(worker.name, failure, f"the worker process died ({_death(error)})")
        if isinstance(event, Progress):
            return Advanced(worker.name, event)
        self._release(worker)
        return Succeeded(worker.name, event)

    def _node_is_gone(self, worker: _Worker, error: Any) -> bool:
        if getattr(error, "preempted", False) or isinstance(error, self._ray.exceptions.ActorUnavailableError):
            return True
        return not any(node["NodeID"] == worker.node and node["Alive"] for node in self._ray.nodes())

    @staticmethod
    def _release(worker: _Worker) -> None:
        worker.lease = worker.stream = None

    def _replace(self, worker: _Worker) -> None:
        del self._workers[worker.name]
        self._ray.kill(worker.actor)
        self._add()

    def cancel(self, worker: str) -> None:
        """Ray does not interrupt a call that runs: the actor is killed."""
        self._replace(self._workers[worker])

    def want(self, workers: int) -> None: ...

    def close(self) -> None:
        for worker in self._workers.values():
            self._ray.kill(worker.actor)
        self._workers.clear()
        if self._owns_ray:
            self._ray.shutdown()


class _FitWorker:
    """One process with one device. Calls run one after the other in the main thread, as CUDA wants it."""

    def __init__(self, folder: str) -> None:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        self._folder = folder
        self._run: OpenRun | None = None

    def node(self) -> str:
        """The node this runs on; its arrival says that the worker is up."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def work(self, lease: Lease) -> Any:
        """Progress, then the report of a lease."""
        self._run = self._run or OpenRun(RunFolder(self._folder))
        yield from work_on(self._run, lease)


def _address_limit() -> int | None:
    """Bytes of addresses that this process may have, where they are limited."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _death(error: Any) -> str:
    """What Ray says of a death, in a few words."""
    text = " ".join(str(error).split())
    for known in ("SYSTEM_ERROR", "INTENDED_USER_EXIT", "OUT_OF_MEMORY", "NODE_DIED"):
        if known in text:
            return known
    return text[:200]
