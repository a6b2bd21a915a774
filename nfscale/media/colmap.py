"""COLMAP's reconstructions: cameras, images and points as text or binary, by the format's documentation.

https://colmap.github.io/format.html. A file of images says where each picture was taken, world to camera, as a unit
quaternion (w, x, y, z) and a translation, the camera's x to the right, y down, z ahead; `cameras` and `points3D` lie in
the same folder. Files are hostile: counts are compared with what is there before anything is made of them.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from nfscale.signals.radiance import rotation_of

MAX_IMAGES = 4096
_MAX_BYTES = 512 << 20
_MAX_POINTS = 1 << 22  # that are kept, spread over all of a file's
_MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
}
"""By number: the name, and how many parameters."""
_ONE_FOCAL = {"SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"}
_TWO_FOCALS = {"PINHOLE", "OPENCV", "FULL_OPENCV"}
_STRAIGHT = 1e-4  # of a coefficient of distortion: less than a pixel over any picture
_TO_OPENGL = np.diag([1.0, -1.0, -1.0])  # y up, looking down -z


@dataclass(frozen=True)
class Camera:
    """A pinhole."""

    width: int
    height: int
    focal: float
    """In pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture, and where its camera was."""

    name: str
    pose: np.ndarray
    """[4, 4], camera to world, looking down -z, y up."""
    camera: int


@dataclass(frozen=True)
class Model:
    """A reconstruction; pictures by their names."""

    cameras: dict[int, Camera]
    pictures: list[Picture]
    points: np.ndarray
    """float64 [K, 3], in the world; empty where there are none."""


def read_model(stream: BinaryIO, is_text: bool, sibling: Callable[[str], BinaryIO]) -> Model:
    """The reconstruction of a file of images.

    Args:
        sibling: opens `cameras` or `points3D`, of the same format, by that name; raises FileNotFoundError.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    try:
        with sibling("cameras") as beside:
            cameras = (_cameras_text if is_text else _cameras_binary)(_content(beside))
    except FileNotFoundError as error:
        raise ValueError("there is no file of cameras beside that of the images") from error
    pictures = (_pictures_text if is_text else _pictures_binary)(_content(stream))
    if not pictures:
        raise ValueError("the reconstruction has no images")
    for picture in pictures:
        if picture.camera not in cameras:
            raise ValueError(f"the image {picture.name[:120]!r} is of camera {picture.camera}, which is not there")
    try:
        with sibling("points3D") as beside:
            points = (_points_text if is_text else _points_binary)(_content(beside))
    except FileNotFoundError:
        points = np.empty((0, 3))
    return Model(cameras, sorted(pictures, key=lambda picture: picture.name), points[np.isfinite(points).all(axis=1)])


def _content(stream: BinaryIO) -> bytes:
    content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"too large: at most {_MAX_BYTES >> 20} MiB of each file of a reconstruction are read")
    return content


# --- what a line or record says


def _camera(model: str, width: int, height: int, parameters: list[float]) -> Camera:
    if model in _ONE_FOCAL:
        (focal, across, down), bends = parameters[:3], parameters[3:]
    elif model in _TWO_FOCALS:
        (focal, other, across, down), bends = parameters[:4], parameters[4:]
        if abs(other - focal) > 0.01 * abs(focal):
            raise ValueError(f"the pixels are not square: focal lengths {focal:g} and {other:g}")
    else:
        raise ValueError(f"a camera is of the model {model}; undistort the pictures (colmap image_undistorter)")
    if any(not abs(bend) < _STRAIGHT for bend in bends):
        raise ValueError("the cameras have lens distortion; undistort the pictures (colmap image_undistorter)")
    if not (0 < width < 1 << 20 and 0 < height < 1 << 20 and 0 < focal < 1e9):
        raise ValueError(f"a camera of {width} x {height} pixels has a focal length of {focal:g}")
    for centre, side in ((across, width), (down, height)):
        if not abs(centre - side / 2) <= 0.02 * side:
            raise ValueError(f"the camera's axis is not in the middle of the picture: {centre:g} of {side}")
    return Camera(width, height, focal)


def _picture(name: str, quaternion: list[float], translation: list[float], camera: int) -> Picture:
    if not all(map(math.isfinite, (*quaternion, *translation))) or not abs(math.hypot(*quaternion) - 1) < 0.01:
        raise ValueError(
            f"the pose of the image {name[:120]!r} is no unit quaternion and translation of finite numbers"
        )
    world_to_camera = rotation_of(np.array(quaternion))
    pose = np.eye(4)
    pose[:3, :3] = world_to_camera.T @ _TO_OPENGL
    pose[:3, 3] = -world_to_camera.T @ np.array(translation)
    return Picture(name, pose, camera)


