"""Images: raster files in, PNG out; a datum is shown beside its reconstruction and their difference.

Inputs are hostile, and each bad file is a datum with a reason:

- Damaged files make a decoder raise anything at all, so whatever it raises is caught.
- One that claims more pixels than `MAX_PIXELS` is refused before it is decoded (decompression bombs).
- Only raster formats are tried: others would start an interpreter (EPS runs Ghostscript), whatever the name says.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nfscale.hostile import reason_of
from nfscale.media import pictures
from nfscale.media.base import Beside, Decode, Panel

MAX_PIXELS = 64 << 20
"""64 Mi pixels: a full-batch coordinate table of more would not fit where the engine runs."""

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "AVIF", "JPEG2000", "QOI")
_EXIF_ORIENTATION = 0x0112
_SSIM_WINDOW = 7  # pixels, the usual one; smaller images have no SSIM
_SMALLEST_SIDE = 128  # that a picture is enlarged to, for the eye


class ImageMedium:
    """Content: an array [H, W] or [H, W, C], as `signals.Image` takes it."""

    suffixes = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"})
    written: tuple[str, ...] = (".png", ".npy")
    panel_pixels = 96
    legend = "original, rebuilt, error times ten"

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> np.ndarray:
        return read_image(stream)

    def write(self, content: np.ndarray, path: Path) -> None:
        if path.suffix.lower() == ".npy":
            np.save(path, content)
            return
        path.write_bytes(pictures.encoded(pictures.to_uint8(content), "PNG"))

    def measurable(self, original: np.ndarray) -> bool:
        return min(original.shape[:2]) >= _SSIM_WINDOW

    def measures(self, original: np.ndarray, rebuilt: np.ndarray) -> dict[str, float]:
        """`ssim`, the mean structural similarity (Wang et al., 2004), higher is better, of [H, W, C] in [0, 1]."""
        from skimage.metrics import structural_similarity

        similarity: Any = structural_similarity(
            original, rebuilt, channel_axis=2, data_range=1.0, win_size=_SSIM_WINDOW
        )
        return {"ssim": float(similarity)}

    def panels(self, original: np.ndarray, rebuilt: np.ndarray, decode: Decode) -> list[Panel]:
        return [Panel("image/png", pictures.encoded(side, "PNG")) for side in sides(original, rebuilt)]


def sides(original: np.ndarray, rebuilt: np.ndarray) -> list[np.ndarray]:
    """Original, reconstruction and error as pictures, small ones enlarged: uint8 [H, W, 3 or 4]."""
    enlarge = max(1, _SMALLEST_SIDE // max(original.shape[:2]))
    shown = [original, rebuilt, pictures.error_map(original, rebuilt)]
    return [pictures.enlarged(pictures.to_uint8(side), enlarge) for side in shown]


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
