"""Anyone's images in a folder: ids are the paths below it, labels optionally the parents' or a CSV's.

Inputs are hostile, and each bad file is a datum with a reason:

- Damaged files make a decoder raise anything at all, so whatever it raises is caught.
- One that claims more pixels than `MAX_PIXELS` is refused before it is decoded (decompression bombs).
- Only raster formats are tried: others would start an interpreter (EPS runs Ghostscript), whatever the name says.
- Opening a pipe would wait forever, and a link may lead to anything; so only regular files inside the folder are read.
- Names are bytes. In ids, what is no UTF-8 or what a terminal would obey is escaped.
- An object may have any size: one that no image needs is refused by the size that its listing gives.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np

from nfscale.datasets.base import Dataset, Datum, Label, require
from nfscale.datasets.labels import labels_of_csv
from nfscale.datasets.places import MAX_ENCODED_BYTES, located, matches, opening
from nfscale.files import Entry, ObjectFiles, StoreError

MAX_PIXELS = 64 << 20
"""64 Mi pixels: a full-batch coordinate table of more would not fit where the engine runs."""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"}

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF", "JPEG2000", "QOI")
_EXIF_ORIENTATION = 0x0112
_ESCAPED = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True)
class Folder:
    """Files below `path` that match `pattern`; without a pattern, files with the suffix of an image.

    Below a URI: one listing, and one request for each datum that is read.
    """

    path: str
    pattern: str | None = None
    label_from: str | None = None
    """`parent`: the name of the folder that a file lies in. Otherwise the path or URI of a CSV with a header and the
    columns `id` (the path below the folder), `label` and optionally `split`."""

    def open(self) -> "FolderDataset":
        files, _ = located(self.path, "folder")
        if self.pattern is not None:
            parts = PurePath(self.pattern).parts
            require(
                bool(parts) and ".." not in parts and not PurePath(self.pattern).is_absolute(),
                f"dataset.pattern: {self.pattern!r} leads out of the folder; write one that goes down from "
                "dataset.path, such as **/*.png",
            )
            require(
                all("**" not in part or part == "**" for part in parts),
                f"dataset.pattern: in {self.pattern!r} a ** is not a whole part; write **/*.png for all folders",
            )
        remote = isinstance(files, ObjectFiles)
        images = _ObjectImages(files, self.pattern) if remote else _LocalImages(Path(self.path), self.pattern)
        dataset = FolderDataset(images, self.label_from)
        wanted = f"match {self.pattern!r}" if self.pattern else f"end in one of {' '.join(sorted(IMAGE_SUFFIXES))}"
        with opening("dataset.path"):
            require(bool(dataset.ids), f"dataset.path: no files below {self.path!r} {wanted}")
        if self.label_from not in (None, "parent"):
            dataset.labels = labels_of_csv(self.label_from, dataset.ids, images.has_file)
        return dataset


class FolderDataset(Dataset):
    """Whatever matches is a datum, but for folders: a link that leads nowhere or a pipe is one with a reason."""

    def __init__(self, images: "_Images", label_from: str | None) -> None:
        self._images, self.label_from = images, label_from
        self.labels: dict[str, tuple[Label, str | None]] = {}

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._images.names())

    @cached_property
    def ids(self) -> Sequence[str]:
        return [escaped_path(name) for name in self._names]

    def read(self, position: int) -> Datum:
        datum_id, name = self.ids[position], self._names[position]
        label, split = self.labels.get(datum_id, (None, None))
        if self.label_from == "parent":
            label = escaped(f"{self._images.title}/{name}".split("/")[-2])
        try:
            with self._images.opened(name) as stream:
                return Datum(datum_id, position, read_image(stream), label, split)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            return Datum(datum_id, position, None, label, split, reason_of(error))


class _Images(Protocol):
    """Encoded images by their paths below a folder."""

    title: str
    """The name of the folder itself."""

    def names(self) -> list[str]: ...

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this path below the folder, be it among the data or not."""
        ...

    def opened(self, name: str) -> BinaryIO:
        """An encoded image.

        Raises:
            OSError: if it cannot be read.
            ValueError: with the reason, if it is not to be read.
        """
        ...


class _LocalImages:
    """Of a folder that may hold links, pipes and whatever else a file system has."""

    def __init__(self, root: Path, pattern: str | None) -> None:
        self._root, self._pattern = root, pattern
        self.title = root.name

    def names(self) -> list[str]:
        """Paths below the root as the file system has them."""
        found = self._root.glob(self._pattern or "**/*")
        if self._pattern is None:
            found = (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
        return [path.relative_to(self._root).as_posix() for path in found if not os.path.isdir(path)]

    def has_file(self, name: str) -> bool:
        return ".." not in PurePath(name).parts and os.path.isfile(self._root / name)

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self._root)

    def opened(self, name: str) -> BinaryIO:
        return _opened_inside(self._real_root, name)


