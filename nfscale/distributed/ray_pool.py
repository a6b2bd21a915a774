"""Workers as Ray actors, one per device or several: in-process Ray by default, the cluster of `RAY_ADDRESS` when set.

The pool is elastic: it begins with the first worker that is alive, and asks for as many as there is use for. Actors
that Ray cannot place yet are what an autoscaler sees as demand. A worker on a node that Ray is draining gets no new
lease, and what is lost there is nobody's fault.

Dangers, each guarded here:
- Ray's own retries refit invisibly and reorder calls, so actors have none; the coordinator owns retries.
- A worker that Ray declares dead may still be alive and commit; commits are first-wins.
- Ray sets thread counts that torch has already read; each actor sets its own.
- Ray waits for a cluster that is not there without an end; whether anything listens at its address is asked first.
- Any error of Ray but that of the task itself ends an attempt: which one is told depends on what dies first.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nfscale.coordinator import Failure, Lease
from nfscale.encode import Progress
from nfscale.errors import EncodeError
from nfscale.pool import Advanced, Call, Event, Failed, Succeeded, Work, explained, failure_of
from nfscale.store.run_folder import RunFolder

_AUTHENTICATION = "RAY_AUTH_MODE"
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # with it off, a local cluster listens on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes every worker resolve the environment anew
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    _AUTHENTICATION: "token",  # Ray's default for local clusters, said aloud so that Ray does not
}
_OBJECT_STORE_BYTES = 80 << 20  # the smallest Ray takes: neither data nor weights pass through it
_START_ATTEMPTS = 3
_HEAD_SECONDS = 60.0  # that a head may take until it listens
_CONNECT_SECONDS = 5.0
_ADDRESSES_BYTES = 4 << 30  # that a process of local Ray needs: at 2.5 GB it aborts in C++, at 4 GB it runs
_LOOK_SECONDS = 5.0  # between two looks at the nodes
_PATIENCE_SECONDS = 20.0  # in which the first worker is usually up


@dataclass
class _Worker:
    name: str
    actor: Any
    gpus: float = 0.0
    starting: Any = None
    """Reference to the call that says where the actor runs; None once it is up."""
    node: str = ""
    lease: Lease | Call | None = None
    stream: Any = None


class RayPool:
    """As many actors as there is use and room for; one that dies is replaced."""

    def __init__(
        self,
        folder: RunFolder | None,
        workers: int | Literal["auto"],
        max_workers: int | None = None,
        workers_per_gpu: int | Literal["auto"] = "auto",
        useful: int | None = None,
    ) -> None:
        """Connect to Ray, or start it.

        Args:
            folder: of the run; None for workers of calls.
            workers: how many; "auto" is as many as the cluster has room for at the time, and where there is a cluster
                that grows on demand, `max_workers`.
            workers_per_gpu: that share a GPU, whether there is one by now or not; 0 for workers that leave the GPUs
                alone; "auto" for one on each where there are GPUs.
            useful: more than so many are of no use, whatever room there is; `want` changes it.

        Raises:
            EncodeError: if Ray does not answer.
        """
        self._on_cluster = bool(os.environ.get("RAY_ADDRESS"))
        if not self._on_cluster:
            for name, value in _LOCAL_ENVIRONMENT.items():
                if name != _AUTHENTICATION or "ray" not in sys.modules:  # which has read it by then
                    os.environ.setdefault(name, value)
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self._folder = None if folder is None else folder.files.absolute()
        self._asked, self._max, self._per_gpu = workers, max_workers, workers_per_gpu
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            self._connect()
        self._useful = useful
        self._workers: dict[str, _Worker] = {}
        self._started = 0
        self._failed_starts = 0
        self._draining: set[str] = set()
        self._looked = self._served = time.monotonic()
        self._resources: dict[str, Any] = ray.cluster_resources()
        self._reconcile()

    def _connect(self) -> None:
        if not self._on_cluster and (limit := _address_limit()) is not None and limit < _ADDRESSES_BYTES:
            raise EncodeError(
                f"Ray needs {_ADDRESSES_BYTES >> 30} GiB of addresses for each of its processes, and this one may have "
                f"{limit / (1 << 30):.1f}; raise the limit (`ulimit -v`), or use workers=0"
            )
        if self._on_cluster and (why := _unanswered(os.environ["RAY_ADDRESS"], self._ray)) is not None:
            raise EncodeError(f"nothing listens at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({why}); is its head up?")
        keys: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if not self._on_cluster:
            cpus = None if self._asked == "auto" else max(1, self._asked)
            keys |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
            keys["object_store_memory"] = _OBJECT_STORE_BYTES
        errors = (RuntimeError, OSError, self._ray.exceptions.RayError)
        if not self._on_cluster:
            with contextlib.suppress(*errors):  # on a busy machine a local Ray may give up on its own processes
                self._ray.init(**keys)
                return
        try:
            self._ray.init(**keys)
        except errors as error:
            where = f"the cluster of RAY_ADDRESS={os.environ['RAY_ADDRESS']}" if self._on_cluster else "a local Ray"
            way_out = "is its head up?" if self._on_cluster else "the same command tries again, workers=0 needs no Ray"
            raise EncodeError(f"{where} does not start or answer ({explained(error)[:300]}); {way_out}") from error

    # --- how many

    @property
    def _uses_gpus(self) -> bool:
        return self._gpu_share > 0

    @property
    def _gpu_share(self) -> float:
        """Of each worker."""
        if isinstance(self._per_gpu, int):
            return 1 / self._per_gpu if self._per_gpu else 0
        return 1 if self._resources.get("GPU", 0) else 0

    @property
    def _most(self) -> int:
        """Workers that there may be."""
        if isinstance(self._asked, int):
            return min(self._asked, self._max or self._asked)
        gpus, cpus = int(self._resources.get("GPU", 0)), int(self._resources.get("CPU", 0))
        room = max(1, round(gpus / self._gpu_share) if self._uses_gpus else cpus)
        if self._max is None:
            return room
        return self._max if self._on_cluster else min(self._max, room)  # what is pending is asked of an autoscaler

    def want(self, workers: int) -> None:
        """So many would be of use from now on: more are asked for, or those are let go that have nothing to do."""
        self._useful = workers
        self._reconcile()

    def _reconcile(self) -> None:
        target = self._most if self._useful is None else min(self._most, self._useful)
        while len(self._workers) < target:
            self._add()
        if len(self._workers) > target:
            pending_first = sorted(self._workers.values(), key=lambda worker: worker.starting is None)
            for worker in [w for w in pending_first if w.lease is None][: len(self._workers) - target]:
                self._drop(worker)

    def _add(self) -> None:
        cpus, gpus = 1, self._gpu_share
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        actor = self._ray.remote(**options)(_FitWorker).remote(self._folder, cpus, gpus)
        name = f"worker-{self._started}"
        self._started += 1
        self._workers[name] = _Worker(name, actor, gpus, starting=actor.node.remote())

    def _drop(self, worker: _Worker) -> None:
        del self._workers[worker.name]
        self._ray.kill(worker.actor)

    def _look(self) -> None:
        """See what has become of the nodes, now and then."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self._resources = self._ray.cluster_resources()
        self._draining = _draining_nodes()
        for worker in list(self._workers.values()):
            leaves = worker.node in self._draining
            if worker.lease is None and (leaves or (self._uses_gpus and not worker.gpus)):
                self._drop(worker)  # and one that takes its place starts elsewhere, or on a GPU that came

    def waiting(self) -> str | None:
        """What is waited for, where no worker has been up for a while."""
        now = time.monotonic()
        if any(worker.starting is None for worker in self._workers.values()) or not self._workers:
            self._served = now
        if now - self._served < _PATIENCE_SECONDS:
            return None
        gpus = f" and {self._gpu_share:g} GPU" if self._uses_gpus else ""
        free = self._ray.available_resources()
        have = " and ".join(f"{free.get(k, 0):g} of {self._resources.get(k, 0):g} {k}s" for k in ("CPU", "GPU"))
        return f"a worker: each takes 1 CPU{gpus}, and the cluster has {have} free"

    # --- work

    def idle(self) -> list[str]:
        free = [w for w in self._workers.values() if w.starting is None and w.lease is None]
        return [worker.name for worker in free if worker.node not in self._draining]

    def start(self, lease: Lease | Call) -> None:
        worker = self._workers[lease.worker]
        worker.lease = lease
        worker.stream = worker.actor.work.options(num_returns="streaming").remote(lease, self._spare(worker, lease))

    def _spare(self, worker: _Worker, lease: Lease | Call) -> int:
        """How many workers beside this one wait for the calibration: of other machines' not, nor of a GPU's."""
        if isinstance(lease, Call) or lease.shard is not None or worker.gpus:
            return 0
        others = [w for w in self._workers.values() if w is not worker and w.lease is None]
        if self._on_cluster:
            others = [w for w in others if w.node == worker.node]
        return len(others)

    def poll(self, seconds: float) -> list[Event]:
        self._look()
        self._reconcile()
        waiting = {w.starting or w.stream: w for w in self._workers.values() if w.starting or w.stream}
        if not waiting:
            time.sleep(seconds)
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
            self._drop(worker)
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS and not any(w.starting is None for w in self._workers.values()):
                raise EncodeError(f"no worker could be started: {explained(error)}") from error
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
            cause = error.cause or error
            if _is_poisoned(cause):
                self._drop(worker)
                return Failed(worker.name, Failure.CRASH, explained(cause))
            self._release(worker)
            return Failed(worker.name, failure_of(cause), explained(cause))
        except errors.RayError as error:
            failure = Failure.INFRA if self._node_is_gone(worker, error) else Failure.CRASH
            self._drop(worker)
            return Failed(worker.name, failure, f"the worker process died ({_death(error)})")
        if isinstance(event, Progress):
            return Advanced(worker.name, event)
        self._release(worker)
        return Succeeded(worker.name, event)

    def _node_is_gone(self, worker: _Worker, error: Any) -> bool:
        """Whether the node is to blame: it is lost, leaving, or cannot be reached."""
        if getattr(error, "preempted", False) or isinstance(error, self._ray.exceptions.ActorUnavailableError):
            return True
        if _death(error) == "NODE_DIED" or worker.node in self._draining | _draining_nodes():
            return True
        return not any(node["NodeID"] == worker.node and node["Alive"] for node in self._ray.nodes())

    @staticmethod
    def _release(worker: _Worker) -> None:
        worker.lease = worker.stream = None

    def cancel(self, worker: str) -> None:
        """Ray does not interrupt a call that runs: the actor is killed."""
        self._drop(self._workers[worker])

    def close(self) -> None:
        for worker in list(self._workers.values()):
            self._drop(worker)
        if self._owns_ray:
            self._ray.shutdown()


