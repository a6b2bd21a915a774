"""Radiance: rays and volume rendering against closed forms, boxes, held-back views, hostile scenes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from nfscale.engine.step import predicted_at
from nfscale.fields import MLP
from nfscale.media.render import orbit_pose
from nfscale.rng import as_tensor
from nfscale.signals import Radiance, Samples, Scene
from nfscale.signals.radiance import _DENSITY_SHIFT, _GAIN, _spread, quaternion_of, rotation_of

ANGLE = 0.7
SIZE = 24
BALL = 0.6
"""Radius of the ball that the made-up scenes show."""


def ball_scene(views: int = 12, centre=(0.2, 0.0, -0.1), test_views: int = 0, size: int = SIZE) -> Scene:
    """A red ball, whose silhouettes are known."""
    poses = np.stack([orbit_pose(2.4 * view, 0.9 * math.sin(view), 3.0) for view in range(views)])
    images = np.zeros((views, size, size, 4), dtype=np.uint8)
    for image, pose in zip(images, poses, strict=True):
        directions = directions_of(pose, size)
        towards = np.asarray(centre) - pose[:3, 3]
        along = directions @ towards
        image[towards @ towards - along**2 < BALL**2] = (255, 0, 0, 255)
    return Scene(images, poses, ANGLE, np.arange(views) >= views - test_views)


def directions_of(pose: np.ndarray, size: int) -> np.ndarray:
    """Unit directions [size, size, 3], written as in the paper's code, for pixel centres."""
    focal = 0.5 * size / math.tan(0.5 * ANGLE)
    i, j = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="xy")
    local = np.stack([(i - size * 0.5) / focal, -(j - size * 0.5) / focal, -np.ones_like(i)], -1)
    directions = np.sum(local[..., None, :] * pose[:3, :3], -1)
    return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def without_opacity(scene: Scene) -> Scene:
    opaque = scene.images[..., 3:] > 0
    return replace(scene, images=np.where(opaque, scene.images[..., :3], 255).astype(np.uint8))


# --- rays


def test_rays_are_those_of_the_blender_convention():
    scene = without_opacity(ball_scene(views=3))
    rays = Radiance(bound=2.0, holdout=None).samples(scene).check.coordinates.numpy().reshape(3, SIZE, SIZE, 8)
    for view, pose in enumerate(scene.poses):
        np.testing.assert_allclose(rays[view, ..., :3], np.broadcast_to(pose[:3, 3] / 2, (SIZE, SIZE, 3)), rtol=1e-6)
        np.testing.assert_allclose(rays[view, ..., 3:6], directions_of(pose, SIZE), atol=1e-6)


def test_rays_enter_and_leave_the_box():
    """Along an axis: a camera at distance 3 of a cube of half side 1 enters at 2 and leaves at 4."""
    scene = without_opacity(ball_scene(views=2, size=25))
    scene = replace(scene, poses=np.stack([orbit_pose(0, 0, 3.0), orbit_pose(math.pi / 2, 0, 3.0)]))
    rays = Radiance(bound=1.0, holdout=None).samples(scene).check.coordinates.numpy().reshape(2, 25, 25, 8)
    np.testing.assert_allclose(rays[:, 12, 12, 6:], [[2, 4], [2, 4]], rtol=1e-5)
    ends = rays[..., :3, None] + rays[..., 3:6, None] * rays[..., None, 6:]
    meets = rays[..., 7] > rays[..., 6]
    assert meets.any()
    np.testing.assert_allclose(np.abs(ends[meets]).max(axis=1), 1, atol=1e-5)


def test_a_camera_inside_the_box_sees_from_where_it_is():
    scene = without_opacity(ball_scene(views=2))
    scene = replace(scene, poses=np.stack([orbit_pose(0, 0, 0.5)] * 2))
    rays = Radiance(bound=1.0, holdout=None).samples(scene).coordinates
    assert (rays[:, 6] == 0).all()
    assert (rays[:, 7] > 0).all()


def test_spread_positions_are_distinct_and_favour_no_column():
    assert _spread(100, 100).tolist() == list(range(100))
    chosen = _spread(48 * 96 * 96, 2048)
    assert len(set(chosen.tolist())) == 2048
    assert np.diff(chosen).min() > 0
    assert np.bincount(chosen % 96, minlength=96).min() > 5


@pytest.mark.parametrize("seed", range(5))
def test_quaternions_are_those_of_scipy(seed):
    rotation = Rotation.random(random_state=seed)
    expected = rotation.as_quat()[[3, 0, 1, 2]]
    expected *= np.sign(expected[0])
    np.testing.assert_allclose(quaternion_of(rotation.as_matrix()), expected, atol=1e-12)
    np.testing.assert_allclose(rotation_of(expected), rotation.as_matrix(), atol=1e-12)


# --- volume rendering


def uniform_field(density: float, colour: tuple[float, float, float]):
    """A field that is the same everywhere, in the outputs that `predict` takes."""
    shift = math.log(math.expm1(density)) - _DENSITY_SHIFT
    outputs = torch.tensor([*(math.log(c / (1 - c)) for c in colour), shift]) / _GAIN
    return lambda points: outputs.expand(*points.shape[:2], 4)


