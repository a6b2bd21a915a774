"""Sounds become samples in seconds and come back; other rates, mixing, what is held back, and what is refused.

Oracles: the closed form of the SNR of a sine with noise, and scipy's polyphase resampling.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

from nfscale.signals import Audio, Samples, Sound
from nfscale.signals.audio import MAX_RATE, MAX_SPANNED, SNR_CEILING_DB, bucket, resampled


def tone(hertz: float = 440.0, rate: int = 8000, count: int = 4000, channels: int = 1) -> Sound:
    phase = 2 * np.pi * hertz * np.arange(count) / rate
    return Sound(np.stack([0.5 * np.sin(phase + c) for c in range(channels)], axis=1).astype(np.float32), rate)


def batched(samples: Samples) -> Samples:
    return samples.map(lambda tensor: tensor[None])


def undealt(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Each sample once, in the order of time: coordinates [N] and values [N, C]."""
    coordinates, first = np.unique(samples.coordinates[:, 0].numpy(), return_index=True)
    return coordinates, samples.values.numpy()[first]


# Samples and back


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 1000, 1024, 1025, 4097])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_becomes_samples_and_comes_back(count, channels):
    sound, signal = tone(count=count, channels=channels), Audio(channels)
    samples = signal.samples(sound)
    assert samples.coordinates.dtype == samples.values.dtype == samples.mask.dtype == torch.float32
    coordinates, values = undealt(samples)
    np.testing.assert_allclose((coordinates + 1) / 2 * signal.span, np.arange(count) / 8000, atol=1e-7)
    shape = signal.shape_of(signal.measures(sound))
    assert shape == (count, 8000)
    assert np.array_equal(signal.coordinates(shape)[:, 0].numpy(), coordinates)
    back = signal.reconstruct(torch.from_numpy(values)[None], shape)[0]
    assert back.rate == 8000
    assert np.array_equal(back.values, sound.values)
    assert np.array_equal(signal.original(sound).values, sound.values)


def test_a_second_is_as_long_in_every_sound():
    """So that equal tones are equal frequencies of a field, whatever the length and the rate."""
    signal = Audio(1, span=4.0)
    for rate, count in ((8000, 8001), (16000, 20000), (44100, 60000)):
        coordinates, _ = undealt(signal.samples(tone(rate=rate, count=count)))
        assert coordinates[0] == -1
        assert coordinates[rate] == pytest.approx(-0.5, abs=1e-7)


def test_lengths_share_counts_and_every_sample_weighs_as_much_as_any_other():
    counts = {len(Audio(1).samples(tone(count=count)).values) for count in range(7681, 8193, 61)}
    assert counts == {8192}
    for count in (7681, 7900, 8192):
        samples = Audio(1).samples(tone(count=count))
        places = torch.unique(samples.coordinates[:, 0], return_inverse=True)[1]
        weights = torch.zeros(count).index_add(0, places, samples.mask)
        assert torch.equal(weights, torch.ones(count))


def test_counts_grow_by_less_than_an_eighth():
    values = [bucket(count) for count in range(1, 5000)]
    assert all(count <= value < 1.125 * count for count, value in enumerate(values, start=1))
    assert sorted(set(values))[14:26] == [15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40]


def test_a_gain_is_undone():
    sound, signal = tone(), Audio(1, gain=5.0)
    samples = signal.samples(sound)
    assert samples.values.abs().max() == pytest.approx(2.5, rel=1e-4)
    back = signal.reconstruct(torch.from_numpy(undealt(samples)[1])[None], (4000, 8000))[0]
    np.testing.assert_allclose(back.values, sound.values, rtol=1e-6)
    assert signal.forward_description()["output"]["scale"] == pytest.approx(0.2)


@pytest.mark.parametrize(("loudness", "gain"), [(1.0, 0.5), (0.1, 8.0), (0.01, 64.0), (0.0, 1.0)])
def test_an_automatic_gain_brings_the_median_level_near_a_fifth(loudness, gain):
    """A sine of amplitude 0.5 has the level 0.354, which times a half is 0.177."""
    sounds = [replace(tone(), values=tone().values * np.float32(loudness * times)) for times in (0.001, 1, 1.1)]
    keys = {"channels": 1, "convert": None, "gain": "auto"}
    settled = Audio.settled(keys, sounds)
    assert settled["gain"] == gain
    assert Audio.settled(keys | {"gain": 3.0}, sounds)["gain"] == 3.0
    assert Audio(1).factor == 1.0
    assert Audio(1, gain=gain).factor == gain


# Quality