def _few(count: int) -> int:
    if count > MAX_IMAGES:
        raise ValueError(f"the reconstruction claims {count:,} images or cameras; at most {MAX_IMAGES:,} are read")
    return count


# --- text


def _lines(content: bytes) -> list[str]:
    """Without comments; empty lines stay, since an image without points has one."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError("a text file of the reconstruction is not UTF-8") from error
    return [line.strip() for line in text.splitlines() if not line.startswith("#")]


def _cameras_text(content: bytes) -> dict[int, Camera]:
    found = {}
    for line in filter(None, _lines(content)):
        try:
            number, model, width, height, *parameters = line.split()
            values = [float(one) for one in parameters]
            key, sides = int(number), (int(width), int(height))
        except ValueError as error:
            raise ValueError(f"cannot read a line of the file of cameras: {line[:120]!r}") from error
        expected = dict(_MODELS.values()).get(model)
        if expected is not None and len(values) != expected:
            raise ValueError(f"a camera {model} has {expected} parameters, the file gives {len(values)}")
        found[key] = _camera(model, *sides, values)
        _few(len(found))
    return found


def _pictures_text(content: bytes) -> list[Picture]:
    """Two lines each, of which the second has the points that it shows."""
    lines = _lines(content)
    while lines and not lines[0]:
        lines.pop(0)
    found = []
    for line in lines[::2]:
        if not line:
            continue
        try:
            _, *numbers, camera, name = line.split(maxsplit=9)
            values, of = [float(one) for one in numbers], int(camera)
            if len(values) != 7:
                raise ValueError
        except ValueError as error:
            raise ValueError(f"cannot read a line of the file of images: {line[:120]!r}") from error
        found.append(_picture(name, values[:4], values[4:], of))
        _few(len(found))
    return found


def _points_text(content: bytes) -> np.ndarray:
    lines = list(filter(None, _lines(content)))
    try:
        points = [
            [float(one) for one in line.split(maxsplit=4)[1:4]] for line in lines[:: 1 + len(lines) // _MAX_POINTS]
        ]
        return np.array(points, dtype=np.float64).reshape(-1, 3)
    except ValueError as error:
        raise ValueError("cannot read the file of points") from error


# --- binary


class _Records:
    """Numbers of a binary file, one after the other."""

    def __init__(self, content: bytes, what: str) -> None:
        self._content, self._what, self._place = content, what, 0

    def take(self, kinds: str) -> tuple:
        size = struct.calcsize(f"<{kinds}")
        self.skip(size)
        return struct.unpack_from(f"<{kinds}", self._content, self._place - size)

    def skip(self, size: int) -> None:
        self._place += size
        if self._place > len(self._content):
            raise ValueError(f"truncated: the file of {self._what} ends early")

    def name(self) -> str:
        end = self._content.find(b"\0", self._place)
        if end < 0:
            raise ValueError(f"truncated: the file of {self._what} ends within a name")
        found = self._content[self._place : end]
        self._place = end + 1
        return found.decode("utf-8", "backslashreplace")


def _cameras_binary(content: bytes) -> dict[int, Camera]:
    records, found = _Records(content, "cameras"), {}
    for _ in range(_few(records.take("Q")[0])):
        key, model, width, height = records.take("iiQQ")
        if model not in _MODELS:
            raise ValueError(f"a camera is of model number {model}, which is not known")
        name, count = _MODELS[model]
        found[key] = _camera(name, width, height, list(records.take(f"{count}d")))
    return found


def _pictures_binary(content: bytes) -> list[Picture]:
    records, found = _Records(content, "images"), []
    for _ in range(_few(records.take("Q")[0])):
        _, *numbers, camera = records.take("i7di")
        name = records.name()
        records.skip(24 * records.take("Q")[0])
        found.append(_picture(name, numbers[:4], numbers[4:], camera))
    return found


def _points_binary(content: bytes) -> np.ndarray:
    records = _Records(content, "points")
    count = records.take("Q")[0]
    if count > len(content) // 43:
        raise ValueError(f"truncated: the file of points claims {count:,} and has {len(content):,} bytes")
    every, points = 1 + count // _MAX_POINTS, []
    for place in range(count):
        _, x, y, z, _, tracks = records.take("Q3d3xdQ")
        records.skip(8 * tracks)
        if place % every == 0:
            points.append((x, y, z))
    return np.array(points, dtype=np.float64).reshape(-1, 3)
