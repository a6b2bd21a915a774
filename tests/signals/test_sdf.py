"""Distances of solids and voxel grids become samples; grids come back; slopes are those of fields in closed form.

Oracles: distances to balls and boxes and volumes of balls in closed form, a slope by autograd.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import nfscale
from nfscale.engine import native
from nfscale.engine.dispatch import chosen
from nfscale.signals import Grid, Mesh, Samples, Sdf, Solid
from tests.signals.test_occupancy import CUBE, CUBE_FACES, ball, batch_of, box

SMALL = Sdf(pool=4096, check=8000)


def ball_distance(points: np.ndarray, radius: float = 1.0) -> np.ndarray:
    return np.linalg.norm(points, axis=-1) - radius


def box_distance(points: np.ndarray, low, size) -> np.ndarray:
    """Of a box, less than 0 inside."""
    beyond = np.abs(points - np.array(low) - np.array(size) / 2) - np.array(size) / 2
    return np.linalg.norm(beyond.clip(0), axis=-1) + beyond.max(axis=-1).clip(max=0)


def exact_ball(radius: float = 1.0) -> Solid:
    return replace(ball(radius), distance=lambda points, largest: np.abs(ball_distance(points, radius)))


def exact_box(low=(0, 0, 0), size=(1, 1, 1)) -> Solid:
    return replace(box(low, size), distance=lambda points, largest: np.abs(box_distance(points, low, size)))


def ball_grid(size: int = 12, radius: float = 4.0) -> np.ndarray:
    """Distances in voxels to a ball in the middle."""
    return ball_distance(np.indices((size,) * 3).transpose(1, 2, 3, 0) + 0.5 - size / 2, radius).astype(np.float32)


# --- solids


@pytest.mark.parametrize(
    ("low", "size"), [((0, 0, 0), (1, 1, 1)), ((1e6, -3, 0), (20, 10, 5)), ((0, 0, 0), (1e-5,) * 3)]
)
def test_values_are_signed_distances_in_units_of_the_cut(low, size):
    for signal in (SMALL, replace(SMALL, truncate=0.5), replace(SMALL, truncate=4.0)):
        samples, measures = signal.samples(exact_box(low, size)), signal.measures(exact_box(low, size))
        for part in (samples, samples.check):
            points = part.coordinates.double().numpy()
            halves = 0.9 * np.array(size) / max(size)
            expected = (box_distance(points, -halves, 2 * halves) / signal.truncate).clip(-1, 1)
            np.testing.assert_allclose(part.values[:, 0], expected, atol=2e-5)
        own = np.array([measures[f"centre_{axis}"] for axis in "xyz"]) + measures["scale"] * points
        in_own_unit = part.values[:, 0].double().numpy() * signal.truncate * measures["scale"]
        told = np.abs(part.values[:, 0].numpy()) < 1
        np.testing.assert_allclose(in_own_unit[told], box_distance(own, low, size)[told], atol=1e-5 * max(size))


def test_inside_is_below_zero_and_the_middle_of_a_ball_is_the_deepest():
    samples = replace(SMALL, truncate=4.0).samples(exact_ball()).check
    distances = 4 * samples.values[:, 0]
    radii = samples.coordinates.norm(dim=1)
    assert torch.equal(distances < 0, radii < 0.9)
    assert float(distances[radii.argmin()]) == pytest.approx(-0.9, abs=0.1)
    assert float(distances.max()) == pytest.approx(3**0.5 - 0.9, abs=0.1)


def test_what_lies_beyond_the_cut_need_not_be_searched():
    asked = []

    def bounded(points: np.ndarray, largest: float) -> np.ndarray:
        asked.append(largest)
        away = np.abs(ball_distance(points, 5.0))
        return np.where(away > largest, np.inf, away)

    whole, spared = SMALL.samples(exact_ball(5.0)), SMALL.samples(replace(ball(5.0), distance=bounded))
    assert torch.equal(whole.values, spared.values)
    assert torch.equal(whole.check.values, spared.check.values)
    assert max(asked) < 1.1 * SMALL.truncate * 5 / 0.9


def test_points_lie_near_the_surface_at_two_widths_and_some_anywhere():
    signal = Sdf(pool=40_000, near=0.999, spread=0.01, wide=0.05, truncate=4.0, check=1000)
    away = 4 * signal.samples(exact_ball()).values[:, 0].abs()
    assert float(away.square().mean().sqrt()) == pytest.approx(((0.01**2 + 0.05**2) / 2) ** 0.5, rel=0.08)
    narrow, broad = (float(torch.erf(torch.tensor(0.01 / width / 2**0.5))) for width in (0.01, 0.05))
    assert float((away < 0.01).float().mean()) == pytest.approx((narrow + broad) / 2, abs=0.01)
    even = Sdf(pool=40_000, near=0.0, truncate=4.0, check=1000).samples(exact_ball()).coordinates
    assert float(even.abs().mean()) == pytest.approx(0.5, abs=0.01)


def test_equal_solids_have_equal_samples_and_points_of_a_check_are_fresh():
    one, other = SMALL.samples(exact_box()), SMALL.samples(exact_box())
    assert torch.equal(one.coordinates, other.coordinates)
    assert torch.equal(one.values, other.values)
    assert one.kind == SMALL.samples(exact_ball()).kind
    seen = {tuple(point) for point in one.coordinates.tolist()}
    assert not seen & {tuple(point) for point in one.check.coordinates.tolist()}


def test_points_of_a_check_can_be_held_back():
    samples = replace(SMALL, holdout=4).samples(exact_box())
    assert (len(samples.check.values), len(samples.heldout.values)) == (6000, 2000)


# --- grids


def test_a_grid_of_distances_in_voxels_becomes_samples_and_comes_back():
    signal, content = Sdf(truncate=4.0), ball_grid()
    samples, shape = signal.samples(content), signal.shape_of(signal.measures(content))
    expected = ball_distance(samples.coordinates.double().numpy(), 4 / 6)
    np.testing.assert_allclose(4 * samples.values[:, 0], expected, atol=1e-5)
    assert shape == (12, 12, 12, 6.0, 6.0, 6.0, 6.0)
    grid = signal.original(content)
    assert isinstance(grid, Grid)
    np.testing.assert_allclose(-grid.scale * grid.levels, content, atol=1e-5)
    assert grid.levels[6, 6, 6] > 0, "levels are above 0 inside"


def test_a_field_decodes_to_how_far_below_the_surface_a_voxel_is():
    values = torch.tensor([[-1.0], [0.5], [1.0], [0.0]])[None]
    (grid,) = Sdf(truncate=0.2).reconstruct(values, (1, 2, 2, 1.0, 2.0, 3.0, 4.0))
    np.testing.assert_allclose(grid.levels, [[[0.2, -0.1], [-0.2, 0.0]]], atol=1e-7)
    assert (grid.centre, grid.scale) == ((1.0, 2.0, 3.0), 4.0)
    assert Sdf().original(exact_box()).faces is CUBE_FACES


# --- loss and quality


@pytest.mark.parametrize("radius", [0.6, 0.85, 0.97])
def test_the_iou_of_balls_is_the_ratio_of_their_volumes(radius):
    samples = Sdf(pool=2, check=64_000).samples(exact_ball()).check
    distances = samples.coordinates.norm(dim=1, keepdim=True)[None] - radius
    ratio = (min(radius, 0.9) / max(radius, 0.9)) ** 3
    assert float(Sdf().quality(distances, batch_of(samples))) == pytest.approx(ratio, abs=3e-3)
    volume, own = (4 / 3 * np.pi * size**3 for size in (radius, 0.9))
    outside = max(own - volume, 0) / (8 - max(volume - own, 0))
    assert float(Sdf().quality(-distances, batch_of(samples))) == pytest.approx(outside, abs=3e-3), "the other side"


def test_the_loss_is_the_squared_error_in_units_of_the_cut():
    samples = batch_of(SMALL.samples(exact_ball()), SMALL.samples(exact_box()))
    noise = torch.randn(samples.values.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SMALL.loss(samples.values + noise, samples), noise.square().mean(dim=(1, 2)))
    assert SMALL.quality(samples.values, samples).tolist() == [1.0, 1.0]


def test_the_fast_step_serves_unless_slopes_are_asked_for():
    if why := native.unavailable():
        pytest.skip(why)
    field, adam = nfscale.MLP(3, 1, width=16, depth=2), nfscale.Adam(1e-3, nfscale.Schedule("constant"))
    cpu = torch.device("cpu")
    assert (Sdf().squared_error, Sdf().points_per_sample) == (True, 1)
    assert chosen("auto", cpu, field, Sdf(), adam).name == "native"
    assert chosen("auto", cpu, field, Sdf(eikonal=0.1), adam).name == "plain"


# --- slopes

EIKONAL = Sdf(pool=2048, check=1000, eikonal=0.3)


def plane(slope: float):
    """A field whose distance grows by `slope` for each step along one direction."""
    direction = slope * torch.tensor([[2.0], [-1.0], [2.0]]) / 3
    return lambda coordinates: coordinates @ direction / EIKONAL.truncate


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.5])
def test_the_slope_of_a_plane_is_its_own_up_to_the_corners_of_the_box(slope):
    corners = torch.tensor(2 * CUBE - 1, dtype=torch.float32)
    some = torch.rand(100, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    coordinates = torch.cat([corners, some])[None]

    def asked(at: torch.Tensor) -> torch.Tensor:
        assert at.abs().max() <= 1, "no step leaves the box"
        return plane(slope)(at)

    predicted = EIKONAL.predict(asked, Samples(coordinates, torch.zeros(1, 108, 2)))
    torch.testing.assert_close(predicted[..., :1], plane(slope)(coordinates))
    torch.testing.assert_close(predicted[..., 1], torch.full((1, 108), slope), atol=1e-4, rtol=1e-3)


def test_the_slope_of_a_field_is_that_of_autograd():
    field = nfscale.MLP(3, 1, width=32, depth=3, omega_0=10)
    params = field.init(torch.arange(2))
    coordinates = (torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95).requires_grad_()
    predicted = EIKONAL.predict(lambda at: field.apply(params, at), Samples(coordinates, torch.zeros(2, 50, 2)))
    (slope,) = torch.autograd.grad(field.apply(params, coordinates).sum(), coordinates)
    expected = EIKONAL.truncate * slope.norm(dim=-1)
    torch.testing.assert_close(predicted[..., 1], expected, rtol=0.05, atol=0.005)


def test_a_distance_has_slope_one_up_to_the_cut_and_none_beyond():
    samples = EIKONAL.samples(exact_ball())
    distances, slopes = samples.values.T
    assert torch.equal(slopes == 1, distances.abs() < 1)
    assert torch.equal(slopes == 0, distances.abs() == 1)
    assert 0 < float(slopes.mean()) < 1


def test_the_loss_asks_for_the_slope_by_its_weight():
    samples = EIKONAL.samples(exact_ball())
    near = Samples(samples.coordinates[None], samples.values[None], samples.values[None, :, 1])
    wrong = near.values + torch.tensor([0.2, 1.5])
    torch.testing.assert_close(EIKONAL.loss(wrong, near), torch.tensor([0.2**2 + 0.3 * 1.5**2]))
    assert float(EIKONAL.loss(near.values, near)) == 0
    with pytest.raises(ValueError, match=r"\(1, 2048, 1\).*\(1, 2048, 2\)"):
        EIKONAL.loss(wrong[..., :1], near)


def test_the_slope_of_a_constant_field_has_a_derivative():
    level = torch.tensor(0.3, requires_grad=True)
    samples = batch_of(EIKONAL.samples(exact_ball()))
    loss = EIKONAL.loss(EIKONAL.predict(lambda at: level.expand(*at.shape[:-1], 1), samples), samples)
    (slope,) = torch.autograd.grad(loss.sum(), level)
    assert slope.isfinite()


def fitted(signal: Sdf, steps: int = 200) -> nfscale.Fitted:
    field = nfscale.MLP(3, 1, width=32, depth=2, omega_0=10)
    adam = nfscale.Adam(2e-3, nfscale.Schedule("cosine", total_steps=steps))
    stop = nfscale.Stop(max_steps=steps, check_every=50)
    data = [("a", signal.samples(exact_box())), ("b", signal.samples(exact_ball()))]
    found = nfscale.fit(field, signal, data, optimizer=adam, stop=stop, seed=0, samples=256, device="cpu")
    return min(found, key=lambda one: one.quality)


@pytest.mark.parametrize("eikonal", [0.0, 0.05])
def test_a_field_becomes_a_box_and_a_ball(eikonal):
    assert fitted(Sdf(pool=16_384, check=8000, eikonal=eikonal)).quality > 0.93


# --- what does not fit


FLAT = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], float), np.array([[0, 1, 2]]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (np.zeros((4, 4)), r"\[x, y, z\].*\[4, 4\]"),
        (np.zeros((4, 0, 4)), r"\[x, y, z\].*\[4, 0, 4\]"),
        (np.full((2, 2, 2), np.nan), "a signed distance, a number; got float64, or not a number"),
        (np.full((2, 2, 2), True), "got bool"),
        (np.full((2, 2, 2), 1.0), "nothing lies inside"),
        (np.full((2, 2, 2), -1.0), "everything lies inside"),
        (FLAT, "without what it encloses; .*solid_of"),
        (box(), "does not know how far its surface is; .*solid_of"),
        (replace(exact_box(), inside=lambda points: np.zeros(len(points), bool)), "nothing lies inside"),
        (replace(exact_box(), mesh=replace(FLAT, vertices=FLAT.vertices * np.nan)), "not a number"),
        ("a text", "got str"),
    ],
)
def test_what_has_no_distances_is_refused_with_what_was_seen(content, sentence):
    with pytest.raises(ValueError, match=sentence):
        SMALL.samples(content)


@pytest.mark.parametrize(
    "keys",
    [
        {"channels": 2},
        {"pool": 0},
        {"near": 1.0},
        {"wide": 0.0},
        {"truncate": 0.0},
        {"truncate": 5.0},
        {"eikonal": -1.0},
    ],
)
def test_keys_out_of_their_range_are_refused_by_name(keys):
    with pytest.raises(ValueError, match=f"signal.{next(iter(keys))}"):
        Sdf(**keys)
