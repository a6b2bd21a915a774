"""LLFF's cameras: `poses_bounds.npy`, one row of 17 numbers for each picture of the folder `images`, sorted by name.

https://github.com/Fyusion/LLFF: a row is a matrix 3 x 5, whose columns are the camera's axes (down, right, backwards)
in the world, its place, and (height, width, focal length) in pixels; then the nearest and the farthest depth of what
the picture shows. The file is hostile: its size is checked before it is read, and pickle never is.
"""

from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from nfscale.hostile import reason_of

MAX_VIEWS = 4096


@dataclass(frozen=True)
class Cameras:
    """Of V pictures."""

    poses: np.ndarray
    """float64 [V, 4, 4], camera to world, looking down -z, y up."""
    height: int
    width: int
    focal: float
    """In pixels of these sizes."""
    depths: np.ndarray
    """float64 [V, 2]: nearest and farthest, along the camera's axis."""


def read_cameras(stream: BinaryIO) -> Cameras:
    """The cameras of a file.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    rows = _rows(stream)
    if not np.isfinite(rows).all():
        raise ValueError("poses_bounds.npy holds NaN or infinite numbers")
    matrices, depths = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    sizes = matrices[:, :, 4]
    if not (sizes > 0).all() or not np.allclose(sizes, sizes[0], rtol=1e-3):
        raise ValueError("the pictures of poses_bounds.npy are not of one size and focal length")
    if not ((depths[:, 0] > 0) & (depths[:, 1] > depths[:, 0])).all():
        raise ValueError("the depths of poses_bounds.npy do not run from above 0 to farther away")
    down, right, back, place = (matrices[:, :, column] for column in range(4))
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, place], axis=2)
    height, width, focal = sizes[0]
    return Cameras(poses, round(height), round(width), float(focal), depths)


def _rows(stream: BinaryIO) -> np.ndarray:
    """float64 [V, 17]."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.kind != "f" or len(shape) != 2 or shape[1] != 17 or not 0 < shape[0] <= MAX_VIEWS:
            raise ValueError(
                f"poses_bounds.npy is {dtype} {list(shape)}; expected floats [views, 17], up to {MAX_VIEWS:,} views"
            )
        size = shape[0] * 17 * dtype.itemsize
        content = stream.read(size)
    except Exception as error:  # a damaged header makes the reader raise SyntaxError, KeyError, ...
        raise ValueError(reason_of(error)) from error
    if len(content) < size:
        raise ValueError("truncated: poses_bounds.npy holds fewer numbers than it states")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64)