class _ObjectImages:
    """Below a prefix of an object store."""

    def __init__(self, files: ObjectFiles, pattern: str | None) -> None:
        self._files, self._pattern = files, pattern
        self.title = files.root.rpartition("/")[2]

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return self._files.entries()

    def names(self) -> list[str]:
        if self._pattern is None:
            return [name for name in self._entries if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        pattern = PurePosixPath(self._pattern).parts
        return [name for name in self._entries if matches(name.split("/"), pattern)]

    def has_file(self, name: str) -> bool:
        return name in self._entries

    def opened(self, name: str) -> BinaryIO:
        size = self._entries[name].size
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"too large: an object of {size} bytes, at most {MAX_ENCODED_BYTES} are read")
        return io.BytesIO(self._files.range(name, 0, MAX_ENCODED_BYTES))  # it may have grown since it was listed


def escaped(name: str) -> str:
    r"""A file's name as an id: valid UTF-8, printable, and different for different names.

    A backslash is written `\\`, a byte that is not UTF-8 `\xe9`, a control character `\u000a`; all else stays.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] == "\\":
            return r"\\"
        return rf"\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else rf"\u{code:04x}"

    return _ESCAPED.sub(escape, name)


def escaped_path(path: str) -> str:
    """A path as an id: as `escaped`, and without the parts that would lead elsewhere or nowhere."""
    parts = [rf"\u{ord(part[0]):04x}" * len(part) if part in (".", "..") else escaped(part) for part in path.split("/")]
    return "/".join([part or r"\u002f" for part in parts])


def _opened_inside(root: str, name: str) -> BinaryIO:
    """A regular file below `root` (a real path), opened for reading.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not a regular file, or if links lead it out of the root.
    """
    path = os.path.realpath(os.path.join(root, name))
    if os.path.islink(path):
        raise ValueError("a link that leads back to itself")
    if os.path.commonpath([root, path]) != root:
        raise ValueError("a link that leads out of the dataset's folder; put the file itself there")
    if not os.path.lexists(path):
        raise ValueError("a link that leads nowhere, or the file is gone")
    _refuse_irregular(os.stat(path).st_mode)
    # What the path names may have changed since: do not follow a link, do not wait for a pipe, and look again.
    flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # none of them is on every system
    descriptor = os.open(path, sum((getattr(os, flag, 0) for flag in flags), os.O_RDONLY))
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"not a regular file but {_KINDS.get(stat.S_IFMT(mode), 'something else')}")


def read_image(source: Path | BinaryIO) -> np.ndarray:
    """An encoded image as [H, W] or [H, W, C], in the integer range it was stored in.

    Upright, as its EXIF orientation says; of several frames or pages the first. Palettes, CMYK and the like
    become RGB or, with transparency, RGBA.

    Raises:
        ValueError: in a sentence that becomes the row's reason, if it cannot be read or decoded or has more
            than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size check is ours, and stricter
            return _decoded(source)
    except Exception as error:  # a damaged file makes a decoder raise struct.error, IndexError, zlib.error, ...
        raise ValueError(reason_of(error)) from error


@cache
def _formats() -> tuple[str, ...]:
    """The raster formats that this build of Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decoded(source: Path | BinaryIO) -> np.ndarray:
    from PIL import Image

    try:
        opened = Image.open(source, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from error
    with opened as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"too large: {width} x {height} pixels, at most {MAX_PIXELS} in all are decoded")
        if not width * height:
            raise ValueError(f"an image without pixels: {width} x {height}")
        image.load()
        upright = _upright(image)
        if upright.mode in ("P", "PA"):
            return np.asarray(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
        if upright.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            return np.asarray(upright.convert("RGB"))
        if upright.mode in ("La", "RGBa"):  # premultiplied
            return np.asarray(upright.convert(upright.mode.upper()))
        if upright.mode.startswith("I"):
            return _as_uint16(np.asarray(upright))
        return np.asarray(upright)


def _upright(image: Any) -> Any:
    """The image as its EXIF orientation wants it shown; where the EXIF data are damaged, as it is stored."""
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # what a parser of damaged metadata raises; the pixels are intact
        return image


def _as_uint16(array: np.ndarray) -> np.ndarray:
    """Wide integers as the 16 bits that grey images of depth are stored in."""
    if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"integer values from {array.min()} to {array.max()}; at most 16 bits are read")
    return array.astype(np.uint16)


def reason_of(error: BaseException) -> str:
    """An error as one sentence for a row: without the machine's paths, without what a terminal would obey."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.split(": '")[0].split(" '/")[0]
    if "cannot identify image file" in text:
        return "not an image, or an image format that cannot be read"
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    if not isinstance(error, OSError | ValueError) or not text.strip():
        text = f"cannot be decoded: {type(error).__name__} {text}"
    return escaped(" ".join(text.split()))[:300]
