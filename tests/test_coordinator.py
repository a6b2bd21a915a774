"""The coordinator: each shard ends in exactly one commit, whatever dies; what cannot be fitted is quarantined."""

import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfscale.coordinator import Coordinator, Failure, Lease, portion
from nfscale.driver import remaining
from nfscale.store.run_folder import Shard


def shards(count, size=8):
    return [Shard(i, i * size, (i + 1) * size) for i in range(count)]


def name(lease):
    return None if lease is None else lease.shard.name.removeprefix("shard-0000")


def test_shards_are_given_out_once_and_in_order():
    coordinator = Coordinator(shards(3))
    leases = [coordinator.lease(f"w{i}", 0.0) for i in range(4)]
    assert [name(lease) for lease in leases] == ["0", "1", "2", None]
    for lease in leases[:3]:
        assert not coordinator.finished
        coordinator.succeeded(lease, 1.0)
    assert coordinator.finished


def test_lease_numbers_continue_where_an_earlier_driver_stopped():
    lease = Coordinator(shards(1), first_lease=17, epoch=3).lease("w", 0.0)
    assert (lease.id, lease.epoch) == (17, 3)


def test_the_calibration_comes_first_and_alone():
    coordinator = Coordinator(shards(1), calibrate=True)
    first = coordinator.lease("w0", 0.0)
    assert first.shard is None
    assert coordinator.lease("w1", 0.0) is None
    coordinator.succeeded(first, 1.0)
    assert name(coordinator.lease("w1", 1.0)) == "0"


def test_a_lost_node_costs_the_shard_nothing_but_a_pause_that_grows():
    coordinator, now, pauses = Coordinator(shards(1)), 0.0, []
    for _ in range(10):
        asked = now
        while (lease := coordinator.lease("w", now)) is None:
            now += 0.5
        pauses.append(now - asked)
        coordinator.failed(lease, Failure.INFRA, "preempted", now)
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert len(coordinator.lease("w", now + 60).shard) == 8


def test_others_go_on_while_a_shard_waits():
    coordinator = Coordinator(shards(2))
    for _ in range(2):
        coordinator.failed(coordinator.lease("w", 0.0), Failure.INFRA, "preempted", 0.0)
    assert name(coordinator.lease("w", 0.0)) == "1"
    assert coordinator.lease("w", 0.0) is None
    assert name(coordinator.lease("w", 1.0)) == "0"


def test_a_shard_that_kills_its_worker_twice_is_cut():
    coordinator = Coordinator(shards(1))
    for _ in range(2):
        assert not coordinator.cuts
        coordinator.failed(coordinator.lease("w", 0.0), Failure.CRASH, "segfault", 0.0)
    assert coordinator.lease("w", 0.0) is None, "it is not leased while the cut is under way"
    assert not coordinator.finished
    carry_out(coordinator, {})
    assert [name(coordinator.lease("w", 0.0)) for _ in range(5)] == ["0-aa", "0-ab", "0-ba", "0-bb", None]


def carry_out(coordinator, records):
    """What the driver does with cuts; `records` is the folder of commits."""
    while coordinator.cuts:
        for shard in coordinator.cuts:
            if records.setdefault(shard.name, "cut") == "cut":
                coordinator.cut(shard)
            else:
                coordinator.committed(shard)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 50, 64, 100])
