"""A ladder of budgets: short schedules first, longer ones for the fields that missed their target."""

from dataclasses import replace

import pytest
import torch

from nfscale.engine import Result, Stop, fit
from nfscale.optim import ESGD, LBFGS, Adam, Schedule, Scheduled
from nfscale.optim.schedules import SCHEDULES, budgets
from tests.engine.fits import DATA, FIELD, SEED, SIGNAL, STEPS, assert_as_alone, data_of, fitted

LADDER = Schedule("cosine", total_steps=80, warmup=5, first_steps=20)
STOP = Stop(max_steps=80, target=28.0, check_every=10)
ADAM = Adam(0.01, LADDER)
ESGD_SHARED = ESGD(0.5, LADDER)
ESGD_OWN = ESGD(0.05, LADDER, curvature="per_field")


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [
        (None, 1000, (1000,)),
        (100, 400, (100, 200, 400)),
        (100, 500, (100, 200, 500)),
        (100, 199, (199,)),
        (500, 300, (300,)),
    ],
)
def test_each_budget_is_at_least_twice_the_last(first, total, expected):
    assert budgets(first, total) == expected
    assert Schedule(total_steps=total, first_steps=first).budgets == expected


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_step_follows_the_schedule_of_the_least_budget_that_holds_it(kind, warmup):
    steps = torch.arange(100)
    ladder = Schedule(kind, 80, warmup, first_steps=20).factor(steps)
    for first, last in ((0, 20), (20, 40), (40, 100)):
        one = Schedule(kind, min(last, 80), warmup).factor(steps)
        assert torch.equal(ladder[first:last], one[first:last])
    assert torch.equal(Schedule(kind, 80, warmup, first_steps=20).factor(steps.view(4, 25)), ladder.view(4, 25))


CASES = [(ADAM, 28.0, "full"), (ADAM, 28.0, 16), (ESGD_SHARED, 28.0, 16), (ESGD_OWN, 24.0, 16)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("optimizer", "target", "samples"), CASES)
def test_a_field_on_a_ladder_has_the_bits_it_has_alone(optimizer, target, samples, step):
    data, stop = data_of(5), replace(STOP, target=target)
    how = {"optimizer": optimizer, "samples": samples, "stop": stop, "step": step}
    together = fitted(data, **how, batch=3)
    left = {sum(result.steps > end for end in LADDER.budgets) for result in together.values()}
    assert len(left) > 1, "all left within one budget: the ladder shows nothing"
    for result in together.values():
        assert result.history_step == list(range(0, result.steps + 1, 10))
        assert result.result is (Result.CONVERGED if result.quality >= target else Result.MAX_STEPS)
    assert_as_alone(together, data, **how)


@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize("optimizer", [ADAM, ESGD_SHARED, ESGD_OWN], ids=["adam", "esgd-shared", "esgd-per_field"])
def test_twins_climb_as_the_plain_step_does(optimizer, step):
    stop = Stop(max_steps=40, check_every=10)
    optimizer = replace(optimizer, schedule=replace(LADDER, total_steps=40))
    plain, twin = (fitted(DATA, optimizer, 16, stop, step=name) for name in ("plain", step))
    for datum_id, result in plain.items():
        torch.testing.assert_close(twin[datum_id].weights, result.weights, rtol=2e-3, atol=2e-4)


class Wanders(Adam):
    """Climbs the loss in the second half of the first budget, and rests from then on."""

    def update(self, grads, state, params, extra):
        updates, state = super().update(grads, state, params, extra)
        sign = -2.0 * (extra.step >= 10) * (extra.step < 20) + 1.0 * (extra.step < 10)
        return {name: update * sign[:, None] for name, update in updates.items()}, state


def test_the_next_budget_begins_at_the_best_params_so_far():
    constant = Schedule("constant", 40, first_steps=20)
    stop = Stop(max_steps=40, check_every=10)
    for result in fitted(DATA, Wanders(0.003, constant), stop=stop, step="plain").values():
        _, best, lost, *climbed = result.history_quality
        assert lost < best - 1
        assert climbed == [best] * 2
    for result in fitted(DATA, Wanders(0.003, replace(constant, first_steps=None)), stop=stop, step="plain").values():
        assert result.history_quality[3] == result.history_quality[2], "without a ladder nothing goes back"


def test_what_a_ladder_cannot_be_is_refused_with_the_reason():
    def run(stop: Stop, schedule: Schedule = LADDER):
        fit(FIELD, SIGNAL, DATA, optimizer=Adam(0.01, schedule), stop=stop, seed=SEED)

    with pytest.raises(ValueError, match="first_steps=20 is not a multiple of check_every=7"):
        run(Stop(80, check_every=7))
    with pytest.raises(ValueError, match="plateau_checks take for a plateau; use one of the two"):
        run(Stop(80, check_every=10, plateau_checks=3))
    with pytest.raises(ValueError, match="first_steps is at least 1, got 0"):
        Schedule(first_steps=0)
    assert not isinstance(LBFGS(), Scheduled)
