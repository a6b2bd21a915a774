"""The pool on a cluster whose nodes come and go."""

import time

import pytest

from nfscale.coordinator import Failure, Lease
from nfscale.driver import Failed, open_run
from tests.jobs import tiny_job

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]


@pytest.fixture
def cluster(monkeypatch):
    """A head without processors, as drivers have it, and nobody else."""
    for name, value in {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | small)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def polled(pool, until, seconds=120.0):
    """Events of the pool until something holds."""
    events, deadline = [], time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        events += pool.poll(0.2)
    assert until()
    return events


@pytest.mark.slow
def test_the_pool_grows_with_the_cluster_leaves_draining_nodes_and_shrinks(cluster, tmp_path):
    import ray

    from nfscale.distributed import RayPool

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
