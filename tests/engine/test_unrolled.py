"""Fits that gradients go through: the engine's own fits, and gradients against differences."""

import math

import pytest
import torch

from nfscale.engine import Stop
from nfscale.engine.learners import MAML, MetaSGD
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import stack_samples
from nfscale.engine.unrolled import Descent, Unrolled
from nfscale.fields import theta0_of
from nfscale.optim import Adam, Scaled, Schedule
from nfscale.rng import as_tensor, datum_seed
from tests.engine.fits import DATA, FIELD, SEED, SIGNAL, fitted

RATE, BETAS, COUNT = 0.01, (0.3, 0.7), 10
CPU = torch.device("cpu")
SAMPLES = stack_samples([samples for _, samples in DATA], CPU)
SEEDS = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in DATA], CPU)
THETA0 = theta0_of(FIELD, SEED)
FACTORS = torch.linspace(0.5, 2, FIELD.layout.size)


def unrolled(per_step: int = 63) -> Unrolled:
    return Unrolled(FIELD, SIGNAL, RATE, BETAS, Sampler(63, per_step))


@pytest.mark.parametrize("per_step", [63, 16])
def test_they_are_the_fits_of_the_engine(per_step):
    scaled = Scaled(Adam(RATE, Schedule("cosine", COUNT), *BETAS), FACTORS)
    stop = Stop(COUNT, check_every=COUNT)
    fits = fitted(DATA, scaled, init=THETA0, stop=stop, samples=per_step)
    assert all(fit.quality == fit.history_quality[-1] for fit in fits.values()), "their best is their last"
    theirs = torch.stack([fits[datum_id].weights for datum_id, _ in DATA])
    theta0, factors = (row.repeat(5, 1).requires_grad_() for row in (THETA0, FACTORS))
    ours = unrolled(per_step).fitted(theta0, factors, SAMPLES, SEEDS, COUNT).detach()
    assert (ours - theirs).abs().max() < 1e-3 * (theirs - THETA0).abs().max()


@pytest.mark.parametrize("per_step", [63, 16])
def test_gradients_go_through_all_steps(per_step):
    draw = torch.Generator().manual_seed(1)
    start, samples, fits = THETA0.double(), SAMPLES.map(torch.Tensor.double), unrolled(per_step)
    directions = torch.randn(2, len(start), generator=draw, dtype=torch.float64)

    def loss_at(along: torch.Tensor) -> torch.Tensor:
        factors = (FACTORS.double().log() + along[1] * directions[1]).exp()
        theta0 = (start + along[0] * directions[0]).repeat(5, 1)
        rows = fits.fitted(theta0, factors.repeat(5, 1), samples, SEEDS, COUNT)
        return fits.log_losses(rows, samples, SEEDS, COUNT).sum()

    along = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(loss_at(along), along)
    for which in range(2):
        small = torch.zeros(2, dtype=torch.float64)
        small[which] = 1e-6
        ends = [loss_at((sign * small).requires_grad_()).item() for sign in (1, -1)]
        assert slopes[which].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_the_first_rounds_take_a_quarter_of_the_steps_and_rates_fall_to_zero():
    learner = MetaSGD(rounds=40, inner_steps=20, outer_rate=0.1, rate_of_rates=0.2)
    assert [learner.steps_after(done) for done in (0, 5, 10, 39)] == [5, 13, 20, 20]
    assert learner.outer_rates(0) == (0.1, 0.2)
    assert learner.outer_rates(20) == pytest.approx((0.05, 0.1))
    assert learner.outer_rates(40) == pytest.approx((0, 0))
    assert MAML(outer_rate=0.1).outer_rates(0) == (0.1,)


@pytest.mark.parametrize("learner", [MAML(outer_rate=1e-3), MetaSGD(outer_rate=1e-3, rate_of_rates=0.1)])
def test_a_round_moves_what_is_learned_by_its_own_rate(learner):
    descent = Descent(learner, unrolled(), THETA0)
    assert torch.equal(descent.theta0, THETA0)
    assert descent.go_on(SAMPLES, SEEDS, 0) == 5 * 5
    assert (descent.theta0 - THETA0).abs().max() == pytest.approx(1e-3, rel=1e-2)
    if learner.learns_rates:
        assert descent.factors.max() == pytest.approx(math.exp(0.1), rel=1e-2)
        assert descent.factors.min() == pytest.approx(math.exp(-0.1), rel=1e-2)
    else:
        assert descent.factors is None
