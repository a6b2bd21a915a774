"""3,926 emoji as colour images of 128 x 136 pixels, composited on white: the bitmaps of Noto Color Emoji (OFL 1.1).

They are the glyphs of a font in the Debian package fonts-noto-color-emoji (10 MB); ids are the glyphs' names.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nfscale.datasets.base import Dataset, Datum
from nfscale.datasets.cache import Package, fetch_debian
from nfscale.hostile import reason_of
from nfscale.media.image import read_image

_FONT = "NotoColorEmoji.ttf"
_PACKAGE = Package(
    name="fonts-noto-color-emoji",
    version="2.042",
    files={
        _FONT: (
            f"usr/share/fonts/truetype/noto/{_FONT}",
            "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec",
        )
    },
    fetch=fetch_debian,
    installed=lambda: Path("/"),
    command="apt-get update && apt-get install fonts-noto-color-emoji",
)


@dataclass(frozen=True)
class Emoji:
    """The first use fetches the Debian package with apt-get, unless it is installed."""

    def open(self) -> "EmojiDataset":
        return EmojiDataset(_bitmaps(_PACKAGE.paths()[_FONT]))


class EmojiDataset(Dataset):
    def __init__(self, bitmaps: dict[str, bytes]) -> None:
        self._bitmaps = bitmaps

    @cached_property
    def ids(self) -> Sequence[str]:
        return list(self._bitmaps)

    def read(self, position: int) -> Datum:
        name = self.ids[position]
        try:
            return Datum(name, position, on_white(read_image(io.BytesIO(self._bitmaps[name]))))
        except ValueError as error:
            return Datum(name, position, None, error=reason_of(error))


@lru_cache(maxsize=1)
def _bitmaps(path: Path) -> dict[str, bytes]:
    """The PNG of each glyph, by name, in the order of the font."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        table: Any = font["CBDT"]
        return {name: glyph.imageData for name, glyph in table.strikeData[0].items() if hasattr(glyph, "imageData")}


def on_white(image: np.ndarray) -> np.ndarray:
    """RGB or RGBA uint8 [H, W, C] -> RGB [H, W, 3], as a white page shows it."""
    if image.shape[2] == 3:
        return image
    opacity = image[:, :, 3:].astype(np.float32) / 255
    return np.rint(image[:, :, :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
