"""Scenes with the cameras of COLMAP and LLFF: fixtures by the published formats, round trips, and files that lie."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nfscale.datasets.folder import Folder
from nfscale.engine import Stop, fit
from nfscale.fields import MLP
from nfscale.media import llff
from nfscale.media.base import nothing_beside
from nfscale.media.radiance import RadianceMedium
from nfscale.media.render import orbit_pose
from nfscale.optim import Adam, Schedule
from nfscale.signals import Radiance, Samples
from nfscale.signals.radiance import quaternion_of
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job

SIZE = 12
ANGLE = 0.7
FOCAL = SIZE / 2 / np.tan(ANGLE / 2)
VIEWS = 9
POSES = np.stack([orbit_pose(0.7 * n, 0.4 + 0.02 * n, 4.0) for n in range(VIEWS)])
POINTS = np.random.default_rng(0).uniform([-0.5, -0.4, -0.3], [0.5, 0.4, 0.3], (400, 3)) + 2
OFF = np.array([2.0, 2.0, 2.0])
"""The scene lies around (2, 2, 2), outside the cube in which scenes are looked for otherwise."""


def moved() -> np.ndarray:
    poses = POSES.copy()
    poses[:, :3, 3] += OFF
    return poses


def pictures(folder: Path, mode: str = "RGBA", size: int = SIZE, name: str = "view_{:03d}.png") -> None:
    """A disc that covers the middle of each view, transparent around."""
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.indices((size, size)) - size / 2 + 0.5
    for number in range(VIEWS):
        array = np.full((size, size, 4), [200, 30 + 10 * number, 60, 255], np.uint8)
        array[row**2 + column**2 > (0.2 * size) ** 2] = [9, 99, 199, 0]
        Image.fromarray(array).convert(mode).save(folder / name.format(number))


def world_to_camera(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COLMAP's quaternion and translation of a camera that looks down its -z."""
    rotation = (pose[:3, :3] @ np.diag([1, -1, -1])).T
    return quaternion_of(rotation), -rotation @ pose[:3, 3]


def write_colmap(
    folder: Path, poses=None, model: str = "PINHOLE", more=(), points=POINTS, is_text=True, size=SIZE, focal=FOCAL
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    poses = moved() if poses is None else poses
    focals = [focal] if model.startswith("SIMPLE") else [focal, focal]
    parameters = [*focals, size / 2, size / 2, *more]
    taken = [world_to_camera(pose) for pose in poses]
    order = np.random.default_rng(0).permutation(len(poses))  # files are in no order
    if is_text:
        said = f"# Camera list\n#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n7 {model} {size} {size} "
        (folder / "cameras.txt").write_text(said + " ".join(map(repr, map(float, parameters))) + "\n")
        lines = ["# Image list with two lines of data per image:"]
        for n in order:
            numbers = " ".join(repr(float(one)) for one in (*taken[n][0], *taken[n][1]))
            lines += [f"{n + 1} {numbers} 7 view_{n:03d}.png", "" if n % 2 else "1.5 2.5 -1 3.5 4.5 17"]
        (folder / "images.txt").write_text("\n".join(lines) + "\n")
        rows = [f"{n} {x!r} {y!r} {z!r} 1 2 3 0.5 1 0 2 0" for n, (x, y, z) in enumerate(np.asarray(points).tolist())]
        (folder / "points3D.txt").write_text("# 3D point list\n" + "\n".join(rows))
        return
    numbers = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "OPENCV": 4}
    content = struct.pack("<QiiQQ", 1, 7, numbers[model], size, size)
    (folder / "cameras.bin").write_bytes(content + struct.pack(f"<{len(parameters)}d", *parameters))
    content = struct.pack("<Q", len(poses))
    for n in order:
        content += struct.pack("<i7di", n + 1, *taken[n][0], *taken[n][1], 7) + f"view_{n:03d}.png".encode() + b"\0"
        content += struct.pack("<Q", n % 3) + struct.pack("<ddq", 1.5, 2.5, -1) * (n % 3)
    (folder / "images.bin").write_bytes(content)
    content = struct.pack("<Q", len(points))
    for n, point in enumerate(points):
        content += struct.pack("<Q3d3BdQ", n, *point, 1, 2, 3, 0.5, n % 4) + struct.pack("<ii", 1, 2) * (n % 4)
    (folder / "points3D.bin").write_bytes(content)


