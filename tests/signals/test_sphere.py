"""Maps on the sphere against closed forms: areas, weighted errors, grids; and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nfscale.engine import fit
from nfscale.engine.result import Stop
from nfscale.fields import MLP
from nfscale.optim import Adam, Schedule
from nfscale.signals import Sphere, SphereMap
from nfscale.signals.sphere import cell_areas

RNG = np.random.default_rng(0)
WITH_POLES = np.linspace(90, -90, 37)
GLOBE = np.linspace(0, 355, 72)


def grid_map(height: int, width: int, channels: int = 1, **keys) -> SphereMap:
    """Noise on cells of the whole globe, south and 20 degrees east first."""
    latitude = np.linspace(-90 + 90 / height, 90 - 90 / height, height)
    longitude = 20 + 360 * np.arange(width) / width
    values = RNG.normal(size=(height, width, channels)).astype(np.float32)
    return SphereMap(values, latitude, longitude, **keys)


def with_gaps(given: SphereMap, share: float, seed: int) -> SphereMap:
    values = given.values.copy()
    values[np.random.default_rng(seed).random(values.shape[:2]) < share] = np.nan
    return replace(given, values=values)


def batch_of(*samples):
    return samples[0].map(lambda *tensors: torch.stack(tensors), *samples[1:])


def settled(*maps, **keys) -> Sphere:
    return Sphere(**Sphere.settled({"channels": "auto"} | keys, maps))


# --- geometry


def test_coordinates_are_unit_vectors_of_the_cell_centres():
    at = settled(grid_map(4, 8)).coordinates((3, 4, 90, -90, 0, 270)).numpy()
    assert at.dtype == np.float32
    north, equator, south = at[:4], at[4:8], at[8:]
    assert np.abs(north - [0, 0, 1]).max() < 1e-7
    assert np.abs(south - [0, 0, -1]).max() < 1e-7
    assert np.abs(equator - [[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]]).max() < 1e-7


def test_areas_are_those_of_zones():
    latitude = np.linspace(-88.75, 88.75, 72)
    areas = cell_areas(latitude, GLOBE)
    cosine = np.cos(np.deg2rad(latitude))
    np.testing.assert_allclose(areas[:, 0] / areas[:, 0].sum(), cosine / cosine.sum(), rtol=1e-12)
    poles = cell_areas(WITH_POLES, GLOBE)
    np.testing.assert_allclose(poles[0].sum() / poles.sum(), (1 - math.cos(math.radians(2.5))) / 2, rtol=1e-9)
    for areas in (poles, cell_areas(WITH_POLES[::-1], GLOBE[::-1])):
        z = np.sin(np.deg2rad(WITH_POLES))[:, None]
        assert abs((areas * z**2).sum() / areas.sum() - 1 / 3) < 1e-3
        x = np.cos(np.deg2rad(WITH_POLES))[:, None] * np.cos(np.deg2rad(GLOBE))
        assert abs((areas * x**2).sum() / areas.sum() - 1 / 3) < 1e-3


def test_areas_of_a_gaussian_grid_are_nearly_its_quadrature_weights():
    nodes, weights = np.polynomial.legendre.leggauss(48)
    areas = cell_areas(np.rad2deg(np.arcsin(nodes)), np.array([0.0, 90, 180, 270]))
    np.testing.assert_allclose(areas[:, 0] / areas[:, 0].sum(), weights / weights.sum(), rtol=0.015)


def test_a_wrap_column_shares_the_area_of_the_one_it_repeats():
    plain, wrapped = cell_areas(WITH_POLES, GLOBE), cell_areas(WITH_POLES, np.append(GLOBE, 360.0))
    np.testing.assert_allclose(wrapped[:, [0, -1]].sum(axis=1), plain[:, 0])
    np.testing.assert_allclose(wrapped[:, 1:-1], plain[:, 1:])
    assert settled(SphereMap(RNG.random((37, 73, 1)), WITH_POLES, np.append(GLOBE, 360.0))).channels == 1


def test_columns_of_a_part_of_the_globe_are_alike():
    areas = cell_areas(np.array([10.0, 11, 12]), np.array([350.0, 352, 354, 356]))
    np.testing.assert_allclose(areas, areas[:, :1] * np.ones((1, 4)))


def test_neighbours_in_the_order_are_neighbours_on_the_sphere():
    given = grid_map(36, 72)
    at = settled(given).samples(given).coordinates.numpy()
    runs = at[: len(at) // 32 * 32].reshape(-1, 32, 3)
    spread = np.linalg.norm(runs - runs.mean(axis=1, keepdims=True), axis=-1)
    assert np.sqrt((spread**2).mean()) < 0.4  # of cells in no order it is 1
    octants = (at.reshape(-1, 3)[:: len(at) // 64] > 0) @ [1, 2, 4]
    assert set(octants.tolist()) == set(range(8))


# --- samples


def test_quality_is_weighted_by_area():
    """An error of 0.1 of the range in one row: the mean square error is 0.01 times that row's share of the sphere."""
    given = grid_map(6, 8)
    signal = settled(given, value_range=[-10, 10])
    samples = batch_of(signal.samples(given))
    latitude = np.rad2deg(np.arcsin(samples.coordinates[0, :, 2].numpy()))
    for row in range(6):
        wrong = torch.from_numpy((np.abs(latitude - given.latitude[row]) < 0.1).astype(np.float32))[None, :, None]
        edges = np.sin(np.deg2rad([given.latitude[row] - 15, given.latitude[row] + 15]))
        share = (edges[1] - edges[0]) / 2
        predicted = samples.values + 0.1 * wrong
        assert signal.quality(predicted, samples).item() == pytest.approx(-10 * math.log10(0.01 * share), abs=1e-3)
        assert signal.loss(predicted, samples).item() == pytest.approx(0.01 * share, rel=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.45, 0.9])
