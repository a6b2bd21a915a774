"""A start that is learned: each learner against what its paper says, and what all of them promise."""

from dataclasses import replace

import pytest
import torch

from nfscale.engine import LEARNERS, Stop, fit, learn_start
from nfscale.engine.learners import MAML, FirstOrderMAML, MetaSGD, Reptile
from nfscale.fields import theta0_of
from nfscale.optim import Adam, Scaled, Schedule
from nfscale.signals import Samples
from tests.engine.fits import FIELD, SEED, SIGNAL, STEPS, data_of, fitted, smooth_image

RATE = 0.01
OUTER_RATES = {"reptile": 0.5, "fomaml": 3e-3, "maml": 3e-3, "metasgd": 3e-3}
SMALL = {"data": 5, "rounds": 12, "tasks": 3, "inner_steps": 10}


def relatives(first: int, stop: int) -> list[tuple[str, Samples]]:
    """Images that have most of one image in common."""
    common = smooth_image(99)
    return [(f"relative-{n}", SIGNAL.samples(0.8 * common + 0.2 * smooth_image(n))) for n in range(first, stop)]


DATA = relatives(0, 5)


def learned(data=DATA, *, learner, **options):
    options = {"seed": SEED, "learning_rate": RATE, "device": "cpu", **options}
    return learn_start(FIELD, SIGNAL, data, learner=learner, **options)


def fitted_for(steps: int) -> torch.Tensor:
    """The params of all data after so many annealed steps: [F, P]."""
    results = fitted(DATA, Adam(RATE, Schedule("cosine", steps)), stop=Stop(steps, check_every=steps))
    assert all(result.quality == result.history_quality[-1] for result in results.values())
    return torch.stack([result.weights for result in results.values()])


class Watched(Reptile):
    """Remembers what it was shown."""

    def outer_step(self, theta0, fitted, slopes, moments, done):
        object.__setattr__(self, "shown", (fitted, slopes))
        return super().outer_step(theta0, fitted, slopes, moments, done)


def test_reptile_goes_a_share_of_the_way_to_the_mean_of_the_fitted_params():
    start, ends = theta0_of(FIELD, SEED), fitted_for(10)
    once = learned(learner=Reptile(rounds=1, tasks=5, inner_steps=10, outer_rate=0.3))
    torch.testing.assert_close(once.theta0, start + 0.3 * (ends.mean(dim=0) - start), rtol=1e-4, atol=1e-6)
    assert (once.data, once.field_steps) == (5, 100)
    last = Reptile(rounds=4, outer_rate=0.4).outer_step(torch.zeros(2), torch.ones(3, 2), torch.ones(3, 2), start, 3)
    torch.testing.assert_close(last, torch.full((2,), 0.1))  # a quarter of the share is left in the last of four


