"""Fits that gradients go through: the engine's own fits, and gradients against differences."""

import math

import pytest
import torch

from nfscale.engine import Stop
from nfscale.engine.dispatch import PLAIN, Step, chosen
from nfscale.engine.learners import MAML, MetaSGD
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import stack_samples
from nfscale.engine.unrolled import Descent, Unrolled
from nfscale.fields import theta0_of
from nfscale.optim import Adam, Scaled, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Samples
from tests.engine.fits import DATA, FACTORS, FIELD, SEED, SIGNAL, fitted

RATE, BETAS, COUNT = 0.01, (0.3, 0.7), 10
CPU = torch.device("cpu")
SAMPLES = stack_samples([samples for _, samples in DATA], CPU)
SEEDS = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in DATA], CPU)
THETA0 = theta0_of(FIELD, SEED)
STARTS = THETA0.repeat(5, 1), FACTORS.repeat(5, 1)


ADAM = Adam(RATE, Schedule("cosine", COUNT), *BETAS)


def unrolled(per_step: int = 63, samples: Samples = SAMPLES, step: Step = PLAIN, count: int = COUNT) -> Unrolled:
    return Unrolled(FIELD, SIGNAL, ADAM, Sampler(63, per_step), step, samples, SEEDS, count)


@pytest.mark.parametrize("per_step", [63, 16])
def test_they_are_the_fits_of_the_engine(per_step):
    scaled = Scaled(ADAM, FACTORS)
    stop = Stop(COUNT, check_every=COUNT)
    fits = fitted(DATA, scaled, init=THETA0, stop=stop, samples=per_step)
    assert all(fit.quality == fit.history_quality[-1] for fit in fits.values()), "their best is their last"
    theirs = torch.stack([fits[datum_id].weights for datum_id, _ in DATA])
    ours = unrolled(per_step).fitted(*STARTS).rows
    assert (ours - theirs).abs().max() < 1e-3 * (theirs - THETA0).abs().max()


@pytest.mark.parametrize("per_step", [63, 16])
def test_slopes_go_back_through_all_steps(per_step):
    draw = torch.Generator().manual_seed(1)
    fits = unrolled(per_step, SAMPLES.map(torch.Tensor.double))
    starts = [row.double().repeat(5, 1) for row in (THETA0, FACTORS.log())]
    path = fits.fitted(starts[0], starts[1].exp())
    slopes = path.back(path.end()[1])
    for which in range(2):
        direction = torch.randn(starts[0].shape, generator=draw, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            theta0, logarithms = (row + sign * 1e-6 * direction * (place == which) for place, row in enumerate(starts))
            ends.append(fits.fitted(theta0, logarithms.exp()).end()[0])
        differences = (ends[0] - ends[1]) / 2e-6
        assert (slopes[which] * direction).sum(dim=1).tolist() == pytest.approx(differences.tolist(), rel=1e-4)


def test_a_faster_step_goes_back_as_the_plain_one():
    step = chosen("torch", CPU, FIELD, SIGNAL, ADAM)
    theirs, ours = (path.back(path.end()[1]) for path in (unrolled(step=one).fitted(*STARTS) for one in (PLAIN, step)))
    for plain, fast in zip(theirs, ours, strict=True):
        assert (plain - fast).norm() < 1e-3 * plain.norm()


def test_the_first_rounds_take_a_quarter_of_the_steps_and_rates_fall_to_zero():
    learner = MetaSGD(rounds=40, inner_steps=20, outer_rate=0.1, rate_of_rates=0.2)
    assert [learner.steps_after(done) for done in (0, 5, 10, 39)] == [5, 13, 20, 20]
    assert learner.outer_rates(0) == (0.1, 0.2)
    assert learner.outer_rates(20) == pytest.approx((0.05, 0.1))
    assert learner.outer_rates(40) == pytest.approx((0, 0))
    assert MAML(outer_rate=0.1).outer_rates(0) == (0.1,)


@pytest.mark.parametrize("learner", [MAML(outer_rate=1e-3), MetaSGD(outer_rate=1e-3, rate_of_rates=0.1)])
def test_a_round_moves_what_is_learned_by_its_own_rate(learner):
    descent = Descent(learner, THETA0)
    assert torch.equal(descent.theta0, THETA0)
    descent.go_on(unrolled(count=5), 0)
    assert (descent.theta0 - THETA0).abs().max() == pytest.approx(1e-3, rel=1e-2)
    if learner.learns_rates:
        assert descent.factors.max() == pytest.approx(math.exp(0.1), rel=1e-2)
        assert descent.factors.min() == pytest.approx(math.exp(-0.1), rel=1e-2)
    else:
        assert descent.factors is None


def test_a_descent_that_is_lost_goes_back_and_on_at_half_the_rates():
    learner = MAML(rounds=300, inner_steps=COUNT, outer_rate=2.0)
    assert (learner.steps_after(100), learner.outer_rates(100)) == (COUNT, pytest.approx((1.5,)))
    descent = Descent(learner, THETA0)
    descent.go_on(unrolled(), 100)
    assert (descent.theta0 - THETA0).abs().max() == pytest.approx(1.5, rel=1e-2), "the first step leads astray"
    rounds = 0
    while not torch.equal(descent.theta0, THETA0):
        descent.go_on(unrolled(), 100)
        rounds += 1
        assert rounds < 10
    descent.go_on(unrolled(), 100)
    assert (descent.theta0 - THETA0).abs().max() == pytest.approx(0.75, rel=1e-2)
