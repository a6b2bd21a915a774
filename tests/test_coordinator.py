"""The coordinator: each shard ends in exactly one commit, whatever dies; what cannot be fitted is quarantined."""

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from nfscale.coordinator import Coordinator, Failure


@dataclass(frozen=True)
class Range:
    name: str
    start: int
    stop: int
    again: bool = False

    def __len__(self):
        return self.stop - self.start

    def halves(self):
        middle = (self.start + self.stop) // 2
        return Range(self.name + "a", self.start, middle), Range(self.name + "b", middle, self.stop)


def ranges(count, size=8):
    return [Range(f"s{i}", i * size, (i + 1) * size) for i in range(count)]


def test_shards_are_given_out_once_and_in_order():
    coordinator = Coordinator(ranges(3))
    leases = [coordinator.lease(f"w{i}") for i in range(4)]
    assert [lease.shard.name for lease in leases[:3]] == ["s0", "s1", "s2"]
    assert leases[3] is None
    for lease in leases[:3]:
        assert not coordinator.finished
        coordinator.succeeded(lease)
    assert coordinator.finished


def test_lease_numbers_continue_where_an_earlier_driver_stopped():
    assert Coordinator(ranges(1), first_lease=17).lease("w").id == 17


def test_the_calibration_comes_first_and_alone():
    coordinator = Coordinator(ranges(1), calibrate=True)
    first = coordinator.lease("w0")
    assert first.shard is None
    assert coordinator.lease("w1") is None
    coordinator.succeeded(first)
    assert coordinator.lease("w1").shard.name == "s0"


def test_a_lost_node_costs_the_shard_nothing():
    coordinator = Coordinator(ranges(1))
    for _ in range(10):
        coordinator.failed(coordinator.lease("w"), Failure.INFRA, "preempted")
    assert len(coordinator.lease("w").shard) == 8


def test_a_shard_that_kills_its_worker_twice_is_cut_in_two():
    coordinator = Coordinator(ranges(1))
    for _ in range(2):
        coordinator.failed(coordinator.lease("w"), Failure.CRASH, "segfault")
    assert [coordinator.lease("w").shard.name for _ in range(2)] == ["s0a", "s0b"]


def test_one_deadly_datum_costs_its_own_row_after_two_attempts_per_cut():
    """log2(8) cuts, two attempts at each size, then the quarantine."""
    coordinator, attempts, quarantined, committed = Coordinator(ranges(2)), 0, [], []
    while (lease := coordinator.lease("w")) is not None:
        if lease.quarantine:
            quarantined.append(lease.shard)
        elif lease.shard.start <= 5 < lease.shard.stop:
            attempts += 1
            coordinator.failed(lease, Failure.CRASH, "segfault")
            continue
        committed.append(lease.shard)
        coordinator.succeeded(lease)
    assert coordinator.finished
    assert [(s.start, s.stop) for s in quarantined] == [(5, 6)]
    assert attempts == 2 * 4
    assert sorted(i for s in committed for i in range(s.start, s.stop)) == list(range(16))


def test_a_committed_shard_that_fails_again_stays_as_it_is():
    coordinator = Coordinator([Range("s0", 0, 8, again=True)])
    for _ in range(2):
        coordinator.failed(coordinator.lease("w"), Failure.CRASH, "segfault")
    assert coordinator.finished, "its halves would be second rows of what is committed"


def test_the_same_error_on_the_first_shards_ends_the_run():
    coordinator = Coordinator(ranges(5))
    for _ in range(3):
        coordinator.failed(coordinator.lease("w"), Failure.TASK, "no space left on device")
    assert "no space left on device" in coordinator.fatal
    assert coordinator.lease("w") is None


def test_errors_after_a_success_do_not_end_the_run():
    coordinator = Coordinator(ranges(5))
    coordinator.succeeded(coordinator.lease("w"))
    for _ in range(4):
        coordinator.failed(coordinator.lease("w"), Failure.TASK, "a strange datum")
    assert coordinator.fatal is None


def test_a_calibration_that_fails_twice_ends_the_run():
    coordinator = Coordinator(ranges(1), calibrate=True)
    coordinator.failed(coordinator.lease("w"), Failure.INFRA, "preempted")
    coordinator.failed(coordinator.lease("w"), Failure.TASK, "diverged")
    assert coordinator.fatal is None
    coordinator.failed(coordinator.lease("w"), Failure.TASK, "diverged")
    assert coordinator.fatal == "the calibration failed: diverged"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.sets(st.integers(0, 47), max_size=4), st.integers(0, 2**32))
def test_every_datum_is_committed_exactly_once_whatever_dies(shards, deadly, seed):
    """Random deaths of nodes, repeated and unknown messages, data that kill their worker: one row each."""
    chance = random.Random(seed)
    coordinator = Coordinator(ranges(shards), fatal_shards=1000)
    committed, flying = [], []
    for _ in range(10_000):
        if coordinator.finished:
            break
        if (lease := coordinator.lease("w")) is not None:
            flying.append(lease)
        if not flying or chance.random() < 0.4:
            continue
        lease = flying.pop(chance.randrange(len(flying)))
        kills = any(lease.shard.start <= datum < lease.shard.stop for datum in deadly)
        if chance.random() < 0.2:
            coordinator.failed(lease, Failure.INFRA, "gone")
        elif kills and not lease.quarantine:
            coordinator.failed(lease, Failure.CRASH, "dead")
        else:
            committed.append(lease.shard)
            coordinator.succeeded(lease)
        if chance.random() < 0.2:  # a message that comes twice
            coordinator.succeeded(lease)
            coordinator.failed(lease, Failure.CRASH, "late")
    assert coordinator.finished
    assert sorted(i for s in committed for i in range(s.start, s.stop)) == list(range(shards * 8))