def test_learners_are_shown_the_fitted_params_and_the_gradients_of_the_log_loss_at_them():
    ends = fitted_for(10).requires_grad_()
    watched = Watched(rounds=1, tasks=5, inner_steps=10)
    once = learned(learner=watched)
    together = torch.stack([samples.values for _, samples in DATA])
    losses = (
        (FIELD.apply(FIELD.layout.unravel(ends), DATA[0][1].coordinates[None]) - together).square().mean(dim=(1, 2))
    )
    (slopes,) = torch.autograd.grad(losses.log().sum(), ends)

    def in_order(rows: torch.Tensor) -> torch.Tensor:
        return rows[rows[:, 0].argsort()]  # rounds have an order of their own

    fitted_rows, shown_slopes = watched.shown
    torch.testing.assert_close(in_order(fitted_rows), in_order(ends.detach()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        in_order(shown_slopes), in_order(slopes), rtol=1e-3, atol=1e-3 * float(slopes.abs().max())
    )
    assert once.loss_before == pytest.approx(float(losses.detach().log().mean().exp()), rel=1e-4)


def test_first_order_maml_takes_steps_of_adam_on_the_mean_gradient():
    parameter = torch.nn.Parameter(torch.zeros(4))
    reference = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99))
    learner, theta0, moments = FirstOrderMAML(rounds=1000, outer_rate=0.01), torch.zeros(4), torch.zeros(2, 4)
    for done in range(3):  # the cosine has hardly begun
        slopes = torch.randn(5, 4, generator=torch.Generator().manual_seed(done))
        theta0 = learner.outer_step(theta0, slopes, slopes, moments, done)
        parameter.grad = slopes.mean(dim=0)
        reference.step()
    torch.testing.assert_close(theta0, parameter.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(learner.outer_step(theta0, slopes, slopes, moments, 1000), theta0), "no rate is left at the end"


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("samples", ["full", 16])
def test_fits_of_other_data_go_further_from_what_was_learned(kind, samples):
    start = learned(relatives(0, 8), learner=LEARNERS[kind](**SMALL, outer_rate=OUTER_RATES[kind]), samples=samples)
    assert start.loss_after < start.loss_before
    unseen = relatives(8, 14)
    how = {"stop": Stop(10, check_every=10), "samples": samples}
    adam = Adam(RATE, Schedule("cosine", 10))
    assert (start.factors is None) == (kind != "metasgd")
    scaled = adam if start.factors is None else Scaled(adam, start.factors)
    drawn = fitted(unseen, adam, init="shared", **how)
    better = fitted(unseen, scaled, init=start.theta0, **how)
    gained = [better[name].quality - drawn[name].quality for name in drawn]
    assert sum(gained) / len(gained) > 0.5


@pytest.mark.parametrize("kind", LEARNERS)
def test_what_is_learned_is_a_function_of_the_data_the_learner_and_the_seed(kind):
    learner = LEARNERS[kind](**SMALL, outer_rate=OUTER_RATES[kind])
    first = learned(learner=learner, samples=16)
    assert torch.equal(learned(learner=learner, samples=16).theta0, first.theta0)
    assert first.theta0.dtype == torch.float32
    for other in ({"seed": SEED + 1, "theta0": theta0_of(FIELD, SEED)}, {"data": relatives(4, 9)}):
        assert not torch.equal(learned(learner=learner, samples=16, **other).theta0, first.theta0)


@pytest.mark.parametrize("step", STEPS[1:])
def test_twins_learn_what_the_plain_step_learns(step):
    learner = Reptile(**SMALL | {"rounds": 4})
    plain, twin = (learned(learner=learner, samples=16, step=name).theta0 for name in ("plain", step))
    torch.testing.assert_close(twin, plain, rtol=2e-3, atol=2e-4)


def test_a_learned_start_is_one_that_fit_takes():
    start = learned(learner=Reptile(**SMALL)).theta0
    (result, *_) = fit(
        FIELD, SIGNAL, DATA, optimizer=Adam(1e-12, Schedule()), stop=Stop(1), seed=0, init=start, device="cpu"
    )
    assert torch.equal(result.weights, start)


def test_learning_that_goes_wrong_says_so_with_the_way_out():
    way_out = "use a smaller learning.outer_rate, more learning.rounds, or field.init=shared"
    with pytest.raises(ValueError, match=f"loss of .* from the start that was learned, and of .*; {way_out}"):
        learned(learner=FirstOrderMAML(**SMALL, outer_rate=10.0))
    for learner in (FirstOrderMAML(**SMALL, outer_rate=1e30), MAML(**SMALL, outer_rate=1e30)):
        with pytest.raises(ValueError, match=f"the fits of round . diverged from the start that is learned; {way_out}"):
            learned(learner=learner)
    with pytest.raises(ValueError, match="learned from data of one kind"):
        learned([*DATA, *data_of(2, 4, 4)], learner=Reptile(**SMALL))
    with pytest.raises(ValueError, match="learned from data of one kind"):
        learned([], learner=Reptile(**SMALL))


@pytest.mark.parametrize("kind", LEARNERS)
def test_numbers_out_of_range_are_refused(kind):
    for name in ("data", "rounds", "tasks", "inner_steps"):
        with pytest.raises(ValueError, match=f"learning.{name} is at least 1, got 0"):
            replace(LEARNERS[kind](), **{name: 0})
    with pytest.raises(ValueError, match=r"learning\.outer_rate is above 0"):
        LEARNERS[kind](outer_rate=0.0)
    with pytest.raises(ValueError, match=r"learning\.rate_of_rates is above 0, got -1"):
        MetaSGD(rate_of_rates=-1.0)
