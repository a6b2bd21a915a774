"""Why and when a field leaves the batch, what it leaves with, and what a divergence costs."""

import math
from dataclasses import replace

import pytest
import torch

from nfscale.engine import Result, Stop
from nfscale.engine.step import evaluate
from nfscale.fields import theta0_of
from nfscale.optim import Adam, Schedule
from nfscale.signals import Samples
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    SCHEDULE,
    SEED,
    SIGNAL,
    STEPS,
    STOP,
    assert_as_alone,
    assert_same_bits,
    data_of,
    fitted,
    stacked,
)


def test_max_steps_ends_a_field_that_nothing_else_ends():
    for result in fitted(DATA).values():
        assert result.result is Result.MAX_STEPS
        assert result.result.ok
        assert (result.steps, result.steps_to_target, result.restarts) == (40, None, 0)
        assert len(result.history_quality) == 3


def test_the_target_ends_a_field_at_the_first_check_that_reaches_it():
    stop = Stop(max_steps=100, target=28.0, check_every=5)
    optimizer = Adam(0.01, Schedule("constant"))
    results = fitted(DATA, optimizer, stop=stop)
    assert len({result.steps for result in results.values()}) > 1, "all left together: the target shows nothing"
    for result in results.values():
        assert result.result is Result.CONVERGED
        assert result.steps == result.steps_to_target == result.history_step[-1]
        assert result.quality == result.history_quality[-1] >= 28.0
        assert all(quality < 28.0 for quality in result.history_quality[:-1])


def test_fields_come_out_in_the_order_in_which_they_finish():
    stop = Stop(max_steps=100, target=28.0, check_every=5)
    results = fitted(DATA, Adam(0.01, Schedule("constant")), stop=stop)
    steps = [result.steps for result in results.values()]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_a_field_that_gains_too_little_over_the_checks_leaves_on_a_plateau():
    """A learning rate of nearly zero gains nothing; the plateau is seen when the checks it needs have been."""
    stop = Stop(max_steps=100, check_every=5, plateau_checks=3, plateau_gain=0.1)
    for result in fitted(DATA, Adam(1e-9, Schedule("constant")), stop=stop).values():
        assert result.result is Result.PLATEAU
        assert result.result.ok
        assert result.steps == 15
        assert result.steps_to_target is None


def test_a_field_that_still_gains_is_not_on_a_plateau():
    stop = Stop(max_steps=40, check_every=5, plateau_checks=3, plateau_gain=0.1)
    assert {result.result for result in fitted(DATA, stop=stop).values()} == {Result.MAX_STEPS}


def test_a_huge_learning_rate_ends_as_diverged_after_its_restarts():
    results = fitted(DATA, Adam(1000.0, SCHEDULE), stop=replace(STOP, max_restarts=2))
    untrained = fitted(DATA, Adam(1e-12, SCHEDULE))
    for datum_id, result in results.items():
        assert result.result is Result.DIVERGED
        assert not result.result.ok
        assert result.restarts == 2
        assert result.history_step[0] == 0
        assert math.isfinite(result.loss)
        assert torch.isfinite(result.weights).all()
        # Nothing was better than theta0, so that is what is kept.
        assert torch.equal(result.weights, theta0_of(FIELD, SEED))
        assert result.quality == untrained[datum_id].history_quality[0]


@pytest.mark.parametrize("step", STEPS)
def test_restarts_halve_the_rate_and_nothing_else(step):
    """A field that restarted k times is the field of another run at rate / 2^k."""
    results = fitted(data_of(6), Adam(2.0, SCHEDULE), samples=16, step=step)
    restarts = {result.restarts for result in results.values()}
    assert len(restarts - {0}) > 1, "the rate restarts too few: choose another"
    for count in restarts:
        calm = fitted(data_of(6), Adam(2.0 / 2**count, SCHEDULE), samples=16, step=step)
        for result in results.values():
            if result.restarts == count and result.result.ok:
                expected = calm[result.id]
                assert expected.restarts == 0
                assert_same_bits(replace(result, restarts=0), expected)


def test_neighbours_of_fields_that_diverge_and_restart_keep_their_bits():
    optimizer = Adam(10.0, SCHEDULE)
    together = fitted(data_of(6), optimizer, batch=6)
    outcomes = {(result.result, result.restarts) for result in together.values()}
    assert Result.DIVERGED in {outcome for outcome, _ in outcomes}
    assert Result.MAX_STEPS in {outcome for outcome, _ in outcomes}
    assert_as_alone(together, data_of(6), optimizer=optimizer)


@pytest.mark.parametrize("batch", ["auto", 2])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_a_field_whose_loss_overflows_diverges_and_its_neighbours_keep_their_bits(optimizer, batch):
    """With two slots it comes third, into a slot that another field has left: nothing of that one remains."""
    values = DATA[0][1].values.clone()
    values[0] = 1e30  # squared, more than float32 holds
    wild = ("wild", Samples(DATA[0][1].coordinates, values))
    together = fitted([*DATA[:2], wild, *DATA[2:]], optimizer, batch=batch)
    assert together["wild"].result is Result.DIVERGED
    assert together["wild"].restarts == STOP.max_restarts
    assert torch.equal(together["wild"].weights, theta0_of(FIELD, SEED))
    for datum_id, result in fitted(DATA, optimizer).items():
        assert result.restarts == 0
        assert_same_bits(together[datum_id], result)


@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_loss_and_quality_are_those_of_the_weights_and_the_best_of_the_history(rate):
    """At the higher rate the last check is not the best one for some field."""
    stop = Stop(max_steps=60, check_every=5)
    results = fitted(DATA, Adam(rate, Schedule("constant")), stop=stop)
    last_is_best = []
    for datum_id, samples in DATA:
        result = results[datum_id]
        rows = result.weights.repeat(2, 1)
        loss, quality = evaluate(FIELD, SIGNAL, rows, stacked([(datum_id, samples)] * 2))
        assert (result.loss, result.quality) == pytest.approx((float(loss[0]), float(quality[0])), rel=1e-5)
        assert result.quality == max(result.history_quality)
        last_is_best.append(result.quality == result.history_quality[-1])
        params = {name: p[None] for name, p in result.params(FIELD.layout).items()}
        predicted = FIELD.apply(params, samples.coordinates[None])
        own = SIGNAL.quality(predicted, Samples(samples.coordinates[None], samples.values[None]))
        assert float(own) == pytest.approx(result.quality, abs=1e-3)
    if rate == 0.2:
        assert not all(last_is_best)


@pytest.mark.parametrize(("max_steps", "check_every", "ways_out"), [(70, 50, "50 or 100"), (130, 40, "120 or 160")])
def test_max_steps_that_no_check_would_meet_are_refused_with_the_ways_out(max_steps, check_every, ways_out):
    with pytest.raises(ValueError, match=rf"{max_steps}.*check_every={check_every}.*{ways_out}"):
        Stop(max_steps=max_steps, check_every=check_every)


def test_fewer_steps_than_a_check_are_checked_at_their_end():
    stop = Stop(max_steps=15, check_every=50)
    assert stop.cadence == 15
    assert [result.history_step for result in fitted(DATA[:2], stop=stop).values()] == [[0, 15]] * 2


@pytest.mark.parametrize("change", [{"max_steps": 0}, {"check_every": 0}])
def test_a_stop_has_at_least_one_step_and_checks(change):
    with pytest.raises(ValueError, match="is at least 1, got 0"):
        Stop(**({"max_steps": 10} | change))
