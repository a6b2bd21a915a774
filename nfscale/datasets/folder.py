"""Anyone's images in a folder: ids are the paths below it, labels optionally the names of the parents.

Inputs are hostile: an image that cannot be read is a datum with a reason, and one that claims more
pixels than `MAX_PIXELS` is refused before it is decoded (decompression bombs).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from nfscale.datasets.base import Dataset, Datum, require

MAX_PIXELS = 64 << 20
"""64 Mi pixels: a full-batch coordinate table of more would not fit where the engine runs."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Folder:
    """Files below `path` that match `pattern`; without a pattern, files with the suffix of an image."""

    path: str
    pattern: str | None = None
    label_from: Literal["parent"] | None = None

    def open(self) -> "FolderDataset":
        root = Path(self.path)
        require(root.is_dir(), f"dataset.path: no folder {self.path!r}; it is looked up from {Path.cwd()}")
        dataset = FolderDataset(root, self.pattern, self.label_from)
        wanted = f"match {self.pattern!r}" if self.pattern else f"end in one of {' '.join(sorted(_SUFFIXES))}"
        require(bool(dataset.ids), f"dataset.path: no files below {self.path!r} {wanted}")
        return dataset


class FolderDataset(Dataset):
    def __init__(self, root: Path, pattern: str | None, label_from: str | None) -> None:
        self.root, self.pattern, self.label_from = root, pattern, label_from

    @cached_property
    def ids(self) -> Sequence[str]:
        found = (path for path in self.root.glob(self.pattern or "**/*") if path.is_file())
        if self.pattern is None:
            found = (path for path in found if path.suffix.lower() in _SUFFIXES)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def read(self, position: int) -> Datum:
        datum_id = self.ids[position]
        path = self.root / datum_id
        label = path.parent.name if self.label_from == "parent" else None
        try:
            return Datum(datum_id, position, read_image(path), label)
        except (OSError, ValueError, SyntaxError, MemoryError) as error:
            return Datum(datum_id, position, None, label, error=_reason(error))


def read_image(path: Path) -> np.ndarray:
    """An image file as [H, W] or [H, W, C], in the integer range it was stored in.

    Raises:
        OSError: if it cannot be read or decoded.
        ValueError: if it has more than `MAX_PIXELS`.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size check below is ours, and stricter
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise ValueError(f"too large: {error}") from error
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"too large: {width} x {height} pixels, at most {MAX_PIXELS} in all are decoded")
            if image.mode == "P":
                return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                return np.asarray(image.convert("RGB"))
            if image.mode.startswith("I"):
                return _as_uint16(np.asarray(image))
            return np.asarray(image)


def _as_uint16(array: np.ndarray) -> np.ndarray:
    """Wide integers as the 16 bits that grey images of depth are stored in."""
    if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"integer values from {array.min()} to {array.max()}; at most 16 bits are read")
    return array.astype(np.uint16)


def _reason(error: BaseException) -> str:
    """One sentence without the machine's paths."""
    text = str(error).split(": '")[0].split(" '/")[0].strip() or type(error).__name__
    if "cannot identify image file" in text:
        return "not an image, or an image format that cannot be read"
    return text[:300]
