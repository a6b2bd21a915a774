"""Curvature that fields share: what is estimated, against full Hessians, and how steps use it."""

import sys
from dataclasses import replace

import pytest
import torch

from nfscale.engine import Calibration, Stop, calibrate, dispatch, fit
from nfscale.fields import MLP, theta0_of
from nfscale.optim import ESGD, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Image, Samples
from tests.engine.fits import (
    DATA,
    ESGD_SHARED,
    FIELD,
    NEEDS_COMPILER,
    SCHEDULE,
    SEED,
    SIGNAL,
    STOP,
    calibration_of,
    data_of,
    fitted,
)


def test_shared_curvature_without_a_calibration_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"calibration=.*calibrate"):
        list(fit(FIELD, SIGNAL, DATA, optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu"))


class Louder(Image):
    """The same images with another unit of the loss."""

    def loss(self, predicted, samples):
        return 1e3 * super().loss(predicted, samples)


@pytest.mark.parametrize("curvature", ["shared", "per_field"])
def test_the_unit_of_the_loss_changes_no_esgd_fit(curvature):
    """Two segments of the loop, curvature measured by it or by a calibration: equal up to rounding."""
    optimizer, stop = ESGD(0.2, SCHEDULE, curvature=curvature, update_every=5), Stop(max_steps=10, check_every=5)
    results = []
    for signal in (SIGNAL, Louder(1)):
        options = {"optimizer": optimizer, "stop": stop, "seed": SEED, "device": "cpu"}
        shared = calibrate(FIELD, signal, DATA, **options) if curvature == "shared" else None
        fields = fit(FIELD, signal, DATA, calibration=shared, **options)
        results.append({result.id: result for result in fields})
    for datum_id, result in results[0].items():
        moved = (result.weights - theta0_of(FIELD, SEED)).square().mean().sqrt()
        assert moved > 1e-3
        torch.testing.assert_close(results[1][datum_id].weights, result.weights, rtol=1e-3, atol=1e-3 * float(moved))


def test_the_calibration_at_theta0_is_the_row_norms_of_the_mean_hessian_square():
    """Sixteen fields probe four times each; full Hessians of a field of 17 weights say what they should find."""
    field = MLP(2, 1, width=4, depth=1, omega_0=5.0)
    data = data_of(16, 5, 5)
    optimizer, theta0 = ESGD(0.1, SCHEDULE, beta2=0.9), theta0_of(field, SEED)
    shared = calibrate(field, SIGNAL, data, optimizer=optimizer, stop=Stop(max_steps=1), seed=SEED, device="cpu")
    assert shared.diagonal.shape == (1, field.layout.size)
    row_norms, variances = [], []
    for _, samples in data:

        def loss(row, samples=samples):
            predicted = field.apply(field.layout.unravel(row[None]), samples.coordinates[None].double())
            return (predicted[0] - samples.values.double()).square().mean()

        hessian = torch.autograd.functional.hessian(loss, theta0.double())
        row_norms.append(hessian.square().sum(dim=1))
        variances.append(2 * (row_norms[-1].square() - hessian.pow(4).sum(dim=1)))
    # Four probes of each field at theta0, weighed as a running mean of beta2 = 0.9.
    weights = 0.1 * 0.9 ** torch.arange(4, dtype=torch.float64) / (1 - 0.9**4)
    error = (torch.stack(variances).mean(dim=0) / len(data) * weights.square().sum()).sqrt()
    difference = shared.diagonal[0].double().square() - torch.stack(row_norms).mean(dim=0)
    assert (difference.abs() < 3 * error).all()
    assert (difference.abs() > 0.2 * error).any()  # an error bar of honest size


def test_a_calibration_is_the_running_mean_over_its_probes_and_the_median_step():
    """At a learning rate of zero all stays at theta0, so that full Hessians and the probes' seeds say every number."""
    field, data = MLP(2, 1, width=4, depth=1, omega_0=5.0), data_of(5, 5, 5)
    optimizer, theta0 = ESGD(0.0, Schedule("constant"), beta2=0.8, damping=0.1), theta0_of(field, SEED)
    stop = Stop(max_steps=30, check_every=10)
    shared = calibrate(field, SIGNAL, data, optimizer=optimizer, stop=stop, seed=SEED, device="cpu")
    seeds = as_tensor([datum_seed(SEED, datum_id) for datum_id, _ in data])
    hessians, gradients = [], []
    for _, samples in data:

        def loss(row, samples=samples):
            predicted = field.apply(field.layout.unravel(row[None]), samples.coordinates[None].double())
            return (predicted[0] - samples.values.double()).square().mean()

        hessians.append(torch.autograd.functional.hessian(loss, theta0.double()))
        gradients.append(torch.autograd.functional.jacobian(loss, theta0.double()))
    square, weight = torch.zeros(field.layout.size, dtype=torch.float64), 0.0
    for row, probed_steps in enumerate(([0, -1, -2, -3], [10], [20])):
        for step in probed_steps:
            probes = rademacher(seeds, Stream.PROBE, torch.full((5,), step), field.layout.size).double()
            products = torch.stack([hessian @ probe for hessian, probe in zip(hessians, probes, strict=True)])
            square, weight = 0.8 * square + 0.2 * products.square().mean(dim=0), 0.8 * weight + 0.2
        diagonal = (square / weight).sqrt()
        torch.testing.assert_close(shared.diagonal[row].double(), diagonal, rtol=1e-4, atol=1e-6)
        steps = torch.stack(gradients) / (diagonal + 0.1 * diagonal.mean())
        typical = steps.square().mean(dim=1).sqrt().median()
        torch.testing.assert_close(shared.step_rms[row].double(), typical, rtol=1e-4, atol=0)
    assert len(shared.diagonal) == len(shared.step_rms) == 3


def test_a_calibration_says_what_holds_at_each_step():
    shared = Calibration(torch.arange(6.0).view(3, 2), torch.tensor([1.0, 2.0, 3.0]), every=10)
    diagonal, step_rms = shared.at(torch.tensor([0, 9, 10, 25, 999]))
    assert step_rms.tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert diagonal.tolist() == [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [4.0, 5.0]]


def test_a_calibration_has_one_row_per_update_and_ends_at_the_target():
    whole = calibration_of(ESGD_SHARED, 16)
    assert whole.every == 10
    assert whole.diagonal.shape == (4, FIELD.layout.size)
    assert (whole.diagonal >= 0).all()
    assert (whole.step_rms > 0).all()
    early = calibration_of(ESGD_SHARED, 16, stop=replace(STOP, target=10.0))
    assert early.diagonal.shape == (2, FIELD.layout.size)
    assert torch.equal(early.diagonal, whole.diagonal[:2])
    assert torch.equal(early.step_rms, whole.step_rms[:2])


def test_a_calibration_starts_where_fit_starts():
    options = {"optimizer": ESGD_SHARED, "stop": STOP, "seed": SEED, "device": "cpu"}
    by_default = calibrate(FIELD, SIGNAL, DATA, **options)
    same = calibrate(FIELD, SIGNAL, DATA, theta0=theta0_of(FIELD, SEED), **options)
    other = calibrate(FIELD, SIGNAL, DATA, theta0=theta0_of(FIELD, SEED + 1), **options)
    assert torch.equal(by_default.diagonal, same.diagonal)
    assert torch.equal(by_default.step_rms, same.step_rms)
    assert not torch.equal(by_default.diagonal, other.diagonal)


@NEEDS_COMPILER
def test_a_calibration_on_more_threads_has_the_same_bits():
    """And torch's own operations have as many as before."""
    field, data = MLP(2, 1, width=16, depth=2), data_of(9, 20, 20)
    stop = replace(STOP, target=25.0)
    options = {"optimizer": ESGD_SHARED, "stop": stop, "seed": SEED, "device": "cpu", "samples": 100}
    before = torch.get_num_threads()
    alone, together = (calibrate(field, SIGNAL, data, threads=threads, **options) for threads in (1, 3))
    assert torch.get_num_threads() == before
    assert torch.equal(alone.diagonal, together.diagonal)
    assert torch.equal(alone.step_rms, together.step_rms)


@NEEDS_COMPILER
@pytest.mark.parametrize(("step", "seen"), [("native", {3}), ("torch", {1}), ("plain", {1})])
def test_native_steps_alone_take_more_threads(monkeypatch, step, seen):
    """Sums of the matrix library may depend on how many there are."""
    taken = dispatch.chosen(step, torch.device("cpu"), FIELD, SIGNAL, ESGD_SHARED)
    counts = set()

    def watched(*arguments):
        counts.add(torch.get_num_threads())
        return taken.gradient(*arguments)

    module = sys.modules["nfscale.engine.calibrate"]
    monkeypatch.setattr(module, "chosen", lambda *arguments: replace(taken, gradient=watched))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calibrate(FIELD, SIGNAL, DATA, optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu", threads=3)
    finally:
        torch.set_num_threads(before)
    assert counts == seen


def test_one_datum_is_enough_for_a_calibration():
    options = {"optimizer": ESGD_SHARED, "stop": STOP, "seed": SEED, "device": "cpu"}
    alone, twice = (calibrate(FIELD, SIGNAL, DATA[:1] * count, **options) for count in (1, 2))
    assert torch.equal(alone.diagonal, twice.diagonal)
    assert torch.equal(alone.step_rms, twice.step_rms)
    assert alone.diagonal.isfinite().all()


@pytest.mark.parametrize(("data", "counts"), [([], r"\[\]"), ([*data_of(1), *data_of(1, 5, 5)], r"\[25, 63\]")])
def test_calibration_data_of_no_single_size_are_refused_with_their_sizes(data, counts):
    with pytest.raises(ValueError, match=f"one sample count, got counts {counts}"):
        calibrate(FIELD, SIGNAL, data, optimizer=ESGD_SHARED, stop=STOP, seed=SEED, device="cpu")


def test_shared_steps_are_no_longer_than_the_calibrations():
    """Values ten times too large throw a field twelve times as far; the clip holds every step to the typical length."""
    optimizer = ESGD(0.05, Schedule("constant"), clip=1.0)
    shared = calibration_of(optimizer, "full")
    wild = [("wild", Samples(DATA[0][1].coordinates, 10 * DATA[0][1].values))]
    stop = Stop(max_steps=10, check_every=10)
    for clip, holds in ((1.0, True), (None, False)):
        result = fitted(wild, replace(optimizer, clip=clip), stop=stop, calibration=shared)["wild"]
        moved = (result.weights - theta0_of(FIELD, SEED)).square().mean().sqrt()
        assert bool(moved <= 10 * 0.05 * shared.step_rms[0] * (1 + 1e-5)) == holds


def test_a_check_must_fall_on_an_update_of_the_fields_own_curvature():
    optimizer = ESGD(0.05, SCHEDULE, curvature="per_field", update_every=7)
    with pytest.raises(ValueError, match="check_every=20 is not a multiple of the optimiser's update_every=7"):
        fit(FIELD, SIGNAL, DATA, optimizer=optimizer, stop=STOP, seed=0)
