"""What machines and nodes say of themselves."""

import pytest

from nfscale.distributed.nodes import names_of
from nfscale.machine import measured, parsed_gpus


def test_this_machine_says_its_load_and_memory():
    pytest.importorskip("psutil")
    found = measured()
    assert 0 <= found["cpu_utilization_percentage"] <= 100
    assert 0 < found["system_memory_usage_percentage"] <= 100
    assert found["system_memory_usage_megabytes"] > 50


def test_gpus_as_nvidia_smi_says_it():
    said = "0, 97, 40960, 81920\n1, [N/A], 512, 81920\n"
    assert parsed_gpus(said) == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": pytest.approx(42949.67),
        "gpu_0_memory_usage_percentage": 50.0,
    }


def test_nodes_on_one_host_have_names_of_their_own():
    nodes = [
        {"Alive": True, "NodeManagerHostname": "a", "NodeID": "1" * 12},
        {"Alive": True, "NodeManagerHostname": "b", "NodeID": "2" * 12},
        {"Alive": True, "NodeManagerHostname": "b", "NodeID": "3" * 12},
        {"Alive": False, "NodeManagerHostname": "c", "NodeID": "4" * 12},
    ]
    assert names_of(nodes) == {"a": "1" * 12, "b-222222": "2" * 12, "b-333333": "3" * 12}
