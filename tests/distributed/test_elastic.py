"""The pool on a cluster whose nodes come and go."""

import socket
import time
from types import SimpleNamespace

import pytest

from nfscale.coordinator import Failure, Lease
from nfscale.distributed import RayPool
from nfscale.driver import open_run
from nfscale.errors import EncodeError
from nfscale.pool import Failed
from nfscale.store.run_folder import Shard
from tests.jobs import tiny_job

pytestmark = pytest.mark.filterwarnings("default")


class FakeRay:
    """As much of Ray as a pool needs to add and drop actors."""

    def __init__(self):
        self.options = []

    def remote(self, **options):
        self.options.append(options)
        actor = SimpleNamespace(node=SimpleNamespace(remote=object))
        return lambda worker_class: SimpleNamespace(remote=lambda *arguments: actor)

    def kill(self, actor): ...

    def available_resources(self):
        return {"CPU": 2.0}


class FakeStream:
    """The method `work` of an actor, which notes the cores that it is lent."""

    def __init__(self, given):
        self.given = given

    def options(self, num_returns):
        return self

    def remote(self, lease, spare):
        self.given.append(spare)


def pool_on(cpus, gpus=0, workers="auto", max_workers=None, workers_per_gpu="auto", on_cluster=True):
    """A pool on a cluster of these resources, all of whose workers are pending."""
    pool = RayPool.__new__(RayPool)
    pool._on_cluster, pool._asked, pool._max, pool._per_gpu = on_cluster, workers, max_workers, workers_per_gpu
    pool._useful, pool._workers, pool._started, pool._draining = None, {}, 0, set()
    pool._looked = pool._served = time.monotonic()
    pool._resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    pool._ray, pool._folder = FakeRay(), ""
    pool._reconcile()
    return pool


@pytest.mark.parametrize(
    ("keys", "nodes", "spare"),
    [
        ({"on_cluster": False}, ["here", "", "here", "here"], 2),  # one comes up here, one has a lease
        ({}, ["here", "", "here", "here"], 1),  # nobody knows yet where that one will be
        ({}, ["here", "there", "there", "here"], 0),
        ({"gpus": 4}, ["here", "", "here", "here"], 0),
    ],
)
def test_a_calibration_may_take_the_cores_of_those_that_wait_for_it(keys, nodes, spare):
    pool = pool_on(4, **keys)
    first, *_, busy = workers = list(pool._workers.values())
    for worker, node in zip(workers, nodes, strict=True):
        worker.node, worker.starting = node, None if node else worker.starting
    busy.lease = Lease(0, Shard(0, 0, 5), busy.name)
    given = []
    for worker in workers:
        worker.actor.work = FakeStream(given)
    pool.start(Lease(1, None, first.name))
    pool.start(Lease(2, Shard(1, 5, 10), workers[2].name))
    assert given == [spare, 0]


@pytest.mark.parametrize(
    ("keys", "workers", "gpus_each"),
    [
        ({"cpus": 4}, 4, 0),
        ({"cpus": 0}, 1, 0),  # a head alone: one is asked of an autoscaler
        ({"cpus": 4, "max_workers": 2}, 2, 0),
        ({"cpus": 4, "max_workers": 9}, 9, 0),  # five are asked of an autoscaler
        ({"cpus": 4, "max_workers": 9, "on_cluster": False}, 4, 0),  # nobody to ask
        ({"cpus": 4, "workers": 3}, 3, 0),
        ({"cpus": 4, "workers": 3, "max_workers": 2}, 2, 0),
        ({"cpus": 16, "gpus": 2}, 2, 1),
        ({"cpus": 16, "gpus": 2, "workers_per_gpu": 4}, 8, 0.25),
        ({"cpus": 16, "gpus": 2, "workers_per_gpu": 0}, 16, 0),
        ({"cpus": 0, "max_workers": 8, "workers_per_gpu": 2}, 8, 0.5),  # of a cluster whose GPUs come on demand
    ],
)
def test_how_many_workers_there_may_be_and_what_each_takes(keys, workers, gpus_each):
    pool = pool_on(**keys)
    assert len(pool._workers) == workers
    assert {options["num_gpus"] for options in pool._ray.options} == {gpus_each}
    assert all(options["max_restarts"] == options["max_task_retries"] == 0 for options in pool._ray.options)


def test_workers_on_cores_make_way_for_gpus_that_come():
    pool = pool_on(cpus=2, max_workers=2)
    pool._ray.cluster_resources = lambda: {"CPU": 10, "GPU": 4}
    busy, idle = pool._workers.values()
    busy.starting = idle.starting = None
    busy.lease = Lease(0, None, busy.name)
    pool._looked -= 60
    pool._look()
    pool._reconcile()
    assert idle.name not in pool._workers
    assert busy.name in pool._workers, "until its lease is over"
    assert [options["num_gpus"] for options in pool._ray.options] == [0, 0, 1]


def test_what_is_waited_for_is_told_after_a_while():
    pool = pool_on(cpus=4, workers_per_gpu=1)
    assert pool.waiting() is None
    pool._served -= 60
    assert (
        pool.waiting() == "a worker: each takes 1 CPU and 1 GPU, and the cluster has 2 of 4 CPUs and 0 of 0 GPUs free"
    )
    (worker,) = pool._workers.values()
    worker.starting = None
    assert pool.waiting() is None


