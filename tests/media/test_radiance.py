"""Scenes as files: both layouts of Blender's NeRF data, hostile ones, and views as PNG and GIF."""

import io
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from nfscale.media import MEDIA
from nfscale.media.radiance import MAX_TEST_VIEWS, MAX_VIEWS
from nfscale.media.render import orbit_pose
from nfscale.signals import Radiance

MEDIUM = MEDIA["radiance"]
SIZE = 8


def picture(value: int = 0, mode: str = "RGBA", size: int = SIZE) -> Image.Image:
    array = np.random.default_rng(value).integers(0, 256, (size, size, 4)).astype(np.uint8)
    array[..., 3] = 255
    return Image.fromarray(array).convert(mode)


def frames_of(count: int, folder: str = "train", first: int = 0) -> list[dict[str, Any]]:
    poses = [orbit_pose(0.5 * number, 0.4, 4.0) for number in range(first, first + count)]
    return [{"file_path": f"./{folder}/r_{n}", "transform_matrix": p.tolist()} for n, p in enumerate(poses)]


def write(root: Path, name: str, frames: list[dict[str, Any]], **more: Any) -> None:
    """A camera file with the pictures of its frames."""
    (root / name).write_text(json.dumps({"camera_angle_x": 0.3, "frames": frames} | more))
    for number, frame in enumerate(frames):
        path = root / f"{frame['file_path']}.png"
        path.parent.mkdir(exist_ok=True)
        picture(number).save(path)


def beside_of(root: Path):
    def beside(relative: str) -> BinaryIO:
        assert ".." not in relative
        assert not relative.startswith("/")
        return (root / relative).open("rb")

    return beside


def read(root: Path, name: str = "transforms.json"):
    with (root / name).open("rb") as stream:
        return MEDIUM.read(stream, f"scene/{name}", beside_of(root))


# --- both layouts


def test_one_camera_file_leaves_the_signal_to_choose_what_is_held_back(tmp_path):
    write(tmp_path, "transforms.json", frames_of(9))
    scene = read(tmp_path)
    assert (scene.images.shape, scene.images.dtype) == ((9, SIZE, SIZE, 4), np.uint8)
    assert not scene.heldout.any()
    np.testing.assert_array_equal(scene.images[3], np.asarray(picture(3)))
    np.testing.assert_allclose(scene.poses[3], orbit_pose(1.5, 0.4, 4.0))
    assert Radiance().measures(scene)["views_heldout"] == 1
    assert Radiance().samples(scene).heldout is not None


def test_test_views_are_held_back(tmp_path):
    write(tmp_path, "transforms_train.json", frames_of(5))
    write(tmp_path, "transforms_test.json", frames_of(3, "test", first=7))
    scene = read(tmp_path, "transforms_train.json")
    assert scene.heldout.tolist() == [False] * 5 + [True] * 3
    np.testing.assert_allclose(scene.poses[5], orbit_pose(3.5, 0.4, 4.0))
    (tmp_path / "transforms_test.json").unlink()
    assert not read(tmp_path, "transforms_train.json").heldout.any()


def test_of_many_test_views_some_are_taken_all_over(tmp_path):
    write(tmp_path, "transforms_train.json", frames_of(2))
    write(tmp_path, "transforms_test.json", frames_of(50, "test"))
    scene = read(tmp_path, "transforms_train.json")
    assert scene.heldout.sum() == MAX_TEST_VIEWS
    assert len({pose.tobytes() for pose in scene.poses[2:]}) == MAX_TEST_VIEWS
    np.testing.assert_allclose(scene.poses[2], orbit_pose(0.5, 0.4, 4.0))


def test_a_focal_length_in_pixels_is_an_angle(tmp_path):
    write(tmp_path, "transforms.json", frames_of(2), camera_angle_x=None, fl_x=SIZE / 2 / math.tan(0.4), w=SIZE, cx=4)
    assert read(tmp_path).camera_angle_x == pytest.approx(0.8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ""])
@pytest.mark.parametrize("write_as", ["train/{}{}", "./train/{}{}", "train\\{}{}"])
def test_pictures_are_found_as_exporters_name_them(tmp_path, suffix, write_as):
    frames = frames_of(2)
    for number, frame in enumerate(frames):
        frame["file_path"] = write_as.format(f"frame.{number}", suffix)
        (tmp_path / "train").mkdir(exist_ok=True)
        picture(number, "RGB").save(tmp_path / "train" / f"frame.{number}{suffix or '.png'}")
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.3, "frames": frames}))
    assert read(tmp_path).images.shape == (2, SIZE, SIZE, 3)