class _FitWorker:
    """One process with one device, or a part of one. Its calls run one after the other in the main thread, as CUDA
    wants it."""

    def __init__(self, folder: str | None, cpus: int, gpus: float) -> None:
        os.environ["OMP_NUM_THREADS"] = str(cpus)
        import torch

        torch.set_num_threads(cpus)
        if 0 < gpus < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(gpus)  # a batch too large fails here, and not its neighbour
        self._work = Work(None if folder is None else RunFolder(folder))

    def node(self) -> str:
        """The node this runs on; its arrival says that the worker is up."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def work(self, lease: Lease | Call, spare: int) -> Iterator[Any]:
        """Progress, then the report of a lease, or the result of a call; `spare` as in `Work.on`."""
        yield from self._work.on(lease, spare)


def _is_poisoned(error: BaseException) -> bool:
    """Whether the process has lost its GPU: after an illegal access every further call fails with the same error."""
    return "CUDA error" in str(error)


def _unanswered(address: str, ray: Any) -> str | None:
    """Why nobody can be reached at an address such as 10.0.0.1:6379, after some patience; None where somebody is, or
    where the address is a word for Ray to look up (`auto`)."""
    host, colon, port = address.rpartition("://")[2].partition("?")[0].rpartition(":")
    if not (colon and port.isdecimal()):
        return None
    host = host.strip("[]")
    hosts = [host, ray.util.get_node_ip_address()] if host in ("127.0.0.1", "localhost") else [host]  # as Ray reads it
    until = time.monotonic() + _HEAD_SECONDS
    while True:
        for one in hosts:
            try:
                socket.create_connection((one, int(port)), timeout=_CONNECT_SECONDS).close()
                return None
            except (OSError, OverflowError) as error:
                why = getattr(error, "strerror", None) or str(error)
        if time.monotonic() >= until:
            return why
        time.sleep(min(1.0, _HEAD_SECONDS))


def _draining_nodes() -> set[str]:
    """Ids of the nodes that are to leave; none where this Ray does not say."""
    with contextlib.suppress(Exception):  # an interface of Ray's own, which may be another in the next version
        from ray._private.state import state

        return set(state.get_draining_nodes())
    return set()


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
    if "node was terminated" in text or "node has died" in text or "node died" in text.lower():
        return "NODE_DIED"
    for known in ("SYSTEM_ERROR", "INTENDED_USER_EXIT", "OUT_OF_MEMORY", "NODE_DIED"):
        if known in text:
            return known
    return text[:200]
