"""Rendered scenes: the renderer against closed forms, the cache, the shipped set where it can be had."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfscale.datasets.folder import Folder
from nfscale.datasets.scenes import Scenes, catalogue_of
from nfscale.errors import CallerError
from nfscale.job import load_job
from nfscale.media import MEDIA
from nfscale.media.render import CAMERA_ANGLE_X, ViewSettings, load_surface, orbit_pose, render_scene, view_of
from nfscale.media.render import test_poses as poses_of_tests
from nfscale.media.render import train_poses as poses_of_training
from nfscale.signals import Radiance
from tests.media.test_cameras import llff_rows, write_colmap

ROOT = Path(__file__).resolve().parents[2]
TINY = ViewSettings(size=32, train=4, test=2)

pytest.importorskip("trimesh")
pytest.importorskip("embreex")

QUAD = """mtllib quad.mtl
v -1 -1 0
v 1 -1 0
v 1 1 0
v -1 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
vn 0 0 1
usemtl picture
f 1/1/1 2/2/1 3/3/1
f 1/1/1 3/3/1 4/4/1
"""


@pytest.fixture
def quad(tmp_path) -> Path:
    """An upright square with a picture of four colours: top left red, top right green, below blue and transparent."""
    picture = np.zeros((2, 2, 4), dtype=np.uint8)
    picture[0, 0], picture[0, 1], picture[1, 0] = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)
    Image.fromarray(picture.repeat(32, axis=0).repeat(32, axis=1)).save(tmp_path / "quad.png")
    (tmp_path / "quad.mtl").write_text("newmtl picture\nKd 1 1 1\nmap_Kd quad.png\n")
    (tmp_path / "quad.obj").write_text(QUAD)
    return tmp_path / "quad.obj"


# --- the renderer


def test_cameras_look_at_the_origin_with_z_up():
    for pose in [*poses_of_training(20), *poses_of_tests(5)]:
        np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        np.testing.assert_allclose(pose[:3, 2], pose[:3, 3] / np.linalg.norm(pose[:3, 3]), atol=1e-12)
        assert pose[2, 1] > 0
    assert len({pose.tobytes() for pose in [*poses_of_training(48), *poses_of_tests(8)]}) == 56


def test_a_textured_square_is_seen_upright_and_see_through_where_its_picture_is(quad):
    """Facing -y after it is turned upright; a camera on that side sees the picture as it is."""
    front = orbit_pose(-math.pi / 2, 0.0, 3.0)
    view = view_of(load_surface(quad, 64), front, TINY)
    middle, off = 16, 4
    assert view[middle - off, middle - off, :3].argmax() == 0
    assert view[middle - off, middle + off, :3].argmax() == 1
    assert view[middle + off, middle - off, :3].argmax() == 2
    assert view[middle + off, middle + off, 3] == 0
    assert (view[middle - off, middle - off : middle + off, 3] == 255).all()
    half = 16 / math.tan(CAMERA_ANGLE_X / 2) / 3 / math.sqrt(2)  # of the square, whose corners are at distance 1
    widest = (view[middle - off, :, 3] > 127).sum()
    assert widest == pytest.approx(2 * half, abs=1.5)


def test_a_ball_covers_what_geometry_says(tmp_path):
    import trimesh

    trimesh.creation.icosphere(subdivisions=4, radius=7).export(tmp_path / "ball.ply")
    view = view_of(load_surface(tmp_path / "ball.ply", 64), orbit_pose(1.0, 0.4, 3.0), TINY)
    focal = 16 / math.tan(CAMERA_ANGLE_X / 2)
    radius = focal * math.tan(math.asin(1 / 3))
    assert (view[..., 3] / 255).sum() == pytest.approx(math.pi * radius**2, rel=0.01)
    assert (view[view[..., 3] > 0][:, :3].std(axis=0) > 5).all(), "it is shaded"


def test_a_rendered_scene_is_read_and_fitted_as_any_other(quad, tmp_path):
    folder = tmp_path / "scene"
    folder.mkdir()
    render_scene(load_surface(quad, 64), folder, ViewSettings(size=32, train=24, test=2))
    said = json.loads((folder / "transforms_test.json").read_text())
    assert said["camera_angle_x"] == CAMERA_ANGLE_X
    with (folder / "transforms_train.json").open("rb") as stream:
        scene = MEDIA["radiance"].read(stream, "transforms_train.json", lambda relative: (folder / relative).open("rb"))
    assert scene.images.shape == (26, 32, 32, 4)
    assert scene.heldout.tolist() == [False] * 24 + [True] * 2
    said = Radiance(bound=1.0).measures(scene)
    half = [said[f"box_half_{axis}"] for axis in "xyz"]
    assert half[1] < half[0], "a square is flat"


def test_the_command_renders_a_folder_of_meshes_and_goes_on_after_a_bad_one(quad, tmp_path):
    (tmp_path / "bad.obj").write_text("v 1 2 3\n")
    command = [sys.executable, str(ROOT / "pipelines/render_scenes.py"), str(tmp_path), str(tmp_path / "scenes")]
    done = subprocess.run(
        [*command, "--size", "16", "--views", "2", "--test-views", "1"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "bad.obj" in done.stderr
    names = sorted(path.relative_to(tmp_path / "scenes").as_posix() for path in (tmp_path / "scenes").rglob("*.*"))
    assert names == [
        "quad/test/r_000.png",
        "quad/train/r_000.png",
        "quad/train/r_001.png",
        "quad/transforms_test.json",
        "quad/transforms_train.json",
    ]


# --- the shipped set


def test_a_catalogue_names_its_models():
    text = "id#1=x\nmodel#1=/a/b/chair.obj\ncategory#1=Office\nmodel#12=/a/c/bed.obj\ncategory#12=Bedroom\n"
    assert catalogue_of(text) == {"chair": ("a/b/chair.obj", "Office"), "bed": ("a/c/bed.obj", "Bedroom")}


def test_sizes_out_of_range_are_the_callers_mistake():
    with pytest.raises(CallerError, match=r"dataset\.test_views is from 1 to 16, got 17"):
        Scenes(test_views=17).open()


def test_the_set_is_whole_and_rendered_once(tmp_path, monkeypatch):
    from nfscale.datasets import scenes

    try:
        archive = scenes._PACKAGE.paths()
    except CallerError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(scenes.Package, "paths", lambda self: archive)
    monkeypatch.setenv("NFSCALE_CACHE", str(tmp_path))
    dataset = Scenes(size=16, views=3, test_views=2).open()
    assert len(set(dataset.ids)) == len(dataset.ids) == 175
    position = list(dataset.ids).index("oakChair")
    datum = dataset.read(position)
    assert (datum.id, datum.index, datum.label, datum.error) == ("oakChair", position, "Living room", None)
    (home,) = tmp_path.iterdir()
    assert [path.name for path in home.iterdir()] == ["oakChair"], "nothing else is left"
    before = (home / "oakChair" / "transforms_train.json").stat().st_mtime_ns
    dataset.read(position)
    assert (home / "oakChair" / "transforms_train.json").stat().st_mtime_ns == before


def test_the_job_that_ships_is_valid():
    job = load_job(ROOT / "pipelines/scenes.yaml")
    assert job.dataset.kind == job.name == "scenes"
    assert job.signal.kind == "radiance"


@pytest.mark.parametrize("form", ["text", "binary", "llff"])
def test_cameras_of_a_rendered_scene_come_back_from_colmap_and_llff(tmp_path, quad, form):
    """The pictures of the scene are written anew, with each format's cameras beside them."""
    (tmp_path / "rendered").mkdir()
    render_scene(load_surface(quad, 64), tmp_path / "rendered", TINY)
    (position, scene) = next(all_of(tmp_path / "rendered"))
    again = tmp_path / "again"
    (again / "images").mkdir(parents=True)
    for number, image in enumerate(scene.images):
        Image.fromarray(image).save(again / f"images/view_{number:03d}.png")
    focal = TINY.size / 2 / math.tan(scene.camera_angle_x / 2)
    if form == "llff":
        np.save(again / "poses_bounds.npy", llff_rows(scene.poses, 1.0, 5.0, size=TINY.size, focal=focal))
    else:
        write_colmap(again / "sparse/0", scene.poses, points=[], is_text=form == "text", size=TINY.size, focal=focal)
    (position, found) = next(all_of(again))
    assert position == 0
    np.testing.assert_allclose(found.poses, scene.poses, atol=1e-7)
    assert found.camera_angle_x == pytest.approx(scene.camera_angle_x, rel=1e-9)
    assert np.array_equal(found.images, scene.images)


def all_of(folder: Path):
    dataset = Folder(str(folder), modality="radiance").open()
    for position in range(len(dataset.ids)):
        datum = dataset.read(position)
        assert datum.error is None, datum.error
        yield position, datum.content
