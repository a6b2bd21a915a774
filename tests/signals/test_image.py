"""Images become samples and come back, in an order whose runs are square blocks, at the pixels' centres.

Oracle of the quality: scikit-image's peak_signal_noise_ratio.
"""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from nfscale.signals import Image, Samples
from nfscale.signals.base import PSNR_CEILING_DB


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def in_row_order(samples: Samples) -> torch.Tensor:
    """The values [N, C] sorted by coordinates (y, x): the order in which `reconstruct` takes them."""
    y, x = samples.coordinates.double().T.numpy()
    return samples.values[torch.from_numpy(np.lexsort((x, y)))]


def full_range(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        image = generator().integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
        image.flat[:2] = 0, np.iinfo(dtype).max
        return image
    image = generator().random(shape).astype(dtype)
    image.flat[:2] = 0, 1
    return image


@pytest.mark.parametrize("shape", [(8, 8, 3), (5, 9, 3), (16, 3, 1), (1, 7, 4), (7, 1, 2), (6, 10)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_an_image_becomes_samples_and_comes_back(shape, dtype):
    image = full_range(shape, dtype)
    channels = shape[2] if len(shape) == 3 else 1
    signal = Image(channels)
    samples = signal.samples(image)
    assert samples.coordinates.shape == (shape[0] * shape[1], 2)
    assert samples.values.shape == (shape[0] * shape[1], channels)
    assert samples.coordinates.dtype == samples.values.dtype == torch.float32
    back = signal.reconstruct(in_row_order(samples)[None], signal.shape_of(signal.measures(image)))
    assert back.shape == (1, shape[0], shape[1], channels)
    back = back[0].reshape(shape)
    if np.issubdtype(dtype, np.integer):
        assert np.array_equal(np.rint(back.astype(np.float64) * np.iinfo(dtype).max).astype(dtype), image)
    else:
        assert np.abs(back - image).max() <= 2**-24  # the shift by a half rounds once


def test_a_boolean_image_is_black_and_white():
    image = np.array([[True, False, False], [False, True, True]])
    samples = Image(1).samples(image)
    assert sorted(samples.values.flatten().tolist()) == [-0.5] * 3 + [0.5] * 3
    assert np.array_equal(Image(1).reconstruct(in_row_order(samples)[None], (2, 3))[0, :, :, 0], image)


def test_coordinates_are_pixel_centres_row_by_row():
    coordinates = Image(1).coordinates((2, 4))
    centres = [(y, x) for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)]
    assert [tuple(c) for c in coordinates.tolist()] == centres
    odd = Image(1).coordinates((1, 3))
    torch.testing.assert_close(odd, torch.tensor([[0.0, -2 / 3], [0.0, 0.0], [0.0, 2 / 3]]))


def test_coarse_pixels_are_centred_on_the_fine_pixels_they_cover():
    fine = Image(1).coordinates((8, 12)).reshape(4, 2, 6, 2, 2).mean(dim=(1, 3)).reshape(-1, 2)
    torch.testing.assert_close(Image(1).coordinates((4, 6)), fine)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (5, 9)])
def test_samples_visit_every_pixel_once(height, width):
    image = np.arange(height * width, dtype=np.uint16).reshape(height, width)
    samples = Image(1).samples(image)
    numbers = ((samples.values + 0.5) * 65535).round().long().flatten()
    assert sorted(numbers.tolist()) == list(range(height * width))
    # Each value stays with the coordinate of its own pixel.
    torch.testing.assert_close(samples.coordinates, Image(1).coordinates((height, width))[numbers])


@pytest.mark.parametrize("run", [4, 16, 64])
def test_runs_of_the_order_are_square_blocks(run):
    side, n = round(run**0.5), 16
    coordinates = Image(1).samples(np.zeros((n, n))).coordinates
    pixels = ((coordinates + 1) * n / 2 - 0.5).round().long().reshape(-1, run, 2)
    corners = pixels.min(dim=1).values
    assert (pixels.max(dim=1).values - corners == side - 1).all()
    assert (corners % side == 0).all()
    assert len(corners.unique(dim=0)) == n * n // run


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_is_the_psnr_of_scikit_image(channels):
    signal, rng = Image(channels), generator()
    images = rng.random((3, 12, 10, channels)).astype(np.float32)
    noise = rng.normal(0, [[[[1e-3]]], [[[1e-2]]], [[[0.3]]]], images.shape).astype(np.float32)
    samples = [signal.samples(image) for image in images]
    batch = Samples(torch.stack([s.coordinates for s in samples]), torch.stack([s.values for s in samples]))
    noisy = torch.stack([signal.samples(np.clip(image, 0, 1)).values for image in images + noise])
    quality = signal.quality(noisy, batch)
    clipped = np.clip(images + noise, 0, 1)
    for index in range(3):
        theirs = peak_signal_noise_ratio(images[index], clipped[index], data_range=1)
        assert float(quality[index]) == pytest.approx(theirs, abs=1e-3)
    # Loss and quality are the same error.
    torch.testing.assert_close(quality, -10 * torch.log10(signal.loss(noisy, batch)))


