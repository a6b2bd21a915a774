"""Films become samples and come back, in an order whose runs are blocks of space and time.

Oracle of the quality: scikit-image's peak_signal_noise_ratio.
"""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from nfscale.signals import Clip, Samples, Video
from nfscale.signals.grids import z_order


def frames(shape=(5, 6, 7, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def in_row_order(samples: Samples) -> torch.Tensor:
    """The values [N, C] sorted by coordinates (t, y, x): the order in which `reconstruct` takes them."""
    t, y, x = samples.coordinates.double().T.numpy()
    return samples.values[torch.from_numpy(np.lexsort((x, y, t)))]


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (5, 3, 9, 1), (1, 7, 1, 4), (3, 5, 6)])
def test_a_film_becomes_samples_and_comes_back(shape):
    film = frames(shape)
    signal = Video(shape[3] if len(shape) == 4 else 1)
    samples = signal.samples(Clip(film, 12.5))
    assert samples.coordinates.shape == (np.prod(shape[:3]), 3)
    (back,) = signal.reconstruct(in_row_order(samples)[None], signal.shape_of(signal.measures(Clip(film, 12.5))))
    assert back.rate == 12.5
    assert np.array_equal(np.rint(back.values * 255).astype(np.uint8).reshape(shape), film)


def test_coordinates_are_time_row_and_column_of_the_centres():
    film = np.zeros((2, 2, 4, 1), np.float32)
    film[1, 0, 3] = 1
    samples = Video(1).samples(film)
    (bright,) = samples.coordinates[samples.values[:, 0] > 0]
    assert bright.tolist() == [0.5, -0.5, 0.75]
    assert Video(1).coordinates((1, 1, 2, 25.0)).tolist() == [[0, 0, -0.5], [0, 0, 0.5]]


@pytest.mark.parametrize("sizes", [(4, 8, 8), (3, 5, 7), (16, 1, 9), (1, 1, 1)])
def test_the_order_is_a_permutation(sizes):
    assert sorted(z_order(*sizes)) == list(range(int(np.prod(sizes))))


def test_runs_of_the_order_are_blocks_of_space_and_time():
    blocks = np.stack(np.unravel_index(z_order(8, 16, 8), (8, 16, 8)), axis=1).reshape(-1, 64, 3)
    assert (blocks.max(axis=1) - blocks.min(axis=1) == 3).all()
    assert (blocks.min(axis=1) % 4 == 0).all()


def test_quality_is_the_psnr_over_all_frames():
    film, noise = frames() / 255, np.random.default_rng(1).normal(0, 0.1, (5, 6, 7, 3))
    samples = Video(3).samples(film.astype(np.float32))
    predicted = samples.values + torch.from_numpy(noise.reshape(-1, 3)).float()
    found = Video(3).quality(predicted[None], samples.map(lambda tensor: tensor[None]))
    expected = peak_signal_noise_ratio(samples.values.numpy(), predicted.numpy(), data_range=1.0)
    assert found.item() == pytest.approx(expected, abs=1e-4)


def test_held_back_frames_are_whole_and_no_step_sees_them():
    samples = Video(3, holdout=3).samples(frames((7, 4, 4, 3)))
    held = samples.heldout
    assert held is not None
    times = np.round((held.coordinates[:, 0].numpy() + 1) * 7 / 2 - 0.5).astype(int)
    assert np.unique(times, return_counts=True)[1].tolist() == [16, 16]
    assert set(times) == {2, 5}
    assert not set(held.coordinates[:, 0].tolist()) & set(samples.coordinates[:, 0].tolist())
    with pytest.raises(ValueError, match=r"of 2 frames, .* holds none back"):
        Video(3, holdout=3).samples(frames((2, 4, 4, 3)))


def test_frames_size_and_colours_are_changed_where_it_is_asked_for():
    signal = Video(1, convert="grey", resize=[3, 4], frames=2)
    film = np.full((5, 6, 8, 3), 51, np.uint8)
    assert signal.measures(film) == {"frames": 2, "height": 3, "width": 4, "rate": 25}
    assert signal.original(film).values.shape == (2, 3, 4, 1)
    np.testing.assert_allclose(signal.original(film).values, 0.2, atol=1e-6)
    with pytest.raises(ValueError, match="the film has 3 channels, the fields of this run have 1"):
        Video(1).samples(film)
    assert Video.settled({"channels": "auto", "convert": None}, [film])["channels"] == 3
    assert Video.settled({"channels": "auto", "convert": "grey"}, [film])["channels"] == 1


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("8x128x256", (8, 128, 256, 12.5)),
        ("50fps", (32, 64, 48, 50.0)),
        ("12.5fps", (8, 64, 48, 12.5)),
        ("1FPS", (1, 64, 48, 1.0)),
    ],
)
def test_a_film_decodes_at_any_size_and_rate_and_lasts_as_long(text, shape):
    assert Video(3).shape_from(text, (16, 64, 48, 25.0)) == shape
    assert Video(3).coordinates(shape).shape == (np.prod(shape[:3]), 3)


@pytest.mark.parametrize("text", ["", "8x8", "0x8x8", "-1fps", "nanfps", "inffps", "1e9fps", "8x8x8x8", "fps"])
def test_a_shape_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="frames x height x width"):
        Video(3).shape_from(text, (16, 64, 48, 25.0))


def test_too_much_to_decode_or_to_fit_is_refused():
    with pytest.raises(ValueError, match="at most 67,108,864 are decoded"):
        Video(3).shape_from("1000x1000x1000", (16, 64, 48, 25.0))
    sparse = np.broadcast_to(np.uint8(0), (1000, 1000, 1000, 1))
    with pytest.raises(ValueError, match="too large: 1000 frames of 1000 x 1000"):
        Video(1).samples(sparse)
    with pytest.raises(ValueError, match="too large"):
        Video(1, resize=[8, 8]).samples(sparse)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((2, 3)), r"a film is \[frames, height, width\] or"),
        (np.zeros((2, 0, 3, 1), np.float32), "a film is"),
        (np.full((2, 3, 3, 1), 2.0), r"float films are in \[0, 1\]"),
        (np.zeros((2, 3, 3, 1), np.int64), "films are uint8, uint16, bool, or floats"),
        (Clip(np.zeros((2, 3, 3, 1), np.uint8), 1e9), "claims 1e[+]09 frames per second"),
        (Clip(np.zeros((2, 3, 3, 1), np.uint8), float("nan")), "claims nan frames per second"),
    ],
)
def test_what_is_no_film_is_refused_in_a_sentence(content, reason):
    with pytest.raises(ValueError, match=reason):
        Video(1).samples(content)


@pytest.mark.parametrize("keys", [{"rate": 0}, {"resize": [3]}, {"frames": 0}, {"holdout": 1}])
def test_keys_that_make_no_sense_are_refused(keys):
    with pytest.raises(ValueError, match=f"signal.{next(iter(keys))}"):
        Video(3, **keys)
