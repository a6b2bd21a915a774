"""Scenes: posed pictures in the layouts of Blender's NeRF data, COLMAP and LLFF in; views out, as pictures or moving.

A scene is a folder with a file of cameras, which is the datum, and the pictures that it is of. Four forms are read:

- `transforms_train.json` with `transforms_test.json` beside it, as NeRF-synthetic has them. The test views are held
  back; of more than `MAX_TEST_VIEWS`, as many spread over them. `transforms_val.json` is not read.
- `transforms.json` alone, as exporters write it: the signal chooses which views to hold back.
- `images.bin` or `images.txt` of COLMAP, with `cameras` and `points3D` beside it and the pictures in `images`, where
  tools put them: the scene's box is that of the points.
- `poses_bounds.npy` of LLFF, with its pictures in `images` (or, smaller, `images_2`, `images_4`, `images_8`) by their
  sorted names: the box is that of what the cameras see between their depths.

There is no LPIPS among the measures: packages bring its small heads, and download the network below them.

Files are hostile: names of pictures may lead anywhere, so they are only opened through `beside`, which stays inside the
dataset, and are refused here already when they climb; counts and sizes are bounded before pictures are decoded.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from nfscale.media import colmap, llff, pictures
from nfscale.media.base import Beside, Decode, Listing, Panel
from nfscale.media.image import ImageMedium
from nfscale.signals.radiance import Scene

MAX_TEST_VIEWS = 16
"""Enough to measure; NeRF-synthetic has 200, which would take longer to read and to render than a fit."""

MAX_VIEWS = 4096
MAX_SCENE_PIXELS = 128 << 20
"""Of all views together: half a gigabyte in memory. NeRF-synthetic has 71 Mi (100 + 16 views of 800 x 800)."""

_MAX_JSON_BYTES = 32 << 20  # of 4,096 frames: 8 kB each, ten times what exporters write
_SSIM_WINDOW = 7  # pixels, the usual one
_SMALLEST_SIDE = 192  # that a view is enlarged to on a page
_COLUMNS = 8  # of a sheet of views
_TURN_SECONDS = 4.0  # of an animation
_TURN = "16x64x64"  # views around a scene on a page: a second to render at 16 points a ray
_FEWEST_POINTS = 50  # of a reconstruction that say how far it reaches
_DISTORTIONS = ("k1", "k2", "k3", "k4", "p1", "p2")


class RadianceMedium:
    """Content: a `signals.Scene`; decoded: views [V, H, W, 3] in [0, 1]."""

    suffixes = frozenset({"transforms.json", "transforms_train.json", "images.bin", "images.txt", "poses_bounds.npy"})
    written: tuple[str, ...] = (".png", ".gif", ".npy")
    panel_pixels = 160
    legend = (
        "a held-back view: original, rebuilt, error times ten; then more views, originals above rebuilt ones; then a "
        "turn around the scene"
    )

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Scene:
        """The scene of a camera file; `name` says which of the forms it is."""
        last = PurePosixPath(name).name.lower()
        if last in ("images.bin", "images.txt"):
            return _of_colmap(stream, last, beside)
        if last == "poses_bounds.npy":
            return _of_llff(stream, beside)
        cameras = _cameras_of(stream)
        test: list[_Frame] = []
        if PurePosixPath(name).name == "transforms_train.json":
            try:
                other = beside("transforms_test.json")
            except FileNotFoundError:
                other = None  # a scene without test views: the signal chooses some
            if other is not None:
                with other:
                    tested = _cameras_of(other)
                same_unit = tested.is_focal == cameras.is_focal
                if not (same_unit and np.isclose(tested.angle_or_focal, cameras.angle_or_focal, rtol=1e-3)):
                    raise ValueError("the test views were taken with another field of view than the training views")
                test = _some_of(tested.frames, MAX_TEST_VIEWS)
        frames = cameras.frames + test
        images = _pictures_of(frames, beside)
        heldout = np.arange(len(frames)) >= len(cameras.frames)
        poses = np.stack([frame.pose for frame in frames])
        return Scene(images, poses, cameras.angle(images.shape[2]), heldout)

    def write(self, content: np.ndarray, path: Path) -> None:
        """A PNG holds the views side by side, a GIF shows them one after the other."""
        suffix = path.suffix.lower()
        if suffix == ".npy":
            np.save(path, content)
        elif suffix == ".gif":
            path.write_bytes(_animated([pictures.to_uint8(view) for view in content]))
        else:
            path.write_bytes(pictures.encoded(_sheet(content), "PNG"))

    def measurable(self, original: np.ndarray) -> bool:
        return min(original.shape[1:3]) >= _SSIM_WINDOW

    def measures(self, original: np.ndarray, rebuilt: np.ndarray) -> dict[str, float]:
        """`ssim` (Wang et al., 2004), higher is better: mean over the views that are shown, which no step has seen."""
        from skimage.metrics import structural_similarity

        found: list[Any] = [
            structural_similarity(seen, view, channel_axis=2, data_range=1.0, win_size=_SSIM_WINDOW)
            for seen, view in zip(original, rebuilt, strict=True)
        ]
        return {"ssim": float(np.mean(found))}

    def panels(self, original: np.ndarray, rebuilt: np.ndarray, decode: Decode) -> list[Panel]:
        enlarge = max(1, _SMALLEST_SIDE // max(original.shape[1:3]))
        first = [original[0], rebuilt[0], pictures.error_map(original[0], rebuilt[0])]
        shown = [pictures.enlarged(pictures.to_uint8(side), enlarge) for side in first]
        if len(original) > 1:
            shown.append(np.concatenate([_sheet(original[1:]), _sheet(rebuilt[1:])]))
        turn = _animated([pictures.to_uint8(view) for view in decode(_TURN)])
        return [Panel("image/png", pictures.encoded(side, "PNG")) for side in shown] + [Panel("image/gif", turn)]


# --- cameras


@dataclass(frozen=True)
class _Frame:
    """A picture and where its camera was."""

    path: str
    pose: np.ndarray


@dataclass(frozen=True)
class _Cameras:
    """What a camera file says."""

    frames: list[_Frame]
    angle_or_focal: float
    is_focal: bool
    """In pixels, so that the angle of view depends on the width of the pictures."""

    def angle(self, width: int) -> float:
        """Horizontal field of view in radians."""
        return _angle(self.angle_or_focal, width) if self.is_focal else self.angle_or_focal


def _cameras_of(stream: BinaryIO) -> _Cameras:
    content = stream.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"the camera file is larger than {_MAX_JSON_BYTES >> 20} MiB")
    if not content.strip():
        raise ValueError("the camera file is empty")
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the camera file is not valid JSON: {type(error).__name__}") from error
    if not isinstance(said, dict) or not isinstance(said.get("frames"), list):
        raise ValueError("the camera file has no list `frames`; expected the layout of Blender's NeRF data")
    listed = said["frames"]
    if not listed:
        raise ValueError("the camera file lists no frames")
    if len(listed) > MAX_VIEWS:
        raise ValueError(f"the camera file lists {len(listed)} frames; at most {MAX_VIEWS} are read")
    angle, focal = _number(said, "camera_angle_x"), _number(said, "fl_x")
    if angle is None and focal is None:
        raise ValueError("the camera file has neither camera_angle_x (radians) nor fl_x (pixels)")
    _refuse_uncommon(said, focal)
    frames = [_frame_of(frame, number) for number, frame in enumerate(listed)]
    if angle is not None and 0 < angle < np.pi:
        return _Cameras(frames, angle, is_focal=False)
    if angle is None and focal is not None and focal > 0:
        return _Cameras(frames, focal, is_focal=True)
    raise ValueError(f"the field of view is out of range: camera_angle_x {angle}, fl_x {focal}")


def _number(said: dict[str, Any], key: str) -> float | None:
    """A finite number of the file, None where there is none."""
    value = said.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise ValueError(f"{key} of the camera file is no finite number")
    return float(value)


def _refuse_uncommon(said: dict[str, Any], focal: float | None) -> None:
    """Cameras other than a pinhole with square pixels and its axis in the middle."""
    if any(_number(said, key) for key in _DISTORTIONS):
        raise ValueError("the cameras have lens distortion (k1, k2, ...); undistort the pictures first")
    focal_y = _number(said, "fl_y")
    if focal is not None and focal_y is not None and abs(focal_y - focal) > 0.01 * abs(focal):
        raise ValueError(f"the pixels are not square: fl_x {focal:g}, fl_y {focal_y:g}")
    for centre, side in (("cx", "w"), ("cy", "h")):
        middle, length = _number(said, centre), _number(said, side)
        if middle is not None and length is not None and abs(middle - length / 2) > 0.02 * abs(length):
            raise ValueError(
                f"the camera's axis is not in the middle of the picture: {centre} {middle:g} of {length:g}"
            )


def _frame_of(said: Any, number: int) -> _Frame:
    if not isinstance(said, dict) or not isinstance(said.get("file_path"), str):
        raise ValueError(f"frame {number} has no file_path")
    try:
        pose = np.array(said.get("transform_matrix"), dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        pose = np.empty(0)
    if pose.shape != (4, 4):
        raise ValueError(f"the transform_matrix of frame {number} is not 4 x 4 numbers")
    if not np.isfinite(pose).all():
        raise ValueError(f"the transform_matrix of frame {number} holds NaN or infinite numbers")
    return _Frame(_path_of(said["file_path"], number), pose)


def _path_of(text: str, number: int) -> str:
    """Path of a picture relative to the camera file; one without a suffix is a PNG, as Blender's script writes it."""
    path = PurePosixPath(text.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in text or "\0" in text or not path.name:
        raise ValueError(f"the file_path of frame {number} leads out of the scene's folder")
    known = path.suffix.lower() in ImageMedium.suffixes
    return path.as_posix() if known else f"{path.as_posix()}.png"


def _some_of(frames: Sequence[_Frame], most: int) -> list[_Frame]:
    """At most so many, spread over them."""
    count = min(len(frames), most)
    return [frames[(2 * place + 1) * len(frames) // (2 * count)] for place in range(count)]


# --- reconstructions

_COLMAP_FOLDERS = ("../../images", "../images", "images", ".", "..", "../..")
"""Where pictures lie, from the folder of the reconstruction: `sparse/0` of a project, `sparse` of undistorted ones."""
_LLFF_FOLDERS = {1: "images", 2: "images_2", 4: "images_4", 8: "images_8"}
_OUTLIERS = 1.0  # per cent of the points on either side of an axis: reconstructions have some anywhere
_MARGIN = 1.1  # of the box, and one over it of the nearest depth: points are few, and lie within what they are of


def _of_colmap(stream: BinaryIO, name: str, beside: Beside) -> Scene:
    suffix = PurePosixPath(name).suffix
    model = colmap.read_model(stream, suffix == ".txt", lambda what: beside(f"{what}{suffix}"))
    used = {picture.camera for picture in model.pictures}
    angles = [_angle(model.cameras[number].focal, model.cameras[number].width) for number in sorted(used)]
    if max(angles) - min(angles) > 0.01 * min(angles):
        raise ValueError("the pictures are of cameras with several fields of view; a scene has one")
    names = [_path_of(picture.name, number) for number, picture in enumerate(model.pictures)]
    folder = next((one for one in _COLMAP_FOLDERS if _is_there(beside, f"{one}/{names[0]}")), None)
    if folder is None:
        raise ValueError(f"the picture {names[0][:120]} is neither in images nor beside the reconstruction")
    poses = np.stack([picture.pose for picture in model.pictures])
    frames = [_Frame(f"{folder}/{one}", pose) for one, pose in zip(names, poses, strict=True)]
    images = _pictures_of(frames, beside)
    box, near = _reach_of_points(model.points, poses)
    return Scene(images, poses, angles[0], np.zeros(len(frames), bool), box, near)


def _of_llff(stream: BinaryIO, beside: Beside) -> Scene:
    cameras = llff.read_cameras(stream)
    if not isinstance(beside, Listing):
        raise ValueError("poses_bounds.npy does not name its pictures, and there is no folder of them to list")
    count, pixels = len(cameras.poses), len(cameras.poses) * cameras.height * cameras.width
    folder, names = "", []
    for shrunk, one in _LLFF_FOLDERS.items():
        there = [name for name in beside.names(one) if PurePosixPath(name).suffix.lower() in ImageMedium.suffixes]
        if there:
            folder, names = one, there
        if there and pixels / shrunk**2 <= MAX_SCENE_PIXELS:
            break
    if not names:
        raise ValueError("there is no folder `images` with pictures beside poses_bounds.npy")
    if len(names) != count:
        raise ValueError(f"poses_bounds.npy has {count} cameras, and {folder} {len(names)} pictures")
    frames = [_Frame(f"{folder}/{one}", pose) for one, pose in zip(names, cameras.poses, strict=True)]
    images = _pictures_of(frames, beside)
    box = _reach_of_depths(cameras)
    near = float(cameras.depths[:, 0].min()) / _MARGIN
    angle = _angle(cameras.focal, cameras.width)
    return Scene(images, cameras.poses, angle, np.zeros(count, bool), box, near)


def _angle(focal: float, width: float) -> float:
    """Horizontal field of view in radians."""
    return 2 * float(np.arctan(width / 2 / focal))


def _is_there(beside: Beside, path: str) -> bool:
    try:
        beside(path).close()
    except (FileNotFoundError, ValueError):
        return False
    return True


def _reach_of_points(points: np.ndarray, poses: np.ndarray) -> tuple[np.ndarray | None, float]:
    """The box of points [K, 3] but for outliers, and the distance from the cameras at which the scene begins."""
    if len(points) < _FEWEST_POINTS:
        return None, 0.0
    low, high = np.percentile(points, [_OUTLIERS, 100 - _OUTLIERS], axis=0)
    sides = np.maximum(high - low, 1e-3 * (high - low).max() + 1e-9)  # of points in a plane
    inside = points[((points >= low) & (points <= high)).all(axis=1)]
    nearest = np.inf
    for pose in poses:
        depths = -(inside - pose[:3, 3]) @ pose[:3, 2]
        ahead = depths[depths > 0]
        nearest = min(nearest, np.percentile(ahead, _OUTLIERS) if len(ahead) else np.inf)
    near = float(nearest) / _MARGIN if np.isfinite(nearest) else 0.0
    return np.concatenate([(low + high) / 2, _MARGIN * sides / 2]), near


def _reach_of_depths(cameras: llff.Cameras) -> np.ndarray:
    """The box of what the cameras see between their depths."""
    across, down = cameras.width / 2 / cameras.focal, cameras.height / 2 / cameras.focal
    corners = np.array([[x * across, y * down, -1.0] for x in (-1, 1) for y in (-1, 1)])
    reached = cameras.depths[:, :, None, None] * corners  # [V, 2, 4, 3]
    world = np.einsum("vij,vdcj->vdci", cameras.poses[:, :3, :3], reached) + cameras.poses[:, None, None, :3, 3]
    low, high = world.reshape(-1, 3).min(axis=0), world.reshape(-1, 3).max(axis=0)
    return np.concatenate([(low + high) / 2, (high - low) / 2])


# --- pictures


def _pictures_of(frames: Sequence[_Frame], beside: Beside) -> np.ndarray:
    """uint8 [V, H, W, 3], or 4 where any has opacity."""
    found: list[np.ndarray] = []
    for number, frame in enumerate(frames):
        image = _picture(frame, number, beside)
        if found and image.shape[:2] != found[0].shape[:2]:
            sizes = " against ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (image, found[0]))
            raise ValueError(f"view {number} has another size than the first: {sizes} pixels")
        if len(frames) * image.shape[0] * image.shape[1] > MAX_SCENE_PIXELS:
            raise ValueError(
                f"too large: {len(frames)} views of {image.shape[1]} x {image.shape[0]} pixels; at most "
                f"{MAX_SCENE_PIXELS >> 20} Mi pixels of a scene are read"
            )
        found.append(image)
    if len({image.shape[2] for image in found}) > 1:
        found = [_with_opacity(image) for image in found]
    return np.stack(found)


def _picture(frame: _Frame, number: int, beside: Beside) -> np.ndarray:
    """uint8 [H, W, 3 or 4]; grey becomes colour, and of 16 bits the upper eight stay."""
    try:
        stream = beside(frame.path)
    except FileNotFoundError as error:
        raise ValueError(f"the picture of view {number} is missing: {frame.path[:120]}") from error
    try:
        with stream:
            image = ImageMedium().read(stream, frame.path, beside)
    except ValueError as error:
        raise ValueError(f"the picture of view {number}, {frame.path[:120]}: {error}") from error
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"the picture of view {number} has values of type {image.dtype}; 8 or 16 bits are read")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] in (1, 2):
        image = np.concatenate([image[:, :, :1]] * 3 + [image[:, :, 1:]], axis=2)
    return image


def _with_opacity(image: np.ndarray) -> np.ndarray:
    """[H, W, 3 or 4] -> [H, W, 4]."""
    return image if image.shape[2] == 4 else np.pad(image, [(0, 0), (0, 0), (0, 1)], constant_values=255)


def _sheet(views: np.ndarray) -> np.ndarray:
    """Views side by side."""
    return pictures.grid([pictures.to_uint8(view) for view in views], columns=_COLUMNS, gap=0)


def _animated(views: Sequence[np.ndarray]) -> bytes:
    """A GIF that goes on forever, one turn in `_TURN_SECONDS`."""
    from PIL import Image

    frames = [Image.fromarray(view) for view in views]
    milliseconds = max(20, round(1000 * _TURN_SECONDS / len(frames)))  # viewers slow down what is faster
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return stream.getvalue()