def test_quality_is_measured_on_values_that_are_not_clamped():
    signal = Image(1)
    white = signal.samples(np.ones((2, 2)))
    batch = Samples(white.coordinates[None], white.values[None])
    assert float(signal.quality(batch.values + 0.1, batch)) == pytest.approx(20.0, abs=1e-3)
    assert float(signal.reconstruct(batch.values + 0.1, (2, 2)).max()) == 1.0


def test_a_perfect_reconstruction_has_the_ceiling_as_quality():
    samples = Image(1).samples(np.zeros((2, 2)))
    batch = Samples(samples.coordinates[None], samples.values[None])
    assert Image(1).quality(batch.values, batch).tolist() == [PSNR_CEILING_DB]


def test_a_mask_weighs_samples_in_loss_and_quality():
    signal = Image(2)
    values = torch.zeros(1, 3, 2)
    predicted = torch.tensor([[[1.0, 3.0], [2.0, 2.0], [9.0, 9.0]]])
    masked = Samples(torch.zeros(1, 3, 2), values, torch.tensor([[1.0, 0.5, 0.0]]))
    expected = (1.0 * 5 + 0.5 * 4) / 1.5
    assert float(signal.loss(predicted, masked)) == pytest.approx(expected)
    assert float(signal.quality(predicted, masked)) == pytest.approx(-10 * np.log10(expected), abs=1e-4)


def test_predictions_of_another_shape_are_refused_with_both_shapes():
    samples = Samples(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"\(1, 4, 1\).*\(1, 4, 3\)"):
        Image(3).loss(torch.zeros(1, 4, 1), samples)


def with_one(value: float) -> np.ndarray:
    image = np.full((3, 3), 0.5)
    image[1, 2] = value
    return image


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3)), r"has 3 channels.*have 1\b"),
        (np.zeros((4, 4, 4)), r"has 4 channels.*have 1\b"),
        (with_one(np.nan), r"NaN"),
        (with_one(np.inf), r"infinite"),
        (with_one(255.0), r"in \[0, 1\].*from 0\.5 to 255"),
        (with_one(-0.25), r"in \[0, 1\].*from -0\.25 to 0\.5"),
        (np.zeros(16), r"\[height, width\].*\[16\]"),
        (np.zeros((2, 4, 4, 1)), r"\[height, width\].*\[2, 4, 4, 1\]"),
        (np.zeros((0, 4, 1)), r"\[height, width\].*\[0, 4, 1\]"),
    ],
)
def test_what_is_no_such_image_is_refused_with_what_was_seen_and_expected(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        Image(1).samples(image)


def converted(image: np.ndarray, convert: str) -> np.ndarray:
    """[H, W, C] in [0, 1] after the conversion."""
    signal = Image({"grey": 1, "rgb": 3}[convert], convert=convert)
    return signal.reconstruct(in_row_order(signal.samples(image))[None], image.shape[:2])[0]


def test_grey_becomes_rgb_by_repetition():
    grey = generator().random((4, 5)).astype(np.float32)
    assert np.abs(converted(grey, "rgb") - grey[:, :, None]).max() <= 2**-24


def test_rgb_becomes_grey_by_the_luma_of_bt_601():
    rgb = generator().random((4, 5, 3)).astype(np.float32)
    luma = 0.299 * rgb[:, :, 0] + 0.587 * rgb[:, :, 1] + 0.114 * rgb[:, :, 2]
    assert np.abs(converted(rgb, "grey")[:, :, 0] - luma).max() < 1e-6


@pytest.mark.parametrize("convert", ["grey", "rgb"])
@pytest.mark.parametrize("channels", [2, 4])
def test_opacity_is_composited_on_white(channels, convert):
    image = generator().random((4, 5, channels)).astype(np.float32)
    on_white = image[:, :, :-1] * image[:, :, -1:] + (1 - image[:, :, -1:])
    assert np.abs(converted(image, convert) - converted(on_white, convert)).max() < 1e-6
    image[:, :, -1] = 0
    assert np.abs(converted(image, convert) - 1).max() < 1e-6
    image[:, :, -1] = 1
    assert np.abs(converted(image, convert) - converted(image[:, :, :-1], convert)).max() < 1e-6


@pytest.mark.parametrize(("convert", "channels"), [("grey", 1), ("rgb", 3)])
def test_an_image_of_the_wanted_channels_is_left_alone(convert, channels):
    image = generator().random((4, 5, channels)).astype(np.float32)
    assert np.abs(converted(image, convert) - image).max() <= 2**-24


def test_a_conversion_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="5 channels to grey"):
        Image(1, convert="grey").samples(np.zeros((2, 2, 5)))


