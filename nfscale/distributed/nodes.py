"""What each node of a Ray cluster is doing, asked by a short task that takes no CPU of the pool's."""

from collections.abc import Callable
from typing import Any

from nfscale.machine import measured

_SECONDS = 10.0  # that all answers may take; a node that is silent is left out


def measured_nodes() -> dict[str, dict[str, float]]:
    """`nfscale.machine.measured` of each node that is alive, by its host name; empty where Ray does not run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        return {}
    task = ray.remote(num_cpus=0, max_retries=0)(measured)
    asked = {}
    for name, node_id in names_of(ray.nodes()).items():
        there: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
        asked[task.options(scheduling_strategy=there).remote()] = name
    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS)
    for reference in silent:
        ray.cancel(reference)
    answers = ((asked[reference], _answer(ray.get, reference)) for reference in ready)
    return {name: answer for name, answer in answers if answer}


def _answer(get: Callable[[Any], dict[str, float]], reference: Any) -> dict[str, float]:
    try:
        return get(reference)
    except Exception:  # its node has gone in between
        return {}


def names_of(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Ids of the nodes that are alive by their host names; of several on one host, each with a part of its id."""
    alive = [node for node in nodes if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in alive]
    return {
        host if hosts.count(host) == 1 else f"{host}-{node['NodeID'][:6]}": node["NodeID"]
        for host, node in zip(hosts, alive, strict=True)
    }
