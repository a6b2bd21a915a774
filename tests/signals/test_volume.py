"""Volumes become samples and come back in their own unit, at their places in millimetres.

Oracle of the quality: scikit-image's peak_signal_noise_ratio.
"""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from nfscale.signals import Samples, Volume, Voxels
from nfscale.signals.volume import cut

TURNED = np.array([[0.0, -2, 0, 40], [3, 0, 0, -7], [0, 0, 5, 1], [0, 0, 0, 1]])
"""x runs along the second axis of the room; cells are 5 mm along z, 2 along y, 3 along x."""


def head(shape=(4, 6, 5), seed: int = 0) -> Voxels:
    return Voxels(np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16), TURNED)


def settled(*volumes, **keys) -> Volume:
    return Volume(**Volume.settled({"channels": "auto"} | keys, volumes))


def in_row_order(samples: Samples) -> torch.Tensor:
    """The values [N, C] sorted by coordinates (z, y, x): the order in which `reconstruct` takes them."""
    z, y, x = samples.coordinates.double().T.numpy()
    return samples.values[torch.from_numpy(np.lexsort((x, y, z)))]


@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 8, 8), (7, 1, 2), (3, 4, 5, 2)])
def test_a_volume_becomes_samples_and_comes_back_with_its_affine(shape):
    volume = head(shape)
    signal = settled(volume)
    samples = signal.samples(volume)
    assert samples.coordinates.shape == (np.prod(shape[:3]), 3)
    assert samples.values.abs().max() <= 0.5
    (back,) = signal.reconstruct(in_row_order(samples)[None], signal.shape_of(signal.measures(volume)))
    np.testing.assert_allclose(back.values.reshape(shape), volume.values, atol=1e-3)
    assert np.array_equal(back.affine, TURNED)


def test_coordinates_are_millimetres_from_the_middle():
    signal = settled(head(), span=60.0)
    samples = signal.samples(head())
    millimetres = np.unique(samples.coordinates[:, 0].numpy()) * 30
    np.testing.assert_allclose(millimetres, [-7.5, -2.5, 2.5, 7.5], atol=1e-5)
    np.testing.assert_allclose(np.diff(np.unique(samples.coordinates[:, 1].numpy())) * 30, 2, atol=1e-5)
    np.testing.assert_allclose(np.diff(np.unique(samples.coordinates[:, 2].numpy())) * 30, 3, atol=1e-5)


def test_every_value_is_at_its_place():
    values = np.zeros((2, 3, 4), np.float32)
    values[1, 0, 2] = 1
    samples = Volume(1, span=4.0).samples(values)
    (bright,) = samples.coordinates[samples.values[:, 0] > 0]
    np.testing.assert_allclose(bright, [0.25, -0.5, 0.25])


def test_the_order_is_of_blocks():
    order = Volume(1).samples(np.zeros((8, 8, 8), np.float32)).coordinates.reshape(-1, 64, 3)
    assert torch.allclose(order.amax(dim=1) - order.amin(dim=1), torch.tensor(0.75))


def test_what_is_left_open_is_as_the_first_volumes_have_it():
    signal = settled(head((4, 6, 5)), head((8, 2, 2), 1))
    assert (signal.channels, signal.span) == (1, 40.0)
    assert signal.limits == (
        min(head((4, 6, 5)).values.min(), head((8, 2, 2), 1).values.min()),
        max(head((4, 6, 5)).values.max(), head((8, 2, 2), 1).values.max()),
    )
    assert settled(np.full((2, 2, 2), 7, np.uint8)).limits == (0, 255)
    assert settled(np.full((2, 2, 2), 7, np.uint16), spacing=[2.0, 1.0, 1.0]).span == 4
    with pytest.raises(ValueError, match=r"constantly 7, so signal\.value_range"):
        settled(np.full((2, 2, 2), 7, np.int32))