def test_the_first_datum_decides_the_channels_unless_it_is_converted():
    def channels(image, convert=None, channels="auto"):
        return Image.settled({"channels": channels, "convert": convert}, [image, np.zeros((2, 2, 5))])["channels"]

    assert channels(np.zeros((2, 2))) == 1
    assert channels(np.zeros((2, 2, 4))) == 4
    assert channels(np.zeros((2, 2, 4)), "rgb") == 3
    assert channels(np.zeros((2, 2, 3)), "grey") == 1
    assert channels(np.zeros((2, 2, 3)), channels=4) == 4, "the job's word counts"


def test_the_description_says_how_an_output_becomes_a_value():
    said, signal = Image(1).forward_description(), Image(1)
    image = generator().random((3, 4)).astype(np.float32)
    values = said["output"]["scale"] * in_row_order(signal.samples(image)).numpy() + said["output"]["shift"]
    assert np.abs(values.reshape(3, 4) - image).max() <= 2**-24
    assert said["kind"] == "image"


@pytest.mark.parametrize("kind", [np.int16, np.int64, np.complex64])
def test_types_without_a_full_range_are_refused(kind):
    with pytest.raises(ValueError, match=f"uint8, uint16, bool, or floats in .* got {np.dtype(kind)}"):
        Image(1).samples(np.ones((4, 4), dtype=kind))


def test_pixels_that_are_held_back_are_in_no_sample():
    image = np.random.default_rng(0).random((6, 7, 1)).astype(np.float32)
    whole, parted = Image(1).samples(image), Image(1, holdout=3).samples(image)
    assert len(parted.values) + len(parted.heldout.values) == 42
    assert len(parted.heldout.values) == 14
    rows, columns = (((parted.heldout.coordinates + 1) * torch.tensor([6, 7]) - 1) / 2).round().long().T
    assert ((rows + columns) % 3 == 0).all()
    together = torch.cat([parted.coordinates, parted.heldout.coordinates])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.coordinates.tolist()))


def test_an_image_too_small_to_hold_pixels_back_is_refused():
    with pytest.raises(ValueError, match="leaves none"):
        Image(1, holdout=2).samples(np.zeros((1, 1)))


def test_resized_images_have_the_mean_of_the_pixels_they_cover():
    image = np.random.default_rng(0).random((8, 12, 3)).astype(np.float32)
    signal = Image(3, resize=[4, 6])
    assert signal.shape_of(signal.measures(image)) == (4, 6)
    assert len(signal.samples(image).values) == 24
    flat = np.full((9, 5), 0.25, dtype=np.float32)
    assert np.allclose(Image(1, resize=[3, 3]).original(flat), 0.25)
    from PIL import Image as Pillow

    grey = (image[:, :, 0] * 255).astype(np.uint8)
    expected = np.asarray(Pillow.fromarray(grey).resize((6, 4), Pillow.Resampling.BILINEAR)) / 255
    assert np.abs(Image(1, resize=[4, 6]).original(grey)[:, :, 0] - expected).max() < 2 / 255


@pytest.mark.parametrize(("keys", "said"), [({"resize": [4]}, "height, width"), ({"holdout": 1}, "at least 2")])
def test_keys_that_make_no_sense_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        Image(1, **keys)