def rays_of(near: float, far: float) -> Samples:
    ray = torch.tensor([[[0.0, 0.0, 3.0, 0.0, 0.0, -1.0, near, far]]])
    return Samples(ray, torch.zeros(1, 1, 3))


def test_a_homogeneous_fog_follows_beer_and_lambert():
    colour = (0.8, 0.3, 0.5)
    predicted = Radiance(points=7).predict(uniform_field(1.3, colour), rays_of(2.0, 4.0))
    clear = math.exp(-1.3 * 2)
    torch.testing.assert_close(predicted[0, 0], torch.tensor(colour) * (1 - clear) + clear)
    dark = Radiance(points=7, background="black").predict(uniform_field(1.3, colour), rays_of(2.0, 4.0))
    torch.testing.assert_close(dark[0, 0], torch.tensor(colour) * (1 - clear))


def test_a_ray_that_misses_is_background():
    predicted = Radiance().predict(uniform_field(50.0, (0.1, 0.2, 0.3)), rays_of(0.0, 0.0))
    torch.testing.assert_close(predicted, torch.ones(1, 1, 3))


def test_what_is_in_front_hides_what_is_behind():
    def wall(points):
        front = points[..., 2:] > 0
        red, blue = uniform_field(200.0, (0.99, 0.01, 0.01))(points), uniform_field(200.0, (0.01, 0.01, 0.99))(points)
        return torch.where(front, red, blue)

    predicted = Radiance(points=32).predict(wall, rays_of(2.0, 4.0))
    torch.testing.assert_close(predicted[0, 0], torch.tensor([0.99, 0.01, 0.01]), atol=1e-3, rtol=0)


def test_points_lie_in_the_middle_of_equal_intervals_or_where_the_jitter_says():
    seen = []

    def field(points):
        seen.append(points[0, :, 2])
        return uniform_field(1.0, (0.5, 0.5, 0.5))(points)

    rays = rays_of(2.0, 4.0)
    signal = Radiance(points=4)
    signal.predict(field, rays)
    signal.predict(field, replace(rays, jitter=torch.tensor([[0.0]])))
    torch.testing.assert_close(seen[0], torch.tensor([0.75, 0.25, -0.25, -0.75]))
    torch.testing.assert_close(seen[1], torch.tensor([1.0, 0.5, 0.0, -0.5]))


# --- samples


def test_the_box_holds_the_silhouettes_and_little_more():
    scene = ball_scene(views=24, size=48)
    said = Radiance(bound=1.5).measures(scene)
    centre, half = ([said[f"box_{part}_{axis}"] for axis in "xyz"] for part in ("centre", "half"))
    np.testing.assert_allclose(centre, [0.2, 0.0, -0.1], atol=0.1)
    assert (np.array(half) >= BALL).all()
    assert (np.array(half) < BALL + 0.25).all()


def test_training_rays_meet_the_box_and_have_a_count_of_their_own():
    """So that scenes whose objects differ share a batch."""
    signal = Radiance(bound=1.5, max_rays=2000)
    samples = signal.samples(ball_scene())
    other = signal.samples(ball_scene(centre=(-0.3, 0.2, 0.0)))
    assert samples.kind == other.kind
    assert len(samples.values) == 2000
    assert (samples.coordinates[:, 7] > samples.coordinates[:, 6]).all()
    assert not torch.equal(samples.coordinates, other.coordinates)


def test_every_kth_view_is_held_back_or_the_test_views():
    scene = ball_scene(views=17)
    assert Radiance().measures(scene)["views_heldout"] == 2
    assert Radiance(holdout=4).measures(scene)["views_heldout"] == 4
    assert Radiance(holdout=None).samples(scene).heldout is None
    tested = ball_scene(views=17, test_views=5)
    signal = Radiance(holdout=4)
    assert signal.measures(tested)["views_heldout"] == 5
    heldout = signal.samples(tested).heldout
    assert len(heldout.values) == 5 * SIZE * SIZE, "all their pixels"
    trained = {tuple(row) for row in signal.samples(tested).coordinates[:, :3].tolist()}
    assert not trained & {tuple(row) for row in heldout.coordinates[:, :3].tolist()}, "no camera is in both"


def test_transparency_shows_the_background():
    scene = ball_scene()
    scene.images[0, 0, 0] = (0, 0, 255, 51)
    for background, expected in (("white", [0.8, 0.8, 1.0]), ("black", [0.0, 0.0, 0.2])):
        values = Radiance(background=background, holdout=None).samples(scene).check.values
        torch.testing.assert_close(values[0], torch.tensor(expected))
        torch.testing.assert_close(values[1], torch.full((3,), float(background == "white")))


# --- views of a field


def fitted_row() -> tuple[MLP, torch.Tensor]:
    field = MLP(dimensions=3, channels=4, width=16, depth=2)
    return field, field.layout.ravel(field.init(as_tensor([1])))


