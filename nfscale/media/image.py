"""Images: raster files in, PNG out; a datum is shown beside its reconstruction and their difference."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nfscale.media import pictures
from nfscale.media.base import Beside, Panel

_SSIM_WINDOW = 7  # pixels, the usual one; smaller images have no SSIM
_SMALLEST_SIDE = 128  # that a picture is enlarged to, for the eye


class ImageMedium:
    """Content: an array [H, W] or [H, W, C], as `signals.Image` takes it."""

    suffixes = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"})
    written: tuple[str, ...] = (".png", ".npy")
    legend = "original, rebuilt, error times ten"

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> np.ndarray:
        from nfscale.datasets.folder import read_image

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

    def panels(self, original: np.ndarray, rebuilt: np.ndarray) -> list[Panel]:
        return [Panel("image/png", pictures.encoded(side, "PNG")) for side in sides(original, rebuilt)]


def sides(original: np.ndarray, rebuilt: np.ndarray) -> list[np.ndarray]:
    """Original, reconstruction and error as pictures, small ones enlarged: uint8 [H, W, 3 or 4]."""
    enlarge = max(1, _SMALLEST_SIDE // max(original.shape[:2]))
    shown = [original, rebuilt, pictures.error_map(original, rebuilt)]
    return [pictures.enlarged(pictures.to_uint8(side), enlarge) for side in shown]
