"""Solids, voxel grids and labelled points become samples; grids of logits come back.

Oracles: volumes of balls and boxes in closed form, torch's binary cross-entropy, scikit-learn's Jaccard score.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

import nfscale
from nfscale.signals import Grid, Labelled, Mesh, Occupancy, Samples, Solid

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
SIDES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
CUBE_FACES = np.array([[a, *pair] for a, b, c, d in SIDES for pair in ((b, c), (c, d))])
SMALL = Occupancy(pool=4096, check=8000)


def box(low=(0, 0, 0), size=(1, 1, 1)) -> Solid:
    """A box that knows its inside in closed form."""
    low, high = np.array(low, float), np.array(low, float) + size
    return Solid(Mesh(low + CUBE * size, CUBE_FACES), lambda points: ((points > low) & (points < high)).all(axis=1))


def ball(radius: float = 1.0) -> Solid:
    """A ball in closed form, with points of its surface as the corners of tiny triangles."""
    draw = np.random.default_rng(0).normal(size=(3000, 3))
    middles = radius * draw / np.linalg.norm(draw, axis=1, keepdims=True)
    across = np.cross(middles, np.roll(middles, 1, axis=1)) * 1e-3
    corners = np.stack([middles - across, middles + across, middles + np.cross(middles, across)], axis=1)
    extremes = np.repeat(np.concatenate([np.eye(3), -np.eye(3)]) * radius, 3, axis=0)
    mesh = Mesh(np.concatenate([corners.reshape(-1, 3), extremes]), np.arange(3018 * 3 - 36).reshape(-1, 3))
    return Solid(mesh, lambda points: np.linalg.norm(points, axis=1) < radius)


def grid_of(shape=(6, 4, 5)) -> np.ndarray:
    return np.random.default_rng(0).random(shape) < 0.4


def batch_of(*samples: Samples) -> Samples:
    return samples[0].map(lambda *tensors: torch.stack(tensors), *samples[1:])


# --- solids


@pytest.mark.parametrize("solid", [box(), box((1e6, -3, 0), (20, 10, 5)), box((0, 0, 0), (1e-5, 2e-5, 1e-5))])
def test_a_solid_lies_in_the_middle_of_the_box_and_its_longest_side_ends_before_it(solid):
    samples, measures = SMALL.samples(solid), SMALL.measures(solid)
    sizes = np.ptp(solid.mesh.vertices, axis=0)
    ends = 0.9 * sizes / sizes.max()
    points = samples.check.coordinates.double().numpy()
    expected = (np.abs(points) < ends).all(axis=1)
    at_the_edge = (np.abs(np.abs(points) - ends) < 1e-5).any(axis=1)
    assert ((samples.check.values[:, 0].numpy() > 0) == expected)[~at_the_edge].all()
    middle = [measures[f"centre_{axis}"] for axis in "xyz"]
    np.testing.assert_allclose(middle, solid.mesh.vertices.mean(axis=0), atol=1e-9 * sizes.max())
    assert measures["scale"] == pytest.approx(sizes.max() / 1.8)


def test_the_share_of_points_inside_is_the_share_of_the_volume():
    inside = Occupancy(pool=2, check=64_000).samples(ball()).check.values > 0
    assert float(inside.float().mean()) == pytest.approx(4 / 3 * np.pi * 0.9**3 / 8, abs=1e-3)


@pytest.mark.parametrize("radius", [0.6, 0.85, 0.97])
def test_the_iou_of_balls_is_the_ratio_of_their_volumes(radius):
    samples = Occupancy(pool=2, check=64_000).samples(ball()).check
    logits = radius - samples.coordinates.norm(dim=1, keepdim=True)
    ratio = (min(radius, 0.9) / max(radius, 0.9)) ** 3
    assert float(Occupancy().quality(logits[None], batch_of(samples))) == pytest.approx(ratio, abs=3e-3)


def test_a_share_of_the_pool_lies_near_the_surface_and_the_rest_is_even():
    signal = Occupancy(pool=40_000, near=0.25, spread=0.03, check=8000)
    distance = signal.samples(ball()).coordinates.norm(dim=1) - 0.9
    even = Occupancy(pool=30_000, near=0.0, check=8000).samples(ball()).coordinates
    near = 40_000 * float((distance.abs() < 0.12).float().mean()) - 30_000 * float(
        ((even.norm(dim=1) - 0.9).abs() < 0.12).float().mean()
    )
    assert near == pytest.approx(10_000, rel=0.03)
    only = Occupancy(pool=20_000, near=0.999, spread=0.03, check=8000).samples(ball()).coordinates
    assert float((only.norm(dim=1) - 0.9).std()) == pytest.approx(0.03, rel=0.05)
    octants = torch.bincount(((even > 0) * torch.tensor([4, 2, 1])).sum(dim=1))
    assert (octants / 30_000 - 1 / 8).abs().max() < 0.01


def test_triangles_get_points_by_their_area():
    """Two squares of areas 1 and 9."""
    squares = Mesh(
        np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [7, 0, 0], [10, 0, 0], [10, 3, 0], [7, 3, 0]], float),
        np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]]),
    )
    solid = Solid(squares, lambda points: points[:, 2] > 0)
    points = Occupancy(pool=20_000, near=0.999, spread=1e-4, check=1000).samples(solid).coordinates
    assert float((points[:, 0] < 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    right = points[points[:, 0] > 0].double()
    assert float(right[:, 0].mean()) == pytest.approx((8.5 - 5) / 5 * 0.9, abs=0.005)
    assert float(right[:, 1].std()) == pytest.approx(3 / 12**0.5 / 5 * 0.9, abs=0.005)


def test_equal_solids_have_equal_samples_and_all_have_equally_many():
    one, other, moved = SMALL.samples(box()), SMALL.samples(box()), SMALL.samples(box((5, 5, 5), (2, 1, 2)))
    assert torch.equal(one.coordinates, other.coordinates)
    assert torch.equal(one.values, other.values)
    assert one.kind == moved.kind
    assert one.kind.count == 4096
    assert one.kind.check.count == 8000
    assert torch.equal(one.check.coordinates, moved.check.coordinates), "all are asked at the same points"
    seen = {tuple(point) for point in one.coordinates.tolist()}
    assert not seen & {tuple(point) for point in one.check.coordinates.tolist()}, "the points of a check are fresh"


def test_points_that_follow_each_other_are_neighbours():
    """So that a stratified draw takes one point of each region: 64 of 32,768 span a fifth of the box, not all of it."""
    coordinates = Occupancy(pool=32_768, near=0.0, check=1000).samples(box()).coordinates
    runs = coordinates.reshape(-1, 64, 3)
    assert float((runs.max(dim=1).values - runs.min(dim=1).values).mean()) < 0.4


def test_points_of_a_check_can_be_held_back():
    whole, signal = SMALL.samples(box()), replace(SMALL, holdout=4)
    samples = signal.samples(box())
    assert torch.equal(samples.coordinates, whole.coordinates), "steps see what they saw"
    assert (len(samples.check.values), len(samples.heldout.values)) == (6000, 2000)
    points = torch.cat([samples.check.coordinates, samples.heldout.coordinates])
    assert sorted(points.tolist()) == sorted(whole.check.coordinates.tolist())


# --- voxels and labels


def test_a_voxel_grid_becomes_samples_and_comes_back():
    inside, signal = grid_of(), Occupancy()
    samples, shape = signal.samples(inside), signal.shape_of(signal.measures(inside))
    assert samples.check is None
    assert shape == (6, 4, 5, 3.0, 2.0, 2.5, 3.0)
    place = {tuple(point): index for index, point in enumerate(samples.coordinates.tolist())}
    order = [place[tuple(point)] for point in signal.coordinates(shape).tolist()]
    (grid,) = signal.reconstruct(samples.values[order][None], shape)
    assert np.array_equal(grid.levels > 0, inside)
    centres = grid.points(np.indices(inside.shape).transpose(1, 2, 3, 0))
    np.testing.assert_allclose(centres, np.indices(inside.shape).transpose(1, 2, 3, 0) + 0.5, atol=1e-12)


def test_voxels_are_cubes_and_the_longest_row_spans_the_box():
    coordinates = Occupancy().coordinates((4, 2, 1)).reshape(4, 2, 1, 3)
    torch.testing.assert_close(coordinates[:, 0, 0, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(coordinates[0, :, 0, 1], torch.tensor([-0.25, 0.25]))
    assert coordinates[..., 2].abs().max() == 0


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_truths_may_be_numbers(dtype):
    inside = grid_of()
    assert torch.equal(Occupancy().samples(inside.astype(dtype)).values, Occupancy().samples(inside).values)


def test_of_many_voxels_some_are_checked_and_some_held_back():
    inside = grid_of((12, 12, 12))
    samples = Occupancy(check=100, holdout=3).samples(inside)
    assert (len(samples.values), len(samples.check.values), len(samples.heldout.values)) == (1152, 100, 576)
    used = {tuple(point) for point in samples.coordinates.tolist()}
    assert {tuple(point) for point in samples.check.coordinates.tolist()} <= used
    assert not used & {tuple(point) for point in samples.heldout.coordinates.tolist()}


def test_labelled_points_are_taken_as_they_are():
    points = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    signal, content = Occupancy(), Labelled(points, points[:, 0] > 0)
    samples = signal.samples(content)
    assert torch.equal(samples.values[:, 0] > 0, samples.coordinates[:, 0] > 0)
    assert sorted(samples.coordinates.tolist()) == sorted(points.astype(np.float32).tolist())
    assert signal.shape_of(signal.measures(content)) == (64, 64, 64, 0.0, 0.0, 0.0, 1.0)


# --- loss and quality


def made_up() -> tuple[torch.Tensor, Samples]:
    draw = torch.Generator().manual_seed(0)
    values = (torch.rand(3, 200, 1, generator=draw) < 0.3) * 2.0 - 1
    return 2 * torch.randn(3, 200, 1, generator=draw), Samples(torch.zeros(3, 200, 3), values)


def test_the_loss_is_the_binary_cross_entropy_of_torch():
    logits, samples = made_up()
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, (samples.values > 0).float(), reduction="none"
    )
    torch.testing.assert_close(Occupancy().loss(logits, samples), theirs.mean(dim=(1, 2)))
    far = Occupancy().loss(1e4 * logits, samples)
    assert far.isfinite().all()


def test_the_quality_is_the_jaccard_score_of_scikit_learn():
    logits, samples = made_up()
    ours = Occupancy().quality(logits, samples)
    for field in range(3):
        theirs = jaccard_score(samples.values[field, :, 0] > 0, logits[field, :, 0] > 0)
        assert float(ours[field]) == pytest.approx(theirs)


def test_probability_a_half_decides_and_not_logit_a_half():
    samples = Samples(torch.zeros(1, 2, 3), torch.tensor([[[1.0], [1.0]]]))
    assert Occupancy().quality(torch.tensor([[[0.3], [0.1]]]), samples).tolist() == [1.0]
    assert Occupancy().quality(torch.tensor([[[0.3], [-0.1]]]), samples).tolist() == [0.5]


def test_where_nothing_is_inside_saying_so_is_perfect():
    samples = Samples(torch.zeros(2, 2, 3), -torch.ones(2, 2, 1))
    assert Occupancy().quality(torch.tensor([[[-1.0], [-1.0]], [[-1.0], [1.0]]]), samples).tolist() == [1.0, 0.0]


def test_a_mask_weighs_points():
    samples = Samples(torch.zeros(1, 3, 3), torch.ones(1, 3, 1), torch.tensor([[1.0, 0.5, 0.0]]))
    logits = torch.tensor([[[1.0], [-1.0], [-9.0]]])
    assert float(Occupancy().quality(logits, samples)) == pytest.approx(1 / 1.5)
    entropy = torch.nn.functional.softplus(torch.tensor([-1.0, 1.0]))
    assert float(Occupancy().loss(logits, samples)) == pytest.approx(float(entropy @ torch.tensor([1.0, 0.5])) / 1.5)


def test_predictions_of_another_shape_are_refused_with_both_shapes():
    logits, samples = made_up()
    with pytest.raises(ValueError, match=r"\(3, 100, 1\).*\(3, 200, 1\)"):
        Occupancy().loss(logits[:, :100], samples)


def test_a_field_becomes_a_box():
    signal = Occupancy(pool=16_384, check=8000)
    data = [(name, signal.samples(box(size=size))) for name, size in (("a", (1, 1, 1)), ("b", (1, 2, 1.5)))]
    adam = nfscale.Adam(2e-3, nfscale.Schedule("cosine", total_steps=200))
    field = nfscale.MLP(3, 1, width=32, depth=2, omega_0=10)
    stop = nfscale.Stop(max_steps=200, check_every=50)
    found = list(nfscale.fit(field, signal, data, optimizer=adam, stop=stop, seed=0, samples=256, device="cpu"))
    assert min(fitted.quality for fitted in found) > 0.93


# --- what does not fit


FLAT = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], float), np.array([[0, 1, 2]]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (np.zeros((4, 4)), r"\[x, y, z\].*\[4, 4\]"),
        (np.zeros((4, 0, 4), bool), r"\[x, y, z\].*\[4, 0, 4\]"),
        (np.full((2, 2, 2), np.nan), "true or false"),
        (np.full((2, 2, 2), 255, np.uint8), "true or false, or 1 or 0; got uint8"),
        (np.zeros((2, 2, 2), bool), "nothing lies inside"),
        (np.ones((2, 2, 2), bool), "everything lies inside"),
        (Labelled(np.zeros((4, 2)), np.zeros(4, bool)), r"\[N, 3\].*\[4, 2\]"),
        (Labelled(np.zeros((4, 3)), np.zeros(5, bool)), r"\[4, 3\], \[5\]"),
        (Labelled(np.full((4, 3), np.nan), np.zeros(4, bool)), r"in \[-1, 1\]"),
        (Labelled(np.full((4, 3), 1.5), np.zeros(4, bool)), r"in \[-1, 1\]"),
        (FLAT, "without what it encloses; .*solid_of"),
        (Solid(FLAT, lambda points: np.zeros(len(points), bool)), "nothing lies inside: the surface is flat"),
        (Solid(replace(FLAT, faces=FLAT.faces[:0]), lambda points: points[:, 0] > 0), "no faces"),
        (Solid(replace(FLAT, vertices=FLAT.vertices * np.nan), lambda points: points[:, 0] > 0), "not a number"),
        (Solid(replace(FLAT, vertices=FLAT.vertices * 0), lambda points: points[:, 0] > 0), "larger than a point"),
        (Solid(replace(FLAT, vertices=FLAT.vertices * 1e300), lambda points: points[:, 0] > 0), "and finite"),
        (Solid(replace(FLAT, vertices=CUBE[[0, 0, 7]]), lambda points: points[:, 0] > 0), "no area"),
        ("a text", "got str"),
    ],
)
def test_what_is_no_shape_is_refused_with_what_was_seen(content, sentence):
    with pytest.raises(ValueError, match=sentence):
        SMALL.samples(content)


@pytest.mark.parametrize(
    "keys", [{"channels": 2}, {"pool": 0}, {"near": 1.0}, {"holdout": 1}, {"spread": 0.0}, {"check": 0}]
)
def test_keys_out_of_their_range_are_refused_by_name(keys):
    with pytest.raises(ValueError, match=f"signal.{next(iter(keys))}"):
        Occupancy(**keys)


def test_there_is_one_channel():
    assert Occupancy.settled({"channels": "auto", "pool": 5}, []) == {"channels": 1, "pool": 5}
    assert Occupancy.settled({"channels": 1}, [])["channels"] == 1


# --- shapes


def test_a_shape_is_asked_for_by_its_longest_side_or_all_three():
    signal, fitted = Occupancy(), (64, 32, 16, 1.0, 2.0, 3.0, 4.0)
    assert signal.shape_from("128", fitted) == (128, 64, 32, 1.0, 2.0, 3.0, 4.0)
    assert signal.shape_from("5X6x7", fitted) == (5, 6, 7, 1.0, 2.0, 3.0, 4.0)
    for wrong in ("128x128", "0", "-4", "a", "1x2x3x4", ""):
        with pytest.raises(ValueError, match="such as 128, or 128x96x64"):
            signal.shape_from(wrong, fitted)
    with pytest.raises(ValueError, match="at most"):
        signal.shape_from("100000", fitted)


def test_a_shape_of_sizes_alone_decodes_in_the_coordinates_of_the_field():
    (grid,) = Occupancy().reconstruct(torch.ones(1, 8, 1), (2, 2, 2))
    assert (grid.centre, grid.scale) == ((0.0, 0.0, 0.0), 1.0)
    np.testing.assert_allclose(grid.points(np.array([[0, 0, 0], [1, 1, 1]])), [[-0.5] * 3, [0.5] * 3])


def test_originals_are_what_a_page_shows():
    signal = Occupancy()
    grid = signal.original(grid_of())
    assert isinstance(grid, Grid)
    assert np.array_equal(grid.levels > 0, grid_of())
    assert signal.original(box()).faces is CUBE_FACES