def llff_rows(poses: np.ndarray, near: float = 2.0, far: float = 6.0, size=SIZE, focal=FOCAL) -> np.ndarray:
    """float64 [V, 17], by LLFF's convention: columns down, right, backwards, place, (height, width, focal)."""
    right, up, back, place = (poses[:, :3, column] for column in range(4))
    sizes = np.tile([float(size), size, focal], (len(poses), 1))
    matrices = np.stack([-up, right, back, place, sizes], axis=2)
    return np.concatenate([matrices.reshape(-1, 15), np.tile([near, far], (len(poses), 1))], axis=1)


def only(path: Path, pattern: str | None = None):
    dataset = Folder(str(path), pattern, modality="radiance").open()
    (datum,) = (dataset.read(position) for position in range(len(dataset.ids)))
    assert datum.error is None, datum.error
    return datum


def assert_cameras(scene, poses: np.ndarray) -> None:
    np.testing.assert_allclose(scene.poses, poses, atol=1e-9)
    assert scene.camera_angle_x == pytest.approx(ANGLE, rel=1e-9)
    assert scene.images[:, SIZE // 2, SIZE // 2, 1].tolist() == [30 + 10 * n for n in range(VIEWS)]


# --- what the formats say


def test_a_line_of_colmap_by_hand(tmp_path):
    """The camera at (0, 0, -5), looking along the world's z: COLMAP's identity, five ahead of the origin."""
    pictures(tmp_path / "images", "RGB", name="view_{:03d}.png")
    sparse = tmp_path / "sparse/0"
    sparse.mkdir(parents=True)
    (sparse / "cameras.txt").write_text("1 SIMPLE_PINHOLE 12 12 9 6 6\n")
    (sparse / "images.txt").write_text(
        "1 1 0 0 0 0 0 5 1 view_000.png\n\n2 0.7071068 0 0.7071068 0 0 0 5 1 view_001.png\n\n"
    )
    scene = only(tmp_path, "**/images.txt").content
    np.testing.assert_allclose(scene.poses[0], [[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, -5], [0, 0, 0, 1]], atol=1e-7)
    # A turn by 90 degrees about y, world to camera: the world's x is ahead no more, its -x is.
    np.testing.assert_allclose(-scene.poses[1][:3, 2], [-1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scene.poses[1][:3, 3], [5, 0, 0], atol=1e-6)
    assert scene.camera_angle_x == pytest.approx(2 * np.arctan(6 / 9))
    assert (scene.box, scene.near) == (None, 0)


def test_a_row_of_llff_by_hand():
    """At the origin, looking along the world's -z, x to the right, y up: down is -y, right is x, backwards is z."""
    row = [0, 1, 0, 7, 30, -1, 0, 0, 8, 40, 0, 0, 1, 9, 50, 0.5, 3]
    buffer = io.BytesIO()
    np.save(buffer, np.array([row], dtype=np.float64))
    cameras = llff.read_cameras(io.BytesIO(buffer.getvalue()))
    expected = np.eye(4)
    expected[:3, 3] = [7, 8, 9]
    np.testing.assert_array_equal(cameras.poses[0], expected)
    assert (cameras.height, cameras.width, cameras.focal) == (30, 40, 50)
    assert cameras.depths.tolist() == [[0.5, 3]]


# --- round trips


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "OPENCV"])
@pytest.mark.parametrize("place", ["sparse/0", "sparse", "."])
def test_colmaps_cameras_come_back(tmp_path, is_text, model, place):
    pictures(tmp_path / "images")
    bends = {"SIMPLE_RADIAL": [0.0], "OPENCV": [0.0] * 4}.get(model, [])
    write_colmap(tmp_path / place, model=model, more=bends, is_text=is_text)
    scene = only(tmp_path).content
    assert_cameras(scene, moved())
    np.testing.assert_allclose(scene.box[:3], OFF, atol=0.05)
    np.testing.assert_allclose(scene.box[3:], [0.55, 0.44, 0.33], atol=0.02)
    assert 2.5 < scene.near < 3.6  # the points reach up to 0.7 from the middle, which is 4 from the cameras