def test_quality_is_the_psnr_in_the_range_of_the_run():
    signal, volume = settled(head(), value_range=[-1000, 3000]), head()
    noisy = volume.values + np.random.default_rng(1).normal(0, 50, volume.values.shape)
    noisy = Voxels(noisy.astype(np.float32), TURNED)
    samples = signal.samples(volume).map(lambda tensor: tensor[None])
    found = signal.quality(signal.samples(noisy).values[None], samples)
    expected = peak_signal_noise_ratio(volume.values.astype(float), noisy.values.astype(float), data_range=4000)
    assert found.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("text", "sizes"), [("8x6x10", (8, 6, 10)), ("1mm", (20, 12, 15)), ("2.5mm", (8, 5, 6))])
def test_a_volume_decodes_at_any_size_in_the_box_of_its_fit(text, sizes):
    signal = settled(head())
    fitted = signal.shape_of(signal.measures(head()))
    shape = signal.shape_from(text, fitted)
    assert shape[:3] == sizes
    (finer,) = signal.reconstruct(torch.zeros(1, int(np.prod(sizes)), 1), shape)
    for corner in (np.zeros(3), np.ones(3)):
        before = TURNED @ [*(corner * [5, 6, 4] - 0.5), 1]
        after = finer.affine @ [*(corner * sizes[::-1] - 0.5), 1]
        np.testing.assert_allclose(after, before, atol=1e-4)
    edges = signal.coordinates(shape).abs().amax(dim=0) * sizes[0] / (sizes[0] - 1)
    assert edges[0] == pytest.approx(1, abs=1e-5)


def test_the_part_of_a_volume_is_where_it_was():
    part = cut(TURNED, (2, 1, 3))
    np.testing.assert_allclose(part @ [0, 0, 0, 1], TURNED @ [3, 1, 2, 1])
    np.testing.assert_allclose(part @ [1, 2, 1, 1], TURNED @ [4, 3, 3, 1])


@pytest.mark.parametrize("text", ["", "8x8", "0x1x1", "nanmm", "-1mm", "infmm", "8x8x8x8", "mm"])
def test_a_shape_that_is_none_is_refused(text):
    signal = settled(head())
    with pytest.raises(ValueError, match="depth x height x width"):
        signal.shape_from(text, signal.shape_of(signal.measures(head())))


def test_too_much_to_decode_is_refused():
    signal = settled(head())
    for text in ("1000x1000x1000", "1e-9mm"):
        with pytest.raises(ValueError, match="are decoded"):
            signal.shape_from(text, signal.shape_of(signal.measures(head())))


def test_held_back_slices_are_whole():
    samples = settled(head(), holdout=4).samples(head())
    held = samples.heldout
    assert held is not None
    assert len(held.values) == 30
    assert len(held.coordinates[:, 0].unique()) == 1
    with pytest.raises(ValueError, match="of 4 slices"):
        settled(head(), holdout=5).samples(head())


def with_affine(affine) -> Voxels:
    return Voxels(np.ones((2, 2, 2), np.float32), affine)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((2, 3)), r"a volume is \[z, y, x\] or"),
        (np.zeros((0, 3, 3), np.float32), "a volume is"),
        (np.zeros((2, 2, 2), np.complex64), "integers or floats, got complex64"),
        (np.full((2, 2, 2), 1e300), "NaN or infinite"),
        (np.broadcast_to(np.uint8(0), (500, 500, 500)), "too large: 125,000,000 values"),
        (np.full((2, 2, 2), 50.0), r"the volume holds 50, far from the range 0 to 1"),
        (np.zeros((2, 2, 2, 3), np.float32), "3 channels, the fields of this run have 1"),
        (with_affine(np.zeros((4, 4))), "0, 0, 0 mm apart"),
        (with_affine(np.full((4, 4), np.nan)), "affine is no matrix"),
        (with_affine(np.eye(3)), "affine is no matrix"),
        (with_affine(np.diag([9.0, 1, 1, 1])), "18 mm long, the coordinates of this run span 10"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(content, reason):
    with pytest.raises(ValueError, match=reason):
        Volume(1, span=10.0).samples(content)


@pytest.mark.parametrize("keys", [{"span": 0}, {"value_range": [1, 1]}, {"spacing": [1, 1]}, {"holdout": 1}])
def test_keys_that_make_no_sense_are_refused(keys):
    with pytest.raises(ValueError, match=f"signal.{next(iter(keys))}"):
        Volume(1, **keys)
