"""What is transformed before a fit comes back exactly, and quality is that of the values themselves."""

from typing import get_args

import numpy as np
import pytest
import torch

from nfscale import MLP, Adam, Schedule, Stop, fit
from nfscale.errors import CallerError
from nfscale.signals import Image
from nfscale.signals.transforms import PLACES, VALUES, TransformName, order_of
from tests.jobs import tiny_job
from tests.signals.test_image import full_range, in_row_order

NAMES = get_args(TransformName)
IMAGE = full_range((6, 5, 2), "uint8")


def signal_of(name: str) -> Image:
    return Image(**Image.settled({"channels": "auto", "convert": None, "transform": name}, [IMAGE]))


@pytest.mark.parametrize("name", NAMES)
def test_every_transformation_has_an_exact_inverse(name):
    signal = signal_of(name)
    back = signal.reconstruct(in_row_order(signal.samples(IMAGE))[None], (6, 5))[0]
    assert np.array_equal(np.rint(back * 255).astype(np.uint8), IMAGE)
    assert np.abs(back - IMAGE / 255).max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_quality_is_that_of_values_whatever_is_represented(name):
    """Noise of one deviation in what is represented, against the PSNR of what is decoded, without clamping."""
    signal = signal_of(name)
    middle = (0.2 + 0.6 * np.random.default_rng(0).random((6, 5, 2))).astype(np.float32)
    samples = signal.samples(middle).map(lambda tensor: tensor[None])
    off = samples.values + 0.01 * torch.randn(samples.values.shape, generator=torch.Generator().manual_seed(0))
    order = np.lexsort(samples.coordinates[0].double().T.flip(0).numpy())
    decoded = signal.reconstruct(off[:, order], (6, 5))[0]
    expected = -10 * np.log10(np.square(decoded.astype(np.float64) - middle).mean())
    assert float(signal.quality(off, samples)) == pytest.approx(expected, abs=1e-3)


def test_transformations_are_those_of_their_names():
    ramp = np.linspace(0, 1, 8, dtype=np.float32)[None, :]
    represented = {name: in_row_order(Image(1, transform=name).samples(ramp))[:, 0].numpy() for name in VALUES}
    expected = {
        "uncentred": ramp,
        "scaled_half": 0.5 * ramp,
        "scaled_double": 2 * ramp,
        "centred_double": 2 * ramp - 1,
        "inversion": 1 - ramp,
        "gamma_half": ramp**2,
        "gamma_double": ramp**0.5,
    }
    for name, values in expected.items():
        assert np.allclose(represented[name], values[0], atol=1e-6), name
    assert represented.keys() == expected.keys()


def test_a_standardization_takes_the_mean_and_deviation_of_the_first_data():
    signal = signal_of("standardization")
    values = signal.samples(IMAGE).values
    assert abs(float(values.mean())) < 1e-5
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-5)
    said = Image(**signal.forward_description()["keys"])
    assert said == signal, "the description rebuilds the signal"
    with pytest.raises(ValueError, match="needs value_mean and value_deviation"):
        Image(2, transform="standardization").samples(IMAGE)


def test_the_zigzag_is_that_of_jpeg():
    # The first ten entries of the zigzag sequence in ITU-T T.81, figure A.6, of a block of 8 x 8.
    assert order_of("zigzag", 8, 8)[:10].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]
    assert sorted(order_of("zigzag", 3, 5)) == list(range(15))


def test_the_permutation_never_changes():
    # Frozen: tables of weights were fitted to pixels in this order.
    assert order_of("permutation", 3, 4).tolist() == [6, 11, 4, 10, 2, 8, 1, 7, 9, 3, 0, 5]
    assert sorted(order_of("permutation", 16, 16)) == list(range(256))


@pytest.mark.parametrize("name", PLACES)
def test_the_description_says_where_pixels_are(name):
    signal = signal_of(name)
    said = signal.forward_description()["output"]
    values = in_row_order(signal.samples(IMAGE)).numpy() * said["scale"] + said["shift"]
    order = order_of(name, 6, 5)
    pixels = np.empty_like(values)
    pixels[order] = values
    assert np.allclose(pixels.reshape(6, 5, 2), IMAGE / 255, atol=1e-6)
    assert "order[p]" in said["places"]


def test_permuted_pixels_are_fitted_and_come_back_in_their_places():
    image = np.tile(np.linspace(40, 215, 10).astype(np.uint8), (10, 1))  # so that nothing is clamped
    signal = Image(1, transform="permutation")
    field = MLP(2, 1, width=32, depth=3, weight_scale=1.5)
    adam = Adam(2e-3, Schedule("cosine", 60))
    stop = Stop(60, check_every=20)
    (fitted,) = fit(field, signal, [("ramp", signal.samples(image))], optimizer=adam, stop=stop, seed=0)
    values = field.apply(field.layout.unravel(fitted.weights[None]), signal.coordinates((10, 10))[None])
    error = signal.reconstruct(values, (10, 10))[0, :, :, 0] - image / 255
    assert 35 < fitted.quality < 100  # above, float32 decides
    assert -10 * np.log10(np.square(error).mean()) == pytest.approx(fitted.quality, abs=0.1)


def test_an_unknown_transformation_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(CallerError, match=r"signal.transform: .*'permutation', got 'shuffle'"):
        tiny_job(tmp_path, "signal.transform=shuffle")
    with pytest.raises(ValueError, match="unknown transform 'shuffle'; known: none, uncentred"):
        Image(1, transform="shuffle")  # type: ignore[arg-type]