@pytest.mark.parametrize("gain", [1.0, 5.0])
def test_snr_is_that_of_a_sine_with_noise_of_known_power(gain):
    """A sine of amplitude 0.5 has the power 1/8; an error of +-0.01 the power 1e-4: 10 log10(1250) dB."""
    sound, signal = tone(hertz=400, count=6500), Audio(1, gain=gain)
    samples = batched(signal.samples(replace(sound, values=sound.values[:6500])))
    sign = torch.where(torch.arange(samples.values.shape[1])[:, None] % 2 == 0, 1.0, -1.0)
    measured = signal.quality(samples.values + 0.01 * gain * sign, samples)
    power = float(np.mean(sound.values.astype(np.float64) ** 2))
    assert measured.item() == pytest.approx(10 * np.log10(power / 1e-4), abs=1e-3)
    assert measured.item() == pytest.approx(10 * np.log10(1250), abs=0.01)


def test_repeated_samples_do_not_count_twice():
    sound, signal = tone(count=1100), Audio(1)
    samples = batched(signal.samples(sound))
    noise = torch.randn(1100, 1, generator=torch.Generator().manual_seed(0)) * 0.1
    places = torch.unique(samples.coordinates[0, :, 0], return_inverse=True)[1]
    predicted = samples.values + noise[places]
    assert signal.loss(predicted, samples).item() == pytest.approx(noise.square().mean().item(), rel=1e-5)
    power = np.square(sound.values).mean() / noise.square().mean().item()
    assert signal.quality(predicted, samples).item() == pytest.approx(10 * np.log10(power), abs=1e-4)


def test_silence_and_perfection_have_a_finite_quality():
    signal = Audio(1)
    samples = batched(signal.samples(Sound(np.zeros((100, 1), np.float32), 8000)))
    assert signal.quality(samples.values, samples).item() == SNR_CEILING_DB
    assert signal.quality(samples.values + 1e-3, samples).item() == pytest.approx(
        10 * np.log10(2.0**-30 / 12 / 1e-6), abs=1e-3
    )


# Channels and rates


