"""A fit that goes on from a snapshot gives the same fields, bit for bit, with fewer steps."""

import pytest

from nfscale.engine import Stop
from nfscale.optim import METHODS, Schedule
from tests.engine.fits import ADAM, DATA, ESGD_SHARED, STEPS, assert_same_bits, calibration_of, data_of, fitted
from tests.jobs import tiny_job

STOP = Stop(max_steps=60, check_every=20)


def snapshots(data, **how):
    """What a fit came to, its steps, and a snapshot at each of its checks."""
    taken, heard = [], []
    done = fitted(data, observe=lambda check: (taken.append(check.snapshot()), heard.append(check.steps)), **how)
    return done, heard, taken


def assert_goes_on(data, **how):
    """From any check, in another batch, data that had finished from their start."""
    done, heard, taken = snapshots(data, batch=3, **how)
    assert len(taken) > 2
    assert taken[0].slots
    for snapshot in taken:
        resumed = []
        again = fitted(data, batch=4, resume=snapshot, observe=lambda check, to=resumed: to.append(check.steps), **how)
        assert sum(resumed) <= sum(heard) - sum(slot.step for slot in snapshot.slots)
        for datum_id, one in done.items():
            assert_same_bits(one, again[datum_id])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED])
def test_a_fit_goes_on_from_any_check(step, optimizer):
    assert_goes_on(DATA, step=step, optimizer=optimizer, samples=16, stop=STOP)


@pytest.mark.parametrize("kind", METHODS)
def test_every_optimiser_keeps_all_it_remembers_in_its_state(tmp_path, kind):
    job = tiny_job(tmp_path, optimizer={"kind": kind}, fit={"max_steps": 60, "samples": "full", "check_every": 20})
    optimizer = job.build_optimizer(63)
    options = {"calibration": calibration_of(optimizer, "full", STOP)} if "diagonal" in optimizer.needs else {}
    assert_goes_on(data_of(3), optimizer=optimizer, stop=STOP, **options)


def test_samples_that_were_chosen_by_their_errors_are_chosen_again():
    assert_goes_on(DATA, sampling="error", samples=8, stop=STOP)


def test_a_field_that_was_restarted_goes_on_restarted():
    wild = type(ADAM)(30.0, Schedule("constant", total_steps=60))
    done, _, taken = snapshots(DATA[:2], optimizer=wild, stop=STOP)
    assert any(slot.restarts for snapshot in taken for slot in snapshot.slots)
    for snapshot in taken:
        again = fitted(DATA[:2], optimizer=wild, stop=STOP, resume=snapshot)
        for datum_id, one in done.items():
            assert_same_bits(one, again[datum_id])


def test_a_snapshot_of_something_else_is_refused():
    _, _, (snapshot, *_) = snapshots(DATA, stop=STOP)
    with pytest.raises(ValueError, match=r"the snapshot is of another optimiser: state/"):
        fitted(DATA, optimizer=METHODS["sgd"](0.1, Schedule("cosine", 60)), stop=STOP, resume=snapshot)