def test_no_more_workers_are_kept_than_are_of_use_and_none_that_is_at_work_is_let_go():
    pool = pool_on(cpus=6)
    up, busy, *_ = pool._workers.values()
    up.starting = busy.starting = None
    busy.lease = Lease(0, None, busy.name)
    pool.want(2)
    assert list(pool._workers.values()) == [up, busy], "those that are pending go first"
    pool.want(1)
    assert list(pool._workers.values()) == [busy]
    pool.want(0)
    assert list(pool._workers.values()) == [busy]
    pool.want(4)
    assert len(pool._workers) == 4


class TaskError(Exception):
    def __init__(self, cause):
        self.cause = cause


@pytest.mark.parametrize(
    ("message", "failure", "stays"),
    [
        ("CUDA error: an illegal memory access was encountered", Failure.CRASH, False),
        ("CUDA out of memory. Tried to allocate 2 GiB", Failure.TASK, True),
        ("a strange datum", Failure.TASK, True),
    ],
)
def test_a_process_that_has_lost_its_gpu_is_replaced(message, failure, stays):
    pool = pool_on(cpus=1)
    (worker,) = pool._workers.values()

    def raises(stream):
        raise TaskError(RuntimeError(message))

    pool._ray.exceptions = SimpleNamespace(RayTaskError=TaskError, RayError=Exception)
    pool._ray.get = raises
    worker.starting, worker.lease, worker.stream = None, Lease(0, None, worker.name), iter([object()])
    event = pool._next_event(worker)
    assert (event.failure, worker.name in pool._workers) == (failure, stays)
    assert message in event.message


def test_a_worker_on_a_node_that_leaves_gets_no_lease():
    pool = pool_on(cpus=2)
    for worker, node in zip(pool._workers.values(), ("stays", "leaves"), strict=True):
        worker.starting, worker.node = None, node
    pool._draining = {"leaves"}
    assert pool.idle() == ["worker-0"]


def test_a_cluster_that_is_not_there_is_not_waited_for_without_an_end(monkeypatch):
    monkeypatch.setattr("nfscale.distributed.ray_pool._HEAD_SECONDS", 0.0)
    pool = pool_on(cpus=1)
    pool._ray.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    pool._ray.init, pool._ray.exceptions = lambda **keys: None, SimpleNamespace(RayError=OSError)
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        for known in (f"127.0.0.1:{port}", f"ray://localhost:{port}", "auto"):
            monkeypatch.setenv("RAY_ADDRESS", known)
            pool._connect()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(EncodeError, match=rf"listens at RAY_ADDRESS=127.0.0.1:{port} \(.*refused\); is its head"):
        pool._connect()


@pytest.mark.parametrize(("on_cluster", "said"), [(True, "of RAY_ADDRESS=10.0.0.1:6379"), (False, "a local Ray")])
def test_a_ray_that_does_not_answer_is_one_line(on_cluster, said, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    tries = []

    def fails(**keys):
        tries.append(keys)
        raise RuntimeError("Failed to start GCS")

    monkeypatch.setattr("nfscale.distributed.ray_pool._unanswered", lambda address, ray: None)
    pool = pool_on(cpus=1, on_cluster=on_cluster)
    pool._ray.init, pool._ray.exceptions = fails, SimpleNamespace(RayError=OSError)
    with pytest.raises(EncodeError, match=rf"{said} does not start or answer \(RuntimeError: Failed to start GCS\)"):
        pool._connect()
    assert len(tries) == (1 if on_cluster else 2), "a local Ray is started once more"


def polled(pool, until, seconds=120.0):
    """Events of the pool until something holds."""
    events, deadline = [], time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        events += pool.poll(0.2)
    assert until()
    return events


@pytest.mark.ray
@pytest.mark.slow
def test_the_pool_grows_with_the_cluster_leaves_draining_nodes_and_shrinks(cluster, tmp_path):
    import ray

    folder, plan = open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam"))
    pool = RayPool(folder, workers="auto", max_workers=3)
    try:
        pool.want(20)
        assert pool.idle() == []
        first = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        polled(pool, lambda: len(pool.idle()) == 1)
        assert len(pool._workers) == 3, "two are asked of an autoscaler"
        cluster.add_node(num_cpus=4, object_store_memory=80 << 20)
        polled(pool, lambda: len(pool.idle()) == 3)
        (leaving,) = [w.name for w in pool._workers.values() if w.node == first.node_id]
        pool.start(Lease(0, plan.shards()[0], leaving))
        ray._private.worker.global_worker.gcs_client.drain_node(first.node_id, 2, "preempted", 0)
        events = polled(pool, lambda: first.node_id in pool._draining)
        cluster.remove_node(first, allow_graceful=False)
        if not events:
            events = polled(pool, lambda: leaving not in pool._workers)
        if isinstance(events[-1], Failed):
            assert events[-1].failure is Failure.INFRA
        assert leaving not in pool.idle()
        polled(pool, lambda: len(pool.idle()) == 3)
        pool.want(1)
        assert len(pool._workers) == 1
    finally:
        pool.close()
