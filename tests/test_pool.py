"""Calls by a pool's workers: what is made again, what is given up, and what is told."""

import os

import pytest

from nfscale.coordinator import Failure
from nfscale.pool import Failed, InProcessPool, Succeeded, call_all


class Scripted:
    """A pool of one worker whose calls end as a script says, by what they are called with."""

    def __init__(self, **script):
        self.script = {name: list(failures) for name, failures in script.items()}
        self.made = []
        self._call = None

    def idle(self):
        return [] if self._call else ["one"]

    def start(self, lease):
        self._call = lease

    def poll(self, seconds):
        call, self._call = self._call, None
        (name,) = call.arguments
        self.made.append(name)
        if left := self.script.get(name):
            return [Failed("one", left.pop(0), f"{name} failed")]
        return [Succeeded("one", call.function(name))]

    def waiting(self):
        return "a worker" if len(self.made) < 2 else None


def test_results_come_in_the_order_of_the_arguments():
    assert call_all(InProcessPool(None), divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]
    assert call_all(InProcessPool(None), divmod, []) == []


@pytest.mark.parametrize(
    ("failures", "times", "succeeds"),
    [
        ([Failure.INFRA] * 5, 6, True),
        ([Failure.CRASH], 2, True),
        ([Failure.CRASH, Failure.INFRA, Failure.CRASH], 3, False),
        ([Failure.TASK], 1, False),
        ([Failure.STORAGE], 1, False),
    ],
)
def test_a_call_is_made_again_where_that_may_help(failures, times, succeeds):
    pool = Scripted(bad=failures)
    bad, good = call_all(pool, str.upper, [("bad",), ("good",)])
    assert pool.made == ["bad"] * times + ["good"]
    assert good == "GOOD"
    assert bad == "BAD" if succeeds else bad == Failed("one", failures[-1], "bad failed")


def test_what_a_call_raises_is_a_failure_and_the_others_go_on():
    failed, two = call_all(InProcessPool(None), int, [("two",), ("2",)])
    assert (failed.failure, two) == (Failure.TASK, 2)
    assert failed.message.startswith("ValueError: invalid literal")


def test_what_is_waited_for_is_told_once():
    told = []
    call_all(Scripted(), os.path.basename, [("a",), ("b",), ("c",)], told.append)
    assert told == ["waiting for a worker"]