def test_one_deadly_datum_costs_its_own_row_after_few_attempts(size):
    for deadly in {0, size // 3, size - 1}:
        coordinator, attempts, quarantined, committed = Coordinator(shards(2, size)), 0, [], []
        while not coordinator.finished:
            carry_out(coordinator, {})
            lease = coordinator.lease("w", 0.0)
            if lease.quarantine:
                quarantined.append(lease.shard)
            elif lease.shard.start <= deadly < lease.shard.stop:
                attempts += 1
                coordinator.failed(lease, Failure.CRASH, "segfault", 0.0)
                continue
            committed.append(lease.shard)
            coordinator.succeeded(lease, 0.0)
        assert [(s.start, s.stop) for s in quarantined] == [(deadly, deadly + 1)]
        assert attempts <= math.log2(size) + 2
        assert sorted(i for s in committed for i in range(s.start, s.stop)) == list(range(2 * size))


def test_a_commit_that_came_before_the_cut_counts():
    coordinator = Coordinator(shards(1))
    for _ in range(2):
        coordinator.failed(coordinator.lease("w", 0.0), Failure.CRASH, "died after its commit", 0.0)
    carry_out(coordinator, {"shard-00000": "committed"})
    assert coordinator.finished


def test_a_shard_that_another_driver_has_cut_goes_on_as_its_parts():
    coordinator = Coordinator(shards(1, 2))
    coordinator.was_cut(coordinator.lease("w", 0.0))
    assert [name(coordinator.lease("w", 0.0)) for _ in range(2)] == ["0-a", "0-b"]


def test_a_committed_shard_that_fails_again_stays_as_it_is():
    coordinator = Coordinator([Shard(0, 0, 8, again=True)])
    for _ in range(2):
        coordinator.failed(coordinator.lease("w", 0.0), Failure.CRASH, "segfault", 0.0)
    assert coordinator.finished, "its halves would be second rows of what is committed"
    assert not coordinator.cuts


def test_the_same_error_on_the_first_shards_ends_the_run():
    coordinator = Coordinator(shards(5))
    for _ in range(3):
        coordinator.failed(coordinator.lease("w", 0.0), Failure.TASK, "no such module", 0.0)
    assert "no such module" in coordinator.fatal
    assert coordinator.lease("w", 0.0) is None


def test_workers_that_all_die_end_the_run_once_shards_had_to_be_cut_for_it():
    coordinator = Coordinator(shards(5))
    for attempt in range(8):
        assert coordinator.fatal is None, attempt
        coordinator.failed(coordinator.lease("w", 0.0), Failure.CRASH, "died", 0.0)
    assert coordinator.fatal == "the same error ended 3 shards and none succeeded: died"


@pytest.mark.parametrize("failure", [Failure.TASK, Failure.CRASH])
def test_a_run_of_one_shard_ends_with_the_error_of_its_parts(failure):
    coordinator, attempts = Coordinator(shards(1, 64)), 0
    while coordinator.fatal is None:
        carry_out(coordinator, {})
        coordinator.failed(coordinator.lease("w", 0.0), failure, "no such module", 0.0)
        attempts += 1
    assert attempts == 5, "twice the whole, and three of its quarters"


def test_one_deadly_datum_does_not_end_a_run_in_which_nothing_has_succeeded_yet():
    coordinator = Coordinator(shards(1, 64))
    for _ in range(30):
        carry_out(coordinator, {})
        lease = coordinator.lease("w", 0.0)
        if lease is not None and lease.shard.start <= 5 < lease.shard.stop and not lease.quarantine:
            coordinator.failed(lease, Failure.CRASH, "segfault", 0.0)
    assert coordinator.fatal is None
    assert [lease.quarantine is not None for lease in coordinator.in_flight].count(True) == 1


def test_errors_after_a_success_do_not_end_the_run():
    coordinator = Coordinator(shards(5))
    coordinator.succeeded(coordinator.lease("w", 0.0), 1.0)
    for _ in range(4):
        coordinator.failed(coordinator.lease("w", 1.0), Failure.TASK, "a strange datum", 1.0)
    assert coordinator.fatal is None


def test_a_calibration_that_fails_twice_ends_the_run():
    coordinator = Coordinator(shards(1), calibrate=True)
    coordinator.failed(coordinator.lease("w", 0.0), Failure.INFRA, "preempted", 0.0)
    coordinator.failed(coordinator.lease("w", 0.0), Failure.TASK, "diverged", 0.0)
    assert coordinator.fatal is None
    coordinator.failed(coordinator.lease("w", 0.0), Failure.TASK, "diverged", 0.0)
    assert coordinator.fatal == "the calibration failed: diverged"


@pytest.mark.parametrize("deadly", range(13))
def test_a_calibration_gets_around_one_datum_that_kills_its_worker(deadly):
    coordinator, tried = Coordinator(shards(1), calibrate=True), []
    while deadly in (data := portion(tuple(range(13)), (lease := coordinator.lease("w", 0.0)).crashes)):
        tried.append(data)
        coordinator.failed(lease, Failure.CRASH, "segfault", 0.0)
    assert tried[:3] == [tuple(range(13))] * 3, "by chance a worker dies more than once"
    assert len(tried) <= 4
    assert len(data) >= 6
    assert coordinator.fatal is None


def test_a_calibration_that_always_dies_ends_the_run():
    coordinator = Coordinator(shards(1), calibrate=True)
    while (lease := coordinator.lease("w", 0.0)) is not None:
        coordinator.failed(lease, Failure.CRASH, "segfault", 0.0)
    assert coordinator.fatal == "the calibration failed: segfault"


def test_a_worker_that_gives_no_sign_of_progress_is_taken_for_stuck():
    coordinator = Coordinator(shards(3), progress_seconds=10.0)
    first = coordinator.lease("w", 0.0)
    assert coordinator.expired(1e6) == [], "a worker's first lease may import and compile for as long as it takes"
    coordinator.succeeded(first, 100.0)
    second = coordinator.lease("w", 100.0)
    coordinator.progressed(second, 109.0)
    assert coordinator.expired(109.0 + 90.0) == [], "ten times the usual gap, which is 9 seconds"
    assert coordinator.expired(109.0 + 91.0) == [second]
    coordinator.failed(second, Failure.CRASH, "no sign of progress", 200.0)
    assert coordinator.expired(1e6) == []


def slow_one(straggler_seconds=0.0):
    """Three leases that took a second each, and a fourth that takes longer."""
    coordinator = Coordinator(shards(4), straggler_seconds=straggler_seconds)
    slow = coordinator.lease("slow", 0.0)
    for at in range(3):
        coordinator.succeeded(coordinator.lease("w", float(at)), at + 1.0)
    return coordinator, slow


def test_an_idle_worker_makes_a_second_attempt_at_the_slowest_lease():
    coordinator, slow = slow_one(straggler_seconds=5.0)
    assert coordinator.lease("w", 5.0) is None, "not before the time that any lease is left alone"
    assert coordinator.lease("slow", 6.0) is None, "not by the same worker"
    second = coordinator.lease("w", 6.0)
    assert second.shard == slow.shard
    assert coordinator.lease("w2", 100.0) is None, "no third"
    coordinator.succeeded(second, 7.0)
    assert coordinator.finished
    assert coordinator.given_up() == [slow]
    assert coordinator.given_up() == []
    coordinator.succeeded(slow, 8.0)
    assert coordinator.finished


def test_twice_what_nine_of_ten_took_is_slow():
    coordinator, _ = slow_one()
    assert coordinator.lease("w", 2.0) is None
    assert coordinator.lease("w", 2.5) is not None


def test_the_second_attempt_may_fail_and_the_first_succeed():
    coordinator, slow = slow_one()
    second = coordinator.lease("w", 9.0)
    coordinator.failed(second, Failure.CRASH, "segfault", 10.0)
    assert coordinator.lease("w", 99.0) is None, "it is under way, and has failed once: no third attempt beside it"
    coordinator.succeeded(slow, 100.0)
    assert coordinator.finished
    assert coordinator.given_up() == []


def test_the_second_attempt_may_be_lost_with_its_node():
    coordinator, slow = slow_one()
    coordinator.failed(coordinator.lease("w", 9.0), Failure.INFRA, "preempted", 10.0)
    assert coordinator.lease("w", 99.0) is None
    coordinator.failed(slow, Failure.INFRA, "preempted", 100.0)
    coordinator.succeeded(coordinator.lease("w", 101.0), 102.0)
    assert coordinator.finished


def test_two_attempts_that_both_die_count_as_two():
    coordinator, slow = slow_one()
    second = coordinator.lease("w", 9.0)
    coordinator.failed(second, Failure.CRASH, "segfault", 10.0)
    coordinator.failed(slow, Failure.CRASH, "segfault", 10.0)
    assert coordinator.cuts == [slow.shard]


def test_workers_are_of_use_until_all_is_committed():
    coordinator = Coordinator(shards(10))
    assert coordinator.wanted == 10
    leases = [coordinator.lease(f"w{n}", 0.0) for n in range(10)]
    for lease in leases[:-1]:
        coordinator.succeeded(lease, 1.0)
    assert coordinator.wanted == 2, "the last one and a spare, should it come back"


@dataclass(eq=False)
class Attempt:
    """A worker at work on a lease."""

    lease: Lease
    generation: int
    """Of the driver that gave it."""
    heard: bool = True
    """False for a zombie: its driver is gone, or takes it for dead."""


class Run:
    """Drivers, workers and a folder of commits that is first-wins.

    `records` is the folder: by name, the range of a commit, or "cut". A worker commits or dies; what it says reaches
    the driver late, twice, or as the news of its death. A driver that restarts knows `records` and nothing else.
    """

    def __init__(self, chance, count, size, deadly):
        self.chance, self.plan, self.data, self.deadly = chance, shards(count, size), count * size, deadly
        self.records, self.attempts, self.messages = {}, [], []
        self.now, self.generation, self.orders = 0.0, 0, []
        self.restart()

    def restart(self):
        """The driver dies; its workers may live on for a while and commit."""
        self.generation += 1
        self.messages = []
        for attempt in self.attempts:
            attempt.heard = False
        done = [SimpleNamespace(shard=name) for name, record in self.records.items() if record != "cut"]
        self.coordinator = Coordinator(
            remaining(self.plan, done, {name for name, record in self.records.items() if record == "cut"}),
            first_lease=max(self.orders, default=-1) + 1,
            epoch=self.generation,
            fatal_shards=10_000,
            progress_seconds=50.0,
            straggler_seconds=1.0,
        )

    def ask(self):
        """An idle worker asks for work."""
        worker = f"{self.generation}-{self.chance.randrange(4)}"
        if any(attempt.lease.worker == worker and attempt.heard for attempt in self.attempts):
            return
        if lease := self.coordinator.lease(worker, self.now):
            self.attempts.append(Attempt(lease, self.generation))
            self.orders.append(lease.id)

    def _say(self, attempt, what):
        if attempt.generation == self.generation:
            self.messages.append((what, attempt.lease))

    def _kills(self, lease):
        return not lease.quarantine and any(lease.shard.start <= datum < lease.shard.stop for datum in self.deadly)

    def finish(self):
        """A worker comes to its end, a death or a commit, and says so, or dies before it can, or is not understood."""
        if not self.attempts:
            return
        attempt = self.attempts.pop(self.chance.randrange(len(self.attempts)))
        outcome = self._outcome(attempt)
        then = self.chance.choice(["says so", "says so", "says so twice", "dies", "is lost"])
        if then == "dies":
            outcome = Failure.INFRA if attempt.lease.quarantine else Failure.CRASH
        self._say(attempt, Failure.INFRA if then == "is lost" else outcome)
        if then == "says so twice":
            self._say(attempt, outcome)

    def _outcome(self, attempt):
        shard = attempt.lease.shard
        if self._kills(attempt.lease):
            return Failure.CRASH
        return "cut" if self.records.setdefault(shard.name, (shard.start, shard.stop)) == "cut" else "done"

    def die(self):
        """A worker dies before its commit, or is taken for dead and lives on."""
        heard = [attempt for attempt in self.attempts if attempt.heard]
        if not heard:
            return
        attempt = self.chance.choice(heard)
        failure = self.chance.choice([Failure.INFRA, Failure.CRASH, Failure.CRASH, Failure.TASK])
        self._say(attempt, Failure.INFRA if attempt.lease.quarantine else failure)
        self._lose(attempt)

    def _lose(self, attempt):
        attempt.heard = False
        if self.chance.random() < 0.5:
            self.attempts.remove(attempt)

    def deliver(self):
        if self.messages:
            self._tell(*self.messages.pop(self.chance.randrange(len(self.messages))))

    def _tell(self, what, lease):
        if what == "done":
            self.coordinator.succeeded(lease, self.now)
        elif what == "cut":
            self.coordinator.was_cut(lease)
        else:
            self.coordinator.failed(lease, what, "an end", self.now)

    def wait(self):
        """Time passes; who gives no sign of progress is killed, or lives on."""
        self.now += self.chance.choice([0.1, 3.0, 60.0])
        expired = [lease for lease in self.coordinator.expired(self.now) if not lease.quarantine]
        for lease in expired:
            self.coordinator.failed(lease, Failure.CRASH, "no sign", self.now)
        self._stop(expired)

    def _stop(self, leases):
        for attempt in [attempt for attempt in self.attempts if attempt.lease in leases]:
            self._lose(attempt)

    def progress(self):
        if self.attempts:
            self.coordinator.progressed(self.chance.choice(self.attempts).lease, self.now)

    def cut(self):
        carry_out(self.coordinator, self.records)

    def give_up(self):
        self._stop(self.coordinator.given_up())

    def storm(self, steps):
        rules = {self.ask: 4, self.finish: 3, self.die: 3, self.deliver: 6, self.wait: 1, self.progress: 1}
        rules |= {self.cut: 2, self.give_up: 1, self.restart: 0.1}
        for _ in range(steps):
            self.chance.choices(list(rules), list(rules.values()))[0]()

    def calm(self):
        """No more chance: the run comes to its end."""
        for attempt in self.attempts:
            attempt.heard = False  # they finish, and nobody hears of it
        for lease in self.coordinator.in_flight:
            self.messages.append((Failure.INFRA, lease))
        for number in range(2000):
            for message in self.messages:
                self._tell(*message)
            carry_out(self.coordinator, self.records)
            if self.coordinator.finished or self.coordinator.fatal:
                return
            if lease := self.coordinator.lease(f"calm-{number}", self.now):
                self.attempts.append(Attempt(lease, self.generation))
            self.messages = []
            for attempt in self.attempts:
                self._say(attempt, self._outcome(attempt))
            self.attempts = []
            self.now += 100.0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 9), st.sets(st.integers(0, 26), max_size=3))
def test_every_datum_is_committed_exactly_once_whatever_happens(seed, count, size, deadly):
    """Deaths, zombies, delays, duplicates, lost messages, restarts of the driver: one commit for each datum."""
    chance = random.Random(seed)
    run = Run(chance, count, size, deadly)
    run.storm(chance.randrange(300))
    run.calm()
    assert run.coordinator.fatal is None
    assert run.coordinator.finished, "the run came to no end"
    committed = [record for record in run.records.values() if record != "cut"]
    assert sorted(datum for start, stop in committed for datum in range(start, stop)) == list(range(run.data))