@pytest.mark.parametrize("folder", ["images", "images_4"])
def test_llffs_cameras_come_back(tmp_path, folder, monkeypatch):
    shrunk = 4 if folder == "images_4" else 1
    pictures(tmp_path / folder, size=SIZE // shrunk, name="IMG_{:04d}.png")
    (tmp_path / folder / "notes.txt").write_text("not a picture")
    np.save(tmp_path / "poses_bounds.npy", llff_rows(POSES))
    scene = only(tmp_path).content
    np.testing.assert_allclose(scene.poses, POSES, atol=1e-12)
    assert scene.camera_angle_x == pytest.approx(ANGLE)
    assert scene.images.shape[1:3] == (SIZE // shrunk, SIZE // shrunk)
    assert scene.near == pytest.approx(2 / 1.1)
    for pose in POSES:  # all that is between the depths, in the corners of a view too, is in the box
        for depth in (2.0, 6.0):
            corner = pose[:3, :3] @ (depth * np.array([np.tan(ANGLE / 2), -np.tan(ANGLE / 2), -1])) + pose[:3, 3]
            assert (np.abs(corner - scene.box[:3]) <= scene.box[3:] + 1e-9).all()


def test_large_pictures_of_llff_are_left_for_the_smaller_ones(tmp_path, monkeypatch):
    for number, folder in enumerate(("images", "images_2")):
        pictures(tmp_path / folder, size=SIZE >> number)
    np.save(tmp_path / "poses_bounds.npy", llff_rows(POSES))
    assert only(tmp_path).content.images.shape[1] == SIZE
    monkeypatch.setattr("nfscale.media.radiance.MAX_SCENE_PIXELS", VIEWS * SIZE * SIZE - 1)
    assert only(tmp_path).content.images.shape[1] == SIZE // 2


def test_one_scene_in_all_formats_gives_the_same_rays(tmp_path):
    """Of the same cube, since what the box is said by differs."""
    for name in ("blender", "text", "binary", "llff"):
        pictures(tmp_path / name / "images")
    frames = [{"file_path": f"images/view_{n:03d}", "transform_matrix": pose.tolist()} for n, pose in enumerate(POSES)]
    (tmp_path / "blender/transforms.json").write_text(json.dumps({"camera_angle_x": ANGLE, "frames": frames}))
    write_colmap(tmp_path / "text/sparse", POSES, points=[])
    write_colmap(tmp_path / "binary/sparse", POSES, points=[], is_text=False)
    np.save(tmp_path / "llff/poses_bounds.npy", llff_rows(POSES))
    dataset = Folder(str(tmp_path), modality="radiance").open()
    scenes = [dataset.read(position).content for position in range(4)]
    object.__setattr__(scenes[2], "box", None)
    object.__setattr__(scenes[2], "near", 0.0)
    assert dataset.ids[2] == "llff/poses_bounds.npy"
    signal = Radiance(bound=1.0, holdout=4)
    first, *others = (signal.samples(scene) for scene in scenes)
    for other in others:
        torch.testing.assert_close(other.coordinates, first.coordinates, atol=1e-5, rtol=0)
        assert torch.equal(other.values, first.values)


# --- what the data say of near and far


def test_rays_begin_where_the_scene_does_and_decode_from_the_same_place(tmp_path):
    pictures(tmp_path / "images", "RGB")
    np.save(tmp_path / "poses_bounds.npy", llff_rows(POSES, 3.3, 4.4))
    scene, signal = only(tmp_path).content, Radiance(holdout=4)
    samples = signal.samples(scene)
    rays = samples.heldout.coordinates.numpy().astype(np.float64)
    half = scene.box[3:]
    points = (rays[:, :3] + rays[:, 6:7] * rays[:, 3:6]) * half + scene.box[:3]
    held = np.repeat(np.arange(VIEWS)[np.arange(VIEWS) % 4 == 2], SIZE * SIZE)
    depths = -np.einsum("nj,nj->n", points - POSES[held, :3, 3], POSES[held, :3, 2])
    meets = rays[:, 7] > rays[:, 6]
    assert meets.mean() > 0.9
    assert depths[meets].min() > 3 - 1e-4
    assert depths[meets].min() == pytest.approx(3.0, abs=1e-3)
    shape = signal.shape_of({name: float(np.float32(value)) for name, value in signal.measures(scene).items()})
    again = signal.coordinates(shape).numpy()
    np.testing.assert_allclose(again, rays[: len(again)], atol=1e-4)
    turned = signal.shape_from("5x6x7", shape)
    assert len(signal.coordinates(turned)) == 5 * 6 * 7
    assert turned[-1] == shape[-1] == pytest.approx(3.0)
    assert signal.shape_from("6x7", shape)[3:] == shape[3:]


# --- transparent backgrounds


def test_before_a_random_background_the_loss_is_the_mean_over_backgrounds():
    draw = torch.Generator().manual_seed(0)
    signal = Radiance(background="random")
    predicted, values = torch.rand(2, 50, 4, generator=draw), torch.rand(2, 50, 4, generator=draw)
    samples = Samples(torch.zeros(2, 50, 8), values)
    behind = torch.rand(4000, 1, 1, 3, generator=draw)
    seen = [one[..., :3] + (1 - one[..., 3:]) * behind for one in (predicted, values)]
    expected = (seen[0] - seen[1]).square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(signal.loss(predicted, samples), expected, rtol=0.02, atol=0)
    on_white = [one[..., :3] + 1 - one[..., 3:] for one in (predicted, values)]
    psnr = -10 * torch.log10((on_white[0] - on_white[1]).square().mean(dim=(1, 2)))
    torch.testing.assert_close(signal.quality(predicted, samples), psnr)


def test_a_field_learns_opacity_before_a_random_background(tmp_path):
    """On white a field may paint what is transparent white; before random backgrounds it has to be clear."""
    pictures(tmp_path / "images")
    frames = [{"file_path": f"images/view_{n:03d}", "transform_matrix": pose.tolist()} for n, pose in enumerate(POSES)]
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": ANGLE, "frames": frames}))
    scene = only(tmp_path).content
    signal = Radiance(bound=1.0, background="random", holdout=4)
    field, adam = MLP(3, 4, width=32, depth=2, omega_0=5), Adam(5e-3, Schedule("constant"))
    how = {"optimizer": adam, "stop": Stop(200, check_every=100), "seed": 0, "samples": 256, "device": "cpu"}
    (fitted,) = fit(field, signal, [("disc", signal.samples(scene))], **how)
    assert fitted.quality > fitted.history_quality[0] + 5
    shape = signal.shape_of(signal.measures(scene))
    rays = signal.coordinates(shape)[None]
    samples = signal.samples(scene)
    params = field.layout.unravel(fitted.weights[None])
    predicted = signal.predict(lambda at: field.apply(params, at), samples.check.map(lambda t: t[None]))
    opacity, wanted = predicted[0, :, 3], samples.check.values[:, 3]
    assert (opacity - wanted).abs().mean() < 0.15
    views = signal.reconstruct(torch.zeros(1, rays.shape[1], 4), shape)
    assert (views == 1).all(), "what is clear is shown on white"
    assert signal.original(scene).shape == views.shape[1:]


# --- files that lie


def spoiled(folder: Path, name: str, change) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(change(content))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


HUGE = struct.pack("<Q", 1 << 60)
MILLION = npy(np.zeros((9, 17))).replace(b"(9, 17)", b"(999999, 17)")
MIRRORED = llff_rows(POSES) * np.where((np.arange(17) % 5 == 1) & (np.arange(17) < 15), -1, 1)
HOSTILE = {
    "binary/images that end early": ("images.bin", lambda b: b[:-9], "ends early"),
    "binary/more images than there are": ("images.bin", lambda b: HUGE + b[8:], "at most 4,096"),
    "binary/more points of an image than there are": ("images.bin", lambda b: b[:85] + HUGE + b[93:], "truncated"),
    "binary/a name without end": ("images.bin", lambda b: b[:72] + b"x" * 40, "ends within a name"),
    "binary/no images": ("images.bin", lambda b: bytes(8), "has no images"),
    "binary/cameras of an unknown model": (
        "cameras.bin",
        lambda b: b[:12] + struct.pack("<i", 99) + b[16:],
        "number 99",
    ),
    "binary/cameras of a fisheye": (
        "cameras.bin",
        lambda b: b[:12] + struct.pack("<i", 5) + b[16:] + bytes(32),
        "OPENCV_FISHEYE",
    ),
    "binary/cameras that end early": ("cameras.bin", lambda b: b[:20], "ends early"),
    "binary/more points than there are": ("points3D.bin", lambda b: HUGE + b[8:], "truncated"),
    "binary/a quaternion of zeros": ("images.bin", lambda b: b[:12] + bytes(32) + b[44:], "no unit quaternion"),
    "binary/a place that is no number": (
        "images.bin",
        lambda b: b[:44] + struct.pack("<d", np.nan) + b[52:],
        "no unit quaternion",
    ),
    "text/not text": ("images.txt", lambda b: b"\xff\xfe" * 40, "not UTF-8"),
    "text/a short line": ("images.txt", lambda b: b"1 2 3\n\n", "cannot read a line"),
    "text/words for numbers": ("cameras.txt", lambda b: b"7 PINHOLE wide high 1 2 3 4\n", "cannot read a line"),
    "text/distortion": ("cameras.txt", lambda b: b"7 SIMPLE_RADIAL 12 12 16 6 6 0.2\n", "lens distortion"),
    "text/long pixels": ("cameras.txt", lambda b: b"7 PINHOLE 12 12 16 32 6 6\n", "not square"),
    "text/an axis aside": ("cameras.txt", lambda b: b"7 PINHOLE 12 12 16 16 0 6\n", "not in the middle"),
    "text/a negative focal length": ("cameras.txt", lambda b: b"7 PINHOLE 12 12 -16 -16 6 6\n", "focal length"),
    "text/too few parameters": ("cameras.txt", lambda b: b"7 PINHOLE 12 12 16\n", "has 4 parameters"),
    "text/another camera": ("cameras.txt", lambda b: b"8 PINHOLE 12 12 16 16 6 6\n", "camera 7, which is not there"),
    "text/a way out": ("images.txt", lambda b: b.replace(b"view_", b"../../../../etc/view_"), "leads out of"),
    "text/points of words": ("points3D.txt", lambda b: b"1 a b c 1 2 3 0\n", "cannot read the file of points"),
    "text/points at infinity": ("points3D.txt", lambda b: b"1 1e300 -1e300 0 1 2 3 0\n" * 60, "no box"),
    "text/no pictures": ("images.txt", lambda b: b.replace(b"view_", b"other_"), "neither in images nor beside"),
    "llff/pickle": ("poses_bounds.npy", lambda b: npy(np.array([{}], dtype=object)), "expected floats"),
    "llff/another shape": ("poses_bounds.npy", lambda b: npy(np.zeros((9, 15))), "expected floats"),
    "llff/more views than there are": ("poses_bounds.npy", lambda b: npy(np.zeros((3000, 17)))[:900], "fewer numbers"),
    "llff/a million views": (
        "poses_bounds.npy",
        lambda b: MILLION,
        "expected floats",
    ),
    "llff/not a number": ("poses_bounds.npy", lambda b: npy(np.full((9, 17), np.nan)), "NaN"),
    "llff/depths backwards": ("poses_bounds.npy", lambda b: npy(llff_rows(POSES, 3, 2)), "depths"),
    "llff/sizes of zero": ("poses_bounds.npy", lambda b: npy(0 * llff_rows(POSES)), "one size"),
    "llff/mirrored": (
        "poses_bounds.npy",
        lambda b: npy(MIRRORED),
        "no rotation",
    ),
    "llff/another count": ("poses_bounds.npy", lambda b: npy(llff_rows(POSES[:7])), "7 cameras"),
    "llff/empty": ("poses_bounds.npy", lambda b: b"", "magic string"),
}


def test_hostile_cameras_are_rows_with_reasons(tmp_path):
    """One run over all of them, and good scenes between."""
    data = tmp_path / "data"
    for number, (title, (name, change, _)) in enumerate(HOSTILE.items()):
        scene = data / f"{number:02d}"
        pictures(scene / "images", "RGB")
        if title.startswith("llff"):
            np.save(scene / "poses_bounds.npy", llff_rows(POSES))
        else:
            write_colmap(scene, is_text=title.startswith("text"))
        spoiled(scene, name, change)
    for name in ("good-text", "good-binary", "good-llff"):
        pictures(data / name / "images", "RGB")
    write_colmap(data / "good-text")
    write_colmap(data / "good-binary", is_text=False)
    np.save(data / "good-llff/poses_bounds.npy", llff_rows(POSES))
    sections = {
        "dataset": {"kind": "folder", "path": str(data)},
        "signal": {"kind": "radiance", "points": 4},
        "field": {"kind": "mlp", "width": 8, "depth": 2},
        "optimizer": {"kind": "adam"},
        "max_failed_fraction": 1.0,
    }
    folder, _ = encode_in_process(tiny_job(tmp_path / "run", "fit.samples=32", "fit.max_steps=20", **sections))
    rows = open_weights(str(folder)).to_arrow(["datum_id", "status", "reason"]).to_pylist()
    found = {row["datum_id"].split("/")[0]: row for row in rows}
    for number, (title, (_, _, reason)) in enumerate(HOSTILE.items()):
        row = found.pop(f"{number:02d}")
        assert row["status"] == "decode_error", (title, row)
        assert reason in row["reason"], (title, row["reason"])
        assert str(tmp_path) not in row["reason"]
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(found, "max_steps")
    assert len(found) == 3


def test_llff_without_a_folder_to_list_says_so():
    with pytest.raises(ValueError, match="no folder of them to list"):
        RadianceMedium().read(io.BytesIO(npy(llff_rows(POSES))), "poses_bounds.npy", nothing_beside)