def test_missing_cells_are_no_samples_and_change_no_weight_of_others(share):
    whole = grid_map(12, 16, 2)
    given = with_gaps(whole, share, seed=1)
    signal = settled(whole)
    samples = signal.samples(given)
    assert samples.kind == signal.samples(whole).kind == signal.samples(with_gaps(whole, 0.3, seed=2)).kind
    assert samples.values.isfinite().all()
    assert (samples.mask > 0).all()
    area = {}
    for at, weight in zip(map(tuple, samples.coordinates.tolist()), samples.mask.tolist(), strict=True):
        area[at] = area.get(at, 0) + weight
    there = ~np.isnan(given.values).any(axis=2).ravel()
    expected = cell_areas(given.latitude, given.longitude).ravel()[there]
    places = signal.coordinates(signal.shape_of(signal.measures(given))).numpy()[there]
    assert len(area) == there.sum()
    found = np.array([area[tuple(at)] for at in places.tolist()])
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-5)
    predicted = samples.values + torch.randn(samples.values.shape, generator=torch.Generator().manual_seed(0))
    few = samples.map(lambda tensor: tensor[None, :1])
    assert signal.loss(predicted[None, :1], few).isfinite().all()


def test_a_cell_is_missing_where_one_channel_is():
    given = grid_map(4, 6, 2)
    values = given.values.copy()
    values[1, 2, 0] = values[3, 3, 1] = np.nan
    signal = settled(given)
    distinct = signal.samples(replace(given, values=values)).coordinates.unique(dim=0)
    assert len(distinct) == 4 * 6 - 2


@pytest.mark.parametrize("share", [0, 0.4])
def test_cells_held_back_are_no_samples(share):
    given = with_gaps(grid_map(12, 16), share, seed=3)
    signal = settled(given, holdout=3)
    samples = signal.samples(given)
    fitted, heldout = ({tuple(at) for at in part.coordinates.tolist()} for part in (samples, samples.heldout))
    assert not fitted & heldout
    assert len(fitted) + len(heldout) == (~np.isnan(given.values)).sum()
    assert abs(len(heldout) * 3 - len(fitted | heldout)) < 3
    assert samples.kind == signal.samples(grid_map(12, 16)).kind
    values = np.full((12, 16, 1), np.nan, np.float32)
    values[0, :2, 0] = 1, 2
    with pytest.raises(ValueError, match=r"2 cells, too few for signal\.holdout=3"):
        signal.samples(replace(given, values=values))


def test_arrays_are_equirectangular_images_of_full_range():
    pixels = RNG.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    signal = settled(pixels)
    assert signal.ranges == ((0.0, 1.0),) * 3
    map_ = signal.original(pixels)
    assert (map_.latitude.tolist(), map_.longitude[[0, -1]].tolist()) == ([67.5, 22.5, -22.5, -67.5], [-157.5, 157.5])
    np.testing.assert_allclose(map_.values * 255, pixels, atol=1e-4)
    assert signal.shape_of(signal.measures(pixels)) == (4, 8)
    assert np.array_equal(np.asarray(map_), map_.values)


