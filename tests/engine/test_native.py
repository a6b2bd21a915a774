"""The native step against its plain twin, and what it promises beyond it."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nfscale.engine import Stop, calibrate, fit
from nfscale.engine.native import (
    native_apply,
    native_gradient,
    native_gradient_and_hvp,
    native_positions,
    native_sine,
)
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import evaluate, plain_apply, plain_gradient, plain_gradient_and_hvp
from nfscale.fields import MLP, theta0_of
from nfscale.optim import ESGD, Adam, Scaled, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Image, Samples
from tests.engine.fits import (
    DATA,
    ESGD_SHARED,
    FACTORS,
    FIELD,
    NEEDS_COMPILER,
    SCHEDULE,
    SEED,
    SIGNAL,
    assert_same_bits,
    calibration_of,
    data_of,
    fitted,
    smooth_image,
)

pytestmark = NEEDS_COMPILER


def random_samples(dimensions: int, channels: int, count: int, masked: bool, fields: int = 3) -> Samples:
    draw = torch.Generator().manual_seed(count)
    coordinates = torch.rand(fields, count, dimensions, generator=draw) * 2 - 1
    values = torch.rand(fields, count, channels, generator=draw) - 0.5
    mask = None
    if masked:
        mask = torch.rand(fields, count, generator=draw)
        mask[:, 1::3] = 0
    return Samples(coordinates, values, mask)


def rows_of(field: MLP, fields: int = 3) -> torch.Tensor:
    return field.layout.ravel(field.init(as_tensor([datum_seed(0, str(n)) for n in range(fields)])))


# Twins


@pytest.mark.parametrize(("dimensions", "channels"), [(1, 1), (2, 3), (3, 8), (4, 11)])
def test_the_gradient_is_that_of_autograd(dimensions, channels):
    grid = itertools.product((1, 13, 32, 64, 100), (1, 2, 4), (1, 7, 256), (False, True))
    for width, depth, count, masked in grid:
        field = MLP(dimensions, channels, width=width, depth=depth)
        rows, samples = rows_of(field), random_samples(dimensions, channels, count, masked)
        signal = Image(channels)
        losses, gradients = native_gradient(field, signal, rows, samples)
        expected_losses, expected = plain_gradient(field, signal, rows, samples)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
        bound = 1e-5 if width > 1 else 1e-4  # a chain of single sines multiplies what it is given by up to 70 each
        assert float((gradients - expected).norm() / expected.norm()) < bound, (width, depth, count, masked)
        for entry in field.layout.entries:  # no tensor hides behind a larger one
            part = slice(entry.offset, entry.offset + entry.size)
            assert float((gradients - expected)[:, part].norm() / expected[:, part].norm()) < 3 * bound, entry.name


def signs(like: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, 2, like.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


@pytest.mark.parametrize(("dimensions", "channels"), [(1, 1), (2, 3), (3, 8)])
def test_the_product_with_the_hessian_is_that_of_double_backward(dimensions, channels):
    """In float64, so that what is measured is the rounding of the native step alone."""
    for width, depth, count, masked in itertools.product((1, 13, 32, 100), (1, 2, 4), (1, 7, 256), (False, True)):
        field = MLP(dimensions, channels, width=width, depth=depth)
        rows, samples = rows_of(field), random_samples(dimensions, channels, count, masked)
        signal, probe = Image(channels), signs(rows)
        losses, gradients, products = native_gradient_and_hvp(field, signal, rows, samples, probe)
        exact = samples.map(lambda tensor: tensor.double())
        expected = plain_gradient_and_hvp(field, signal, rows.double(), exact, probe.double())
        torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=0)
        bound = 2e-5 if width > 1 else 1e-3  # as above; the product squares what a chain multiplies
        for found, right in ((gradients, expected[1]), (products, expected[2])):
            assert float((found - right).norm() / right.norm()) < bound, (width, depth, count, masked)
            for entry in field.layout.entries:
                part = slice(entry.offset, entry.offset + entry.size)
                scale = right[:, part].norm() + 1e-6 * right.norm()
                assert float((found - right)[:, part].norm() / scale) < 5 * bound, (entry.name, width, depth)


def test_threads_that_share_a_field_give_the_same_bits():
    """Fewer fields than threads, of enough points that they are summed up in parts."""
    for fields, count in ((1, 30_000), (2, 9_001)):
        field, samples = MLP(2, 3, width=32, depth=2), random_samples(2, 3, count, True, fields)
        rows = rows_of(field, fields)
        found = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(native_gradient_and_hvp(field, Image(3), rows, samples, signs(rows)))
        finally:
            torch.set_num_threads(1)
        for other in found[1:]:
            assert all(torch.equal(ours, one) for ours, one in zip(other, found[0], strict=True))
        expected = plain_gradient_and_hvp(field, Image(3), rows, samples, signs(rows))
        for ours, right in zip(found[0], expected, strict=True):
            assert float((ours - right).norm() / right.norm()) < 1e-5


def test_a_wide_field_of_many_points_goes_through_in_tiles():
    field, samples = MLP(2, 3, width=300, depth=3), random_samples(2, 3, 500, True, fields=1)
    rows = rows_of(field, 1)
    losses, gradients = native_gradient(field, Image(3), rows, samples)
    expected_losses, expected = plain_gradient(field, Image(3), rows, samples)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert float((gradients - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(("width", "depth", "channels", "count"), [(13, 1, 1, 5), (64, 4, 3, 1000), (100, 2, 8, 129)])
def test_apply_is_that_of_the_field(width, depth, channels, count):
    field = MLP(2, channels, width=width, depth=depth)
    rows, coordinates = rows_of(field), random_samples(2, channels, count, False).coordinates
    for at in (coordinates, coordinates[:1]):
        values, expected = native_apply(field, rows)(at), plain_apply(field, rows)(at)
        assert values.shape == (3, count, channels)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_sine_and_cosine_are_right_to_rounding():
    """Of pi u; the nearest integer of u is taken off exactly, so that large arguments are as good as small ones."""
    draw = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for largest in (0.6, 10, 200):
        u = (draw * 2 - 1) * largest
        sines, cosines = (t.double().numpy() for t in native_sine(u))
        exact = np.pi * u.double().numpy()
        assert np.abs(sines - np.sin(exact)).max() < 1.5e-7
        assert np.abs(cosines - np.cos(exact)).max() < 1.5e-7
    sines, cosines = native_sine(torch.tensor([0.0, 0.5, 1.0, -1.5, 3e9, 1e38]))
    torch.testing.assert_close(sines, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(cosines, torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 1.0]), rtol=0, atol=1e-6)
    assert all(t.isnan().all() for t in native_sine(torch.tensor([float("inf"), float("nan")])))


@pytest.mark.parametrize("kind", ["stratified", "uniform"])
@pytest.mark.parametrize(("available", "per_step"), [(4096, 256), (63, 16), (100, 33), (17, 16), (5, 1)])
def test_the_samples_of_a_step_are_those_of_the_sampler(kind, available, per_step):
    sampler = Sampler(available, per_step, kind)
    seeds = as_tensor([datum_seed(0, str(n)) for n in range(4)])
    first = torch.tensor([0, 20, 7, 1 << 20])
    assert torch.equal(native_positions(sampler, seeds, first, 50), sampler.positions(seeds, first, 50))


def test_samples_of_another_shape_are_refused():
    samples = random_samples(2, 1, 5, False)
    with pytest.raises(ValueError, match=r"\(3, 5, 1\) where the field takes \(3, 5, 2\)"):
        native_gradient(MLP(2, 2, width=8, depth=1), Image(2), rows_of(MLP(2, 2, width=8, depth=1)), samples)


# Whole fits


def masked_data(count: int) -> list[tuple[str, Samples]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (name, Samples(part.coordinates, part.values, torch.rand(len(part.values), generator=draw)))
        for name, part in data_of(count, 16, 16)
    ]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("sampling", ["full", "stratified", "uniform"])
@pytest.mark.parametrize("kind", ["adam", "adam-scaled", "esgd-shared", "esgd-unclipped", "esgd-per_field"])
def test_fits_reach_what_plain_steps_reach(kind, sampling, masked):
    schedule = Schedule("cosine", total_steps=120, warmup=20)
    optimizer = {
        "adam": Adam(0.005, schedule),
        "adam-scaled": Scaled(Adam(0.005, schedule), FACTORS),
        "esgd-shared": ESGD(0.5, schedule),
        "esgd-unclipped": ESGD(0.2, schedule, clip=None),
        "esgd-per_field": ESGD(0.05, schedule, curvature="per_field"),
    }[kind]
    samples = "full" if sampling == "full" else 64
    how = {"samples": samples, "sampling": "stratified" if sampling == "full" else sampling}
    data, stop = masked_data(6) if masked else data_of(6, 16, 16), Stop(120, check_every=40)
    if "diagonal" in optimizer.needs:
        others = [(f"other-{n}", SIGNAL.samples(smooth_image(100 + n, 16, 16))) for n in range(4)]
        how["calibration"] = calibrate(FIELD, SIGNAL, others, optimizer=optimizer, stop=stop, seed=SEED, device="cpu")
    plain, native = (fitted(data, optimizer, stop=stop, step=step, **how) for step in ("plain", "native"))
    gained = [result.quality - result.history_quality[0] for result in plain.values()]
    assert np.median(gained) > 5
    differences = [native[datum_id].quality - result.quality for datum_id, result in plain.items()]
    assert abs(np.median(differences)) < 0.1
    for datum_id, result in plain.items():
        assert native[datum_id].history_quality[0] == pytest.approx(result.history_quality[0], abs=1e-3)


OWN = ESGD(0.05, SCHEDULE, curvature="per_field", update_every=2)
SCALED = Scaled(Adam(0.005, SCHEDULE), FACTORS)
OPTIMIZERS = {"adam": Adam(0.005, SCHEDULE), "adam-scaled": SCALED, "esgd-shared": ESGD_SHARED, "esgd-per_field": OWN}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_first_steps_are_those_of_plain_steps(optimizer):
    """Before rounding has grown: rates, corrections, diagonals and bounds are the same numbers."""
    stop = Stop(3, check_every=3)
    how = {"samples": 16, "stop": stop, "sampling": "uniform"}
    if "diagonal" in optimizer.needs:
        how["calibration"] = calibration_of(optimizer, 16)
    plain, native = (fitted(DATA, optimizer, step=step, **how) for step in ("plain", "native"))
    start = theta0_of(FIELD, SEED)
    for datum_id, result in plain.items():
        moved = result.weights - start
        assert float((native[datum_id].weights - result.weights).norm() / moved.norm()) < 1e-3


def test_a_cadence_of_curvature_that_checks_do_not_meet_is_the_plain_steps():
    optimizer, stop = ESGD(0.2, SCHEDULE, update_every=4), Stop(30, check_every=6)
    calibration = calibration_of(ESGD(0.2, SCHEDULE, update_every=4), 16)
    plain, native = (
        fitted(DATA, optimizer, samples=16, stop=stop, step=step, calibration=calibration)
        for step in ("plain", "native")
    )
    for datum_id, result in plain.items():
        assert native[datum_id].quality == pytest.approx(result.quality, abs=0.05)


def test_any_number_of_threads_gives_the_same_bits():
    one = fitted(data_of(7), ESGD_SHARED, samples=16, step="native")
    try:
        torch.set_num_threads(3)
        three = fitted(data_of(7), ESGD_SHARED, samples=16, step="native", calibration=calibration_of(ESGD_SHARED, 16))
    finally:
        torch.set_num_threads(1)
    for datum_id, result in one.items():
        assert_same_bits(three[datum_id], result)


def test_the_factors_of_other_fields_are_refused():
    with pytest.raises(ValueError, match="8 rates cannot be those of fields of"):
        fitted(DATA, Scaled(Adam(0.005, SCHEDULE), FACTORS[:8]), samples=16, step="native")


@pytest.mark.parametrize(
    "optimizer", [Adam(0.005, SCHEDULE), SCALED, OWN], ids=["adam", "adam-scaled", "esgd-per_field"]
)
def test_the_steps_of_two_checks_are_those_of_one(optimizer):
    for samples in ("full", 16):
        seldom, often = (
            fitted(DATA, optimizer, samples=samples, stop=Stop(40, check_every=every), step="native")
            for every in (40, 8)
        )
        for datum_id, result in often.items():
            if result.quality == result.history_quality[-1]:
                assert torch.equal(result.weights, seldom[datum_id].weights)


def test_a_field_that_overflows_is_an_outcome():
    results = fitted(DATA[:2], Adam(1e30, SCHEDULE), step="native")
    assert {str(result.result) for result in results.values()} == {"diverged"}
    assert all(result.weights.isfinite().all() for result in results.values())


def test_what_is_recorded_is_the_quality_of_the_weights():
    for datum_id, result in fitted(DATA, samples=16, step="native").items():
        samples = dict(DATA)[datum_id].map(lambda tensor: torch.stack([tensor] * 2))
        loss, quality = evaluate(FIELD, SIGNAL, result.weights.repeat(2, 1), samples)
        assert (result.loss, result.quality) == pytest.approx((float(loss[0]), float(quality[0])), rel=1e-5)


# The process around it


def test_subnormal_numbers_survive():
    """Libraries that are linked with -ffast-math flush them to zero for all that the thread does afterwards."""
    fitted(DATA[:1], step="native")
    tiny = torch.tensor([1e-39])
    assert float(tiny * 0.5) != 0
    assert float(np.float32(1e-39) * np.float32(0.5)) != 0


FINGERPRINT = """
import hashlib
import torch
torch.set_num_threads(1)
from tests.engine.test_native import fingerprint
print(torch.backends.cpu.get_cpu_capability(), fingerprint())
"""


def fingerprint() -> str:
    """Of the weights of some fits, none of whose numbers but the step's depends on the processor."""
    found = hashlib.sha256()
    for width, channels, samples in ((32, 1, "full"), (13, 3, 50), (64, 3, 64)):
        field, signal = MLP(2, channels, width=width, depth=2), Image(channels)
        data = [(str(n), signal.samples(np.random.default_rng(n).random((12, 11, channels)))) for n in range(2)]
        options = {"optimizer": Adam(1e-3, SCHEDULE), "stop": Stop(40), "seed": 0, "samples": samples, "device": "cpu"}
        for result in fit(field, signal, data, **options, step="native"):
            found.update(result.weights.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has but one of the instruction sets"
)
def test_processors_with_other_registers_give_the_same_bits():
    """Workers of one cluster may have AVX2 or AVX-512."""
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["AVX2", fingerprint()]