def test_the_shown_views_are_decoded_at_their_own_cameras():
    signal, scene = Radiance(bound=1.5), ball_scene(test_views=3)
    field, row = fitted_row()
    shape = signal.shape_of({name: float(np.float32(value)) for name, value in signal.measures(scene).items()})
    assert shape[:3] == (3, SIZE, SIZE)
    views = signal.reconstruct(predicted_at(field, signal, row, signal.coordinates(shape)), shape)
    assert views.shape == (1, *signal.original(scene).shape)
    direct = predicted_at(field, signal, row, signal.samples(scene).heldout.coordinates)
    np.testing.assert_allclose(views.reshape(1, -1, 3), direct.clamp(0, 1), atol=1e-4)


def test_a_turntable_goes_around_at_the_height_and_distance_of_the_cameras():
    signal = Radiance()
    poses = np.stack([orbit_pose(turn, 0.5, 3.0) for turn in (0.1, 2.0, 4.0)])
    scene = replace(ball_scene(views=3, centre=(0, 0, 0)), poses=poses, heldout=np.ones(3, dtype=bool))
    scene = replace(scene, images=np.concatenate([scene.images] * 2), poses=np.concatenate([poses] * 2))
    scene = replace(scene, heldout=np.arange(6) < 3)
    fitted = signal.shape_of(signal.measures(scene))
    centre = np.array(fitted[4:7])
    shape = signal.shape_from("8x10x12", fitted)
    assert shape[:3] == (8, 10, 12)
    assert shape[3:10] == fitted[3:10]
    cameras = np.array(shape[10:]).reshape(8, 7)
    away = cameras[:, :3] - centre
    np.testing.assert_allclose(np.linalg.norm(away, axis=1), np.linalg.norm(poses[:, :3, 3] - centre, axis=1).mean())
    assert np.ptp(cameras[:, 2]) < 1e-9, "z is up"
    for position, camera in zip(away, cameras, strict=True):
        rotation = rotation_of(camera[3:])
        np.testing.assert_allclose(rotation[:, 2], position / np.linalg.norm(position), atol=1e-9)
        assert rotation[2, 1] > 0.8
    assert len(signal.coordinates(shape)) == 8 * 10 * 12


def test_a_shape_is_a_size_or_a_number_of_views_and_a_size():
    signal = Radiance()
    fitted = signal.shape_of(signal.measures(ball_scene()))
    assert signal.shape_from("30x40", fitted) == (*fitted[:1], 30, 40, *fitted[3:])
    for text in ("30", "a x b", "0x3", "1x2x3x4", "-1x3"):
        with pytest.raises(ValueError, match="write height x width"):
            signal.shape_from(text, fitted)
    with pytest.raises(ValueError, match="at most"):
        signal.shape_from("1000x10000x10000", fitted)


# --- what is refused


def with_pose(change) -> Scene:
    scene = ball_scene()
    poses = scene.poses.copy()
    change(poses[2])
    return replace(scene, poses=poses)


def set_nan(pose):
    pose[0, 3] = np.nan


def flatten(pose):
    pose[:3, 0] = 0


def mirror(pose):
    pose[:3, 0] *= -1


def scale(pose):
    pose[:3, :3] *= 2


@pytest.mark.parametrize("change", [set_nan, flatten, mirror, scale])
def test_a_pose_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match="the pose of view 2 is no rotation and translation"):
        Radiance().samples(with_pose(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((12, 4, 4), np.uint8)}, "pictures of a scene are uint8"),
        ({"images": np.zeros((12, 4, 4, 3), np.float32)}, "pictures of a scene are uint8"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "pictures of a scene are uint8"),
        ({"poses": np.zeros((3, 4, 4))}, "12 pictures need as many poses"),
        ({"camera_angle_x": 0.0}, "camera_angle_x is an angle"),
        ({"camera_angle_x": math.nan}, "camera_angle_x is an angle"),
        ({"heldout": np.ones(12, bool)}, "none is left to train on"),
    ],
)
def test_a_scene_that_is_none_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Radiance().samples(replace(ball_scene(), **change))
    with pytest.raises(ValueError, match="a scene is a `Scene`"):
        Radiance().samples(np.zeros((4, 4)))


def test_poses_of_another_convention_are_noticed():
    """World to camera, and cameras that look along +z: two common mistakes."""
    scene = ball_scene()
    for poses in (np.linalg.inv(scene.poses), scene.poses @ np.diag([1.0, -1, -1, 1])):
        with pytest.raises(ValueError, match=r"looking down -z|lies outside the box"):
            Radiance(bound=1.5).samples(replace(scene, poses=poses))


def test_a_cube_that_is_too_small_is_noticed():
    with pytest.raises(ValueError, match=r"lies outside the box .* up to signal\.bound=0\.3"):
        Radiance(bound=0.3).samples(ball_scene(centre=(0, 0, 0)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"channels": 3}, "a radiance field has 4"), ({"points": 0}, "above 0"), ({"holdout": 1}, "hold back every view")],
)
def test_keys_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Radiance(**keys)