# --- grids of decoded maps


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [
        (np.linspace(-87, 87, 30), np.linspace(23, 377, 60)),
        (WITH_POLES, GLOBE),
        (WITH_POLES, np.append(GLOBE, 360.0)),
        (np.array([10.0, 12, 14]), np.array([356.0, 358, 0, 2])),
        (np.array([5.0]), np.array([7.0])),
        (np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(32)[0])), GLOBE),
        (np.array([-80.0, -40, 10, 30, 85]), GLOBE),
    ],
)
def test_a_map_is_decoded_on_its_own_grid(latitude, longitude):
    given = SphereMap(RNG.random((len(latitude), len(longitude), 2)).astype(np.float32), latitude, longitude)
    signal = settled(given, value_range=[0, 2])
    measures = {name: float(np.float32(value)) for name, value in signal.measures(given).items()}  # as the table has it
    shape = signal.shape_of(measures)
    samples, wanted = signal.samples(given), signal.coordinates(shape)
    distance = torch.cdist(wanted.double(), samples.coordinates.double())
    assert distance.min(dim=1).values.max() < 1e-4
    (rebuilt,) = signal.reconstruct(samples.values[distance.argmin(dim=1)][None], shape)
    assert rebuilt.values.dtype == np.float32
    np.testing.assert_allclose(rebuilt.latitude, latitude, atol=1e-3)
    np.testing.assert_allclose(np.mod(rebuilt.longitude - longitude + 180, 360), 180, atol=1e-3)
    if latitude is not WITH_POLES:  # where many cells are at one point
        np.testing.assert_allclose(rebuilt.values, given.values, atol=1e-6)


def test_a_shape_is_a_grid_of_the_globe_or_of_the_part_that_was_fitted():
    signal = settled(grid_map(4, 8))
    for fitted in (
        (4, 8),
        (73, 144, 90, -90, 0, 357.5),
        (90, 180, -89, 89, 21, 379),
        (94, 192, 88.542, -88.542, 0, 358.125),
    ):
        assert signal.shape_from("45x90", fitted) == (45, 90)
    assert signal.shape_from("4x5", (2, 10, 10, 20, 30, 39)) == (4, 5, 7.5, 22.5, 30.5, 38.5)
    assert signal.shape_from("2x4", (10, 36, 45, 0, 5, 355)) == (2, 4, 35, 10, -135, 135)
    for text in ("90", "0x9", "9x-9", "axb", "1x2x3", "100000x100000"):
        with pytest.raises(ValueError, match=r"rows x columns|at most"):
            signal.shape_from(text, (4, 8))


# --- what a run settles