def test_channels_that_differ_are_refused_unless_they_are_to_be_mixed():
    stereo = tone(channels=2)
    with pytest.raises(ValueError, match=r"has 2 channels, the fields of this run have 1; signal\.convert=mono"):
        Audio(1).samples(stereo)
    mixed = Audio(1, convert="mono")
    assert mixed.samples(stereo).values.shape[1] == mixed.samples(tone()).values.shape[1] == 1
    np.testing.assert_allclose(mixed.original(stereo).values[:, 0], stereo.values.mean(axis=1), rtol=1e-6)
    keys = {"channels": "auto", "convert": None, "gain": 1.0}
    assert Audio.settled(keys, [stereo]) == keys | {"channels": 2}
    assert Audio.settled(keys | {"convert": "mono"}, [stereo])["channels"] == 1


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (16000, 8000), (44100, 16000), (8000, 11025)])
def test_resampling_agrees_with_scipy_inside_the_band(rate, wanted):
    """Oracle: scipy.signal.resample_poly, with as sharp a window; and the tone itself, away from the ends."""
    sound = tone(hertz=1000, rate=rate, count=rate // 2)
    ours = resampled(sound.values, rate, wanted)[:, 0]
    divisor = np.gcd(rate, wanted)
    theirs = resample_poly(sound.values[:, 0].astype(np.float64), wanted // divisor, rate // divisor)
    assert len(ours) == wanted // 2
    inner = slice(len(ours) // 8, -len(ours) // 8)
    exact = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(ours)) / wanted)
    assert np.abs(ours - exact)[inner].max() < 1e-4
    assert np.abs(ours - theirs[: len(ours)])[inner].max() < 5e-3


def test_resampling_takes_away_what_a_lower_rate_cannot_hold():
    assert np.abs(resampled(tone(hertz=6000, rate=16000).values, 16000, 8000)[200:-200]).max() < 1e-4


def test_rates_stay_as_they_are_unless_one_is_asked_for():
    assert Audio(1).shape_of(Audio(1).measures(tone(rate=11025))) == (4000, 11025)
    signal = Audio(1, resample=8000)
    for rate in (8000, 11025, 16000):
        sound = tone(rate=rate, count=rate // 2)
        shape = signal.shape_of(signal.measures(sound))
        assert shape == (4000, 8000)
        assert len(undealt(signal.samples(sound))[0]) == len(signal.original(sound).values) == 4000
        assert signal.original(sound).rate == 8000


# Decoding


def field_of(signal: Audio, shape: tuple[int, ...], hertz: list[float]) -> Sound:
    """What a field that is a sum of sines decodes to."""
    seconds = (signal.coordinates(shape).double() + 1) / 2 * signal.span
    values = sum(torch.sin(2 * torch.pi * h * seconds) for h in hertz)
    return signal.reconstruct(values.float()[None], shape)[0]


def test_a_field_decodes_at_any_rate_and_lasts_as_long():
    signal = Audio(1)
    for text, rate in (("16000", 16000), ("44100Hz", 44100), ("8000", 8000), ("4000", 4000), ("3000", 3000)):
        shape = signal.shape_from(text, (4000, 8000))
        sound = field_of(signal, shape, [440.0])
        assert sound.rate == rate
        assert sound.seconds == pytest.approx(0.5, abs=1 / rate)
        expected = np.sin(2 * np.pi * 440 * np.arange(len(sound.values)) / rate)
        inner = slice(len(expected) // 6, -len(expected) // 6)
        assert np.abs(sound.values[:, 0] - expected)[inner].max() < 2e-3


def test_decoding_at_a_lower_rate_folds_nothing_into_the_band():
    signal = Audio(1)
    low = field_of(signal, signal.shape_from("4000", (8000, 8000)), [440.0, 3000.0])
    alone = field_of(signal, signal.shape_from("4000", (8000, 8000)), [440.0])
    assert np.abs(low.values - alone.values)[400:-400].max() < 2e-3


@pytest.mark.parametrize("text", ["", "0", "-8000", "8k", "256x256", "99999999999"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match="a rate in Hz"):
        Audio(1).shape_from(text, (4000, 8000))


def test_a_shape_of_too_many_samples_is_refused():
    with pytest.raises(ValueError, match="at most"):
        Audio(1, span=100.0).shape_from("9000000", (1_000_000, 10_000))


# Held back


@pytest.mark.parametrize("every", [2, 5])
def test_every_nth_sample_is_held_back(every):
    sound, signal = tone(count=1000), Audio(1, holdout=every)
    samples = signal.samples(sound)
    kept, _ = undealt(samples)
    held, values = undealt(samples.heldout)
    everything = signal.coordinates((1000, 8000))[:, 0].numpy()
    assert np.array_equal(held, everything[every - 1 :: every])
    assert np.array_equal(values, sound.values[every - 1 :: every])
    assert np.array_equal(np.sort(np.concatenate([kept, held])), everything)
    assert signal.samples(tone(count=1001)).kind == samples.kind
    assert Audio(1).samples(sound).heldout is None


def test_a_sound_too_short_to_hold_anything_back_is_refused():
    with pytest.raises(ValueError, match=r"of 3 samples, signal\.holdout=4 keeps none back"):
        Audio(1, holdout=4).samples(tone(count=3))


# What does not fit


VALUES = np.zeros((10, 1), np.float32)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (tone(count=16001), r"lasts 2\.000 seconds, the coordinates of this run span 2; .*signal\.span"),
        (Sound(VALUES, 1_000_000), rf"signal\.span of 2 seconds has 2,000,000 samples, at most {MAX_SPANNED:,}"),
        (Sound(VALUES, 0), f"whole number of Hz up to {MAX_RATE:,}, got 0"),
        (Sound(VALUES, 2_147_483_647), "whole number of Hz up to"),
        (Sound(VALUES[:0], 8000), r"got shape \[0, 1\]"),
        (Sound(VALUES[:, :0], 8000), r"got shape \[10, 0\]"),
        (Sound(VALUES[None], 8000), r"got shape \[1, 10, 1\]"),
        (Sound(VALUES.astype(np.int16), 8000), "got int16"),
        (Sound(VALUES + np.nan, 8000), "NaN or infinite"),
        (Sound(VALUES - np.inf, 8000), "NaN or infinite"),
        (Sound(VALUES + 20000, 8000), "values up to 2e.04; full scale is 1"),
        (np.zeros(10), "has values and a rate, got ndarray"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(sound, message):
    with pytest.raises(ValueError, match=message):
        Audio(1).samples(sound)


def test_what_cannot_be_resampled_is_refused_before_it_takes_memory():
    with pytest.raises(ValueError, match="too long"):
        Audio(1, resample=10_000_000, span=1e6).samples(tone(rate=1, count=1000))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"span": 0.0}, "span is above 0"),
        ({"gain": -1.0}, "gain is above 0"),
        ({"resample": 0}, "resample is above 0"),
        ({"holdout": 1}, "holdout is at least 2"),
    ],
)
def test_keys_out_of_range_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Audio(1, **keys)


def test_the_forward_is_stated_with_its_units():
    said = Audio(1, span=3.0, gain=2.0).forward_description()
    assert said["keys"]["span"] == 3.0
    assert "t in seconds" in said["coordinates"]
    assert said["output"] == {"scale": 0.5, "shift": 0.0, "meaning": "amplitude = scale * y + shift"}