def test_grey_sixteen_bit_and_mixed_pictures_are_converted(tmp_path):
    write(tmp_path, "transforms.json", frames_of(5))
    for number, mode in enumerate(("L", "LA", "RGB", "1")):
        picture(number, "L" if mode == "1" else mode).convert(mode).save(tmp_path / f"train/r_{number}.png")
    deep = np.random.default_rng(0).integers(0, 1 << 16, (SIZE, SIZE)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "train/r_4.png")
    scene = read(tmp_path)
    assert scene.images.shape == (5, SIZE, SIZE, 4)
    grey = np.asarray(picture(0, "L"))
    np.testing.assert_array_equal(scene.images[0], np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    np.testing.assert_array_equal(scene.images[4, ..., 0], deep >> 8)


# --- hostile files


def broken(**change: Any) -> bytes:
    said = {"camera_angle_x": 0.3, "frames": frames_of(2)} | change
    return json.dumps({key: value for key, value in said.items() if value is not ...}).encode()


def frame(**change: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in (frames_of(1)[0] | change).items() if value is not ...}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the camera file is empty"),
        (b"  \n", "the camera file is empty"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "no list `frames`"),
        (b"{}", "no list `frames`"),
        (broken(frames={"a": 1}), "no list `frames`"),
        (broken(frames=[]), "lists no frames"),
        (broken(frames=[0] * (MAX_VIEWS + 1)), "at most 4096"),
        (broken(frames=[3]), "frame 0 has no file_path"),
        (broken(camera_angle_x=...), "neither camera_angle_x"),
        (broken(camera_angle_x="wide"), "camera_angle_x of the camera file is no finite number"),
        (broken(camera_angle_x=math.nan), "camera_angle_x of the camera file is no finite number"),
        (broken(camera_angle_x=10**400), "camera_angle_x of the camera file is no finite number"),
        (broken(camera_angle_x=-1), "field of view is out of range"),
        (broken(camera_angle_x=..., fl_x=0), "field of view is out of range"),
        (broken(k1=0.1), "lens distortion"),
        (broken(fl_x=10, fl_y=20), "pixels are not square"),
        (broken(cx=1, w=100), "not in the middle"),
        (broken(frames=frame(file_path=...)), "frame 0 has no file_path"),
        (broken(frames=frame(file_path=7)), "frame 0 has no file_path"),
        (broken(frames=frame(file_path="../../etc/passwd")), "leads out of the scene's folder"),
        (broken(frames=frame(file_path="/etc/passwd")), "leads out of the scene's folder"),
        (broken(frames=frame(file_path="a\\..\\..\\b")), "leads out of the scene's folder"),
        (broken(frames=frame(file_path="C:\\x.png")), "leads out of the scene's folder"),
        (broken(frames=frame(file_path="")), "leads out of the scene's folder"),
        (broken(frames=frame(transform_matrix=...)), "not 4 x 4 numbers"),
        (broken(frames=frame(transform_matrix=[[1, 0], [0, 1]])), "not 4 x 4 numbers"),
        (broken(frames=frame(transform_matrix=[[1, 0, 0, 0], [1]])), "not 4 x 4 numbers"),
        (broken(frames=frame(transform_matrix=[["a"] * 4] * 4)), "not 4 x 4 numbers"),
        (broken(frames=frame(transform_matrix=[[10**400] * 4] * 4)), "not 4 x 4 numbers"),
        (broken(frames=frame(transform_matrix=[[math.nan] * 4] * 4)), "NaN or infinite"),
        (broken(frames=frame(file_path="nowhere/r_0")), "the picture of view 0 is missing: nowhere/r_0.png"),
    ],
)
def test_a_camera_file_that_lies_is_refused_in_a_sentence(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        MEDIUM.read(io.BytesIO(content), "transforms.json", beside_of(tmp_path))
    assert "\n" not in str(error.value)


def test_pictures_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    write(tmp_path, "transforms.json", frames_of(3))
    (tmp_path / "train/r_1.png").write_bytes((tmp_path / "train/r_1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"the picture of view 1, train/r_1.png: "):
        read(tmp_path)
    picture(1, size=4).save(tmp_path / "train/r_1.png")
    with pytest.raises(ValueError, match="view 1 has another size than the first: 4 x 4 against 8 x 8 pixels"):
        read(tmp_path)


def test_scenes_too_large_are_refused_before_more_is_read(tmp_path):
    Image.new("L", (4096, 4096)).save(tmp_path / "large.png")
    frames = [one | {"file_path": "large.png"} for one in frames_of(40)]
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.3, "frames": frames}))
    with pytest.raises(ValueError, match="too large: 40 views of 4096 x 4096 pixels"):
        read(tmp_path)


def test_test_views_of_another_lens_are_refused(tmp_path):
    write(tmp_path, "transforms_train.json", frames_of(2))
    write(tmp_path, "transforms_test.json", frames_of(2, "test"), camera_angle_x=0.9)
    with pytest.raises(ValueError, match="another field of view"):
        read(tmp_path, "transforms_train.json")


# --- views


VIEWS = np.random.default_rng(0).random((3, 10, 12, 3)).astype(np.float32)


def test_views_are_written_as_a_sheet_an_animation_and_numbers(tmp_path):
    for name in ("views.png", "VIEWS.GIF", "views.npy"):
        assert Path(name).suffix.lower() in MEDIUM.written
        MEDIUM.write(VIEWS, tmp_path / name)
    sheet = np.asarray(Image.open(tmp_path / "views.png"))[..., :3]
    np.testing.assert_array_equal(sheet[:, 12:24], np.rint(VIEWS[1] * 255))
    with Image.open(tmp_path / "VIEWS.GIF") as turn:
        assert (turn.n_frames, turn.size, turn.info["loop"]) == (3, (12, 10), 0)
    np.testing.assert_array_equal(np.load(tmp_path / "views.npy"), VIEWS)


def test_similarity_is_one_for_equal_views_and_less_for_others():
    assert MEDIUM.measurable(VIEWS)
    assert not MEDIUM.measurable(VIEWS[:, :5])
    assert MEDIUM.measures(VIEWS, VIEWS) == {"ssim": pytest.approx(1.0)}
    assert MEDIUM.measures(VIEWS, 1 - VIEWS)["ssim"] < 0.5


def test_a_page_shows_a_view_its_error_and_the_others():
    asked = []
    panels = MEDIUM.panels(VIEWS, VIEWS * 0.9, lambda shape: asked.append(shape) or VIEWS)
    assert asked == ["16x64x64"], "a turn around the scene"
    sizes = [Image.open(io.BytesIO(panel.content)).size for panel in panels]
    assert sizes == [(192, 160)] * 3 + [(24, 20), (12, 10)]
    assert Image.open(io.BytesIO(panels[-1].content)).n_frames == len(VIEWS)
    assert len(MEDIUM.panels(VIEWS[:1], VIEWS[:1], lambda shape: VIEWS)) == 4