def test_a_run_is_scaled_by_what_its_first_maps_span():
    first = grid_map(4, 6, 2, names=("u", "t"), units=("m/s", "K"))
    second = replace(first, values=first.values * [1, 100] + np.float32(250) * np.array([0, 1], np.float32))
    signal = settled(first, second)
    for channel, (low, high) in enumerate(signal.ranges):
        both = np.stack([first.values, second.values])[..., channel]
        assert (low, high) == (both.min(), both.max())
    assert (signal.names, signal.units) == (("u", "t"), ("m/s", "K"))
    samples = signal.samples(second)
    assert samples.values.min() >= -0.5
    assert samples.values.max() <= 0.5
    assert settled(first, value_range=(-5, 5)).ranges == ((-5.0, 5.0),) * 2
    said = json.loads(json.dumps(signal.forward_description()))
    assert Sphere(**said["keys"]) == signal
    assert hash(Sphere(**said["keys"])) == hash(signal)
    y = samples.values[0].numpy()
    value = np.array(said["output"]["scale"]) * y + said["output"]["shift"]
    place = np.linalg.norm(
        signal.coordinates(signal.shape_of(signal.measures(second))) - samples.coordinates[0], axis=1
    )
    np.testing.assert_allclose(value, second.values.reshape(-1, 2)[place.argmin()], rtol=1e-5)
    assert said["output"]["unit"] == ["m/s", "K"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"value_range": [1, 1]}, r"signal\.value_range is \[lowest, highest\]"),
        ({"value_range": [[0, 1], [0, 1]]}, "such pair for each of 1 channels"),
        ({"value_range": [0, float("inf")]}, "lowest, highest"),
        ({"units": ["m", "s"]}, r"signal\.units has 2 entries for 1 channels"),
        ({"holdout": 1}, "with k at least 2; got 1"),
        ({"channels": 3}, "the map has 1 channels, the fields of this run have 3"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        settled(grid_map(4, 6), **keys)


def changed(**parts) -> SphereMap:
    return replace(grid_map(4, 6), **parts)


def values(*at: float) -> np.ndarray:
    found = np.zeros((4, 6, 1), np.float32)
    found.flat[: len(at)] = at
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(values=np.full((4, 6, 1), np.nan, np.float32)), "all values of the map are missing"),
        (changed(values=values(np.inf)), "infinite values"),
        (changed(values=values(1e38)), r"holds 1e\+38, a missing value that the file does not declare"),
        (changed(values=values(-1e34, np.nan)), r"holds -1e\+34"),
        (changed(values=values(-9999)), r"holds -9999, far from the range -5 to 5"),
        (changed(latitude=np.array([0.0, 40, 80, 120])), "latitudes run from 0 to 120; the poles"),
        (changed(latitude=np.array([0.0, 10, 5, 20])), "the latitudes neither ascend nor descend"),
        (changed(latitude=np.array([0.0, 10, 10, 20])), "the latitudes neither ascend nor descend"),
        (changed(latitude=np.array([0.0, np.nan, 10, 20])), "NaN or infinite"),
        (changed(latitude=np.arange(5.0)), r"\[5\] latitudes"),
        (changed(longitude=np.array([0.0, 100, 200, 300, 400, 500])), "more than once around"),
        (changed(longitude=np.array([0.0, 1, 2, 3, 2, 1])), "the longitudes neither"),
        (changed(longitude=np.array([0.0, 1, 2, 3, 4, 1e20])), r"1e\+20 degrees"),
        (changed(values=np.zeros((4, 6), np.float32)), r"\[rows, columns, channels\], got float32 \[4, 6\]"),
        (grid_map(4, 6, 2), "2 channels, the fields of this run have 1"),
        (grid_map(4, 6, units=("K",)), "the map's unit is 'K', that of this run is 'm/s'"),
        (np.zeros((4, 6), np.int32), "got int32"),
        (np.zeros((4, 6, 1, 1), np.float32), r"got shape \[4, 6, 1, 1\]"),
        (np.zeros((0, 6), np.float32), r"got shape \[0, 6, 1\]"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(content, message):
    signal = Sphere(1, value_range=(-5, 5), units=("m/s",))
    with pytest.raises(ValueError, match=message):
        signal.samples(content)


def test_constant_maps_decide_no_range():
    with pytest.raises(ValueError, match="constant"):
        settled(changed(values=values()))
    assert Sphere(1, value_range=(-5, 5)).samples(changed(values=values())).values.abs().max() == 0


def test_a_field_fitted_to_one_grid_says_the_same_between_its_cells():
    """z + x y is a sum of spherical harmonics; a third of the cells are missing."""

    def exact(shape):
        x, y, z = Sphere(1).coordinates(shape).numpy().T
        return (280 + 20 * (z + x * y)).reshape(*shape[:2], 1).astype(np.float32)

    given = with_gaps(SphereMap(exact((16, 32)), *Sphere(1)._rows_and_columns((16, 32))), 0.3, seed=0)
    signal = settled(given, holdout=4)
    samples = signal.samples(given)
    field = MLP(3, 1, width=32, depth=2, omega_0=3, omega_hidden=10)
    adam = Adam(3e-3, Schedule("cosine", total_steps=300))
    data = [("a", samples), ("b", samples)]
    fitted = next(iter(fit(field, signal, data, optimizer=adam, stop=Stop(300), seed=0, samples=128, device="cpu")))
    assert fitted.quality > 40
    assert fitted.quality_heldout > 40
    finer = (30, 60)
    values = field.apply(field.layout.unravel(fitted.weights[None]), signal.coordinates(finer)[None])
    (rebuilt,) = signal.reconstruct(values, finer)
    assert np.abs(rebuilt.values - exact(finer)).mean() < 0.01 * 60
