"""Numbered pictures in a folder, which together are one datum: frames of a film, slices of a volume.

The first names the datum (`pattern: "*/0001.png"`), the others follow by number: the digits at the end of the name,
with as many leading zeros. The datum ends where the numbers do.
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from nfscale.hostile import reason_of
from nfscale.media.base import Beside
from nfscale.media.image import ImageMedium

_NUMBERED = re.compile(r"(.*?)(\d+)")


def read_stack(stream: BinaryIO, name: str, beside: Beside, most_values: int) -> np.ndarray:
    """The pictures from this one on: [T, H, W] or [T, H, W, C], in the integer range they were stored in.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    medium = ImageMedium()
    first = medium.read(stream, name, beside)
    found, size = [first], first.size
    for path, following in _names_after(name):
        try:
            opened = beside(path)
        except (OSError, ValueError):
            if _is_there(following, beside):
                raise ValueError(f"of its numbered pictures, {path} is missing or cannot be opened") from None
            break
        with opened:
            try:
                picture = medium.read(opened, path, beside)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        if (picture.shape, picture.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"its numbered pictures differ: {first.dtype} {list(first.shape)}, and {path} is {picture.dtype} "
                f"{list(picture.shape)}"
            )
        size += picture.size
        if size > most_values:
            raise ValueError(f"too large: at most {most_values:,} values are read, over all numbered pictures")
        found.append(picture)
    return np.stack(found)


def _names_after(name: str) -> Iterator[tuple[str, str]]:
    """Pairs of the names of the next picture and of the one after it, endlessly; none where there is no number."""
    path = PurePosixPath(name)
    numbered = _NUMBERED.fullmatch(path.stem)
    if numbered is None:
        return
    before, digits = numbered.groups()
    number = int(digits)
    while True:
        number += 1
        first, second = (f"{before}{n:0{len(digits)}d}{path.suffix}" for n in (number, number + 1))
        yield first, second


def _is_there(name: str, beside: Beside) -> bool:
    try:
        beside(name).close()
    except (OSError, ValueError):
        return False
    return True


def read_pages(stream: BinaryIO, most_values: int) -> np.ndarray | None:
    """The pages of a TIFF, [T, H, W] or [T, H, W, C]; None of one that has a single page.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that make no sense; the size check is ours, and stricter
            return _pages_of(stream, most_values)
    except Exception as error:  # a damaged file makes a decoder raise struct.error, IndexError, ...
        raise ValueError(reason_of(error)) from error


def _pages_of(stream: BinaryIO, most_values: int) -> np.ndarray | None:
    from PIL import Image

    with Image.open(stream, formats=["TIFF"]) as image:
        (width, height), mode, count = image.size, image.mode, getattr(image, "n_frames", 1)
        if count == 1:
            return None
        if width * height * len(image.getbands()) * count > most_values:
            raise ValueError(
                f"too large: {count} pages of {width} x {height} pixels, at most {most_values:,} values are read"
            )
        pages = []
        for page in range(count):
            image.seek(page)
            if (image.size, image.mode) != ((width, height), mode):
                raise ValueError(
                    f"its pages differ: {width} x {height} {mode}, and page {page} is {image.width} x {image.height} "
                    f"{image.mode}"
                )
            pages.append(np.asarray(image))
        return np.stack(pages)
