"""Scenes: posed pictures in the layout of Blender's NeRF data in; views out, as pictures or an animation.

A scene is a folder with a JSON file of cameras and the pictures that it names. Two forms are read:

- `transforms_train.json` with `transforms_test.json` beside it, as NeRF-synthetic has them. The test views are held
  back; of more than `MAX_TEST_VIEWS`, as many spread over them. `transforms_val.json` is not read.
- `transforms.json` alone, as exporters write it: the signal chooses which views to hold back.

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

from nfscale.media import pictures
from nfscale.media.base import Beside, Decode, Panel
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
_DISTORTIONS = ("k1", "k2", "k3", "k4", "p1", "p2")


class RadianceMedium:
    """Content: a `signals.Scene`; decoded: views [V, H, W, 3] in [0, 1]."""

    suffixes = frozenset({"transforms.json", "transforms_train.json"})
    written: tuple[str, ...] = (".png", ".gif", ".npy")
    panel_pixels = 160
    legend = (
        "a held-back view: original, rebuilt, error times ten; then more views, originals above rebuilt ones; then a "
        "turn around the scene"
    )

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Scene:
        """The scene of a camera file; `name` says which of the two forms it is."""
        cameras = _cameras_of(stream)
        test: list[_Frame] = []
        if PurePosixPath(name).name == "transforms_train.json":
            try:
                other = beside("transforms_test.json")
            except OSError:
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
        return 2 * float(np.arctan(width / 2 / self.angle_or_focal)) if self.is_focal else self.angle_or_focal


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
    except OSError as error:
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
