"""What signals share."""

import numpy as np
import pytest
import torch

from nfscale.signals import Audio, Image, Samples, Sound, Sphere, samples_per_axis


def test_samples_along_an_axis_of_all_coordinates():
    image = Image(channels=1)
    pixels = image.samples(np.zeros((32, 50, 1), dtype=np.uint8))
    assert samples_per_axis(image, pixels) == pytest.approx((32 * 50) ** 0.5, rel=0.05)
    line = Samples(torch.linspace(-1, 1, 101)[:, None], torch.zeros(101, 1))
    assert samples_per_axis(Audio(channels=1), line) == pytest.approx(101)


def test_a_sound_shorter_than_the_span_has_the_samples_of_its_rate():
    audio = Audio(channels=1, span=2.0)
    noise = np.random.default_rng(0).uniform(-1, 1, (1000, 1)).astype(np.float32)
    found = samples_per_axis(audio, audio.samples(Sound(noise, 4000)))
    assert found == pytest.approx(2 * 4000, rel=0.01)  # of [-1, 1], which is two seconds


def test_a_sphere_has_two_axes():
    signal = Sphere(channels=1, value_range=(0.0, 1.0))
    samples = signal.samples(np.random.default_rng(0).random((18, 36, 1)).astype(np.float32))
    assert samples_per_axis(signal, samples) == pytest.approx((18 * 36) ** 0.5)
