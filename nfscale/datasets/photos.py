"""Ten photographs that come inside the scikit-image and scikit-learn wheels, cut into square tiles.

At 64 pixels: 1,146 tiles, enough to watch a whole-dataset encode on a laptop, and the decoded tiles
assemble into the photographs again. Licences: scikit-image lists them in `skimage/data` (NASA, CC0 and
public domain; motorcycle: Middlebury 2014), scikit-learn in `sklearn/datasets/images` (CC BY 2.0).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nfscale.datasets.base import Dataset, Datum, require
from nfscale.media.image import read_image

_FILES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


@dataclass(frozen=True)
class Photos:
    """Tiles of `tile` x `tile` pixels, RGB; what is left at the right and lower edges is dropped."""

    tile: int | None = 64
    """None: the largest square in the middle of each photograph, ten data of different sizes."""

    def open(self) -> "PhotosDataset":
        require(self.tile is None or self.tile >= 2, f"dataset.tile is at least 2 pixels, got {self.tile}")
        return PhotosDataset(self.tile)


class PhotosDataset(Dataset):
    """Tiles by photograph, row and column; ids say where a tile belongs: `coffee/r02c05`."""

    def __init__(self, tile: int | None) -> None:
        self.tile = tile
        self._photographs: dict[str, np.ndarray] = {}

    def _photograph(self, name: str) -> np.ndarray:
        if name not in self._photographs:
            package, path = _FILES[name]
            found = find_spec(package)  # finds the folder without the seconds that an import takes
            require(found is not None and found.origin is not None, f"dataset photos needs the package {package}")
            self._photographs[name] = read_image(Path(found.origin).parent / path)[..., :3]  # type: ignore
        return self._photographs[name]

    @cached_property
    def _places(self) -> list[tuple[str, int, int]]:
        places = []
        for name in _FILES:
            height, width = self._photograph(name).shape[:2]
            if self.tile is None:
                places.append((name, 0, 0))
                continue
            places += [(name, r, c) for r in range(height // self.tile) for c in range(width // self.tile)]
        return places

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"{name}/r{row:02d}c{column:02d}" for name, row, column in self._places]

    def read(self, position: int) -> Datum:
        name, row, column = self._places[position]
        photograph, side = self._photograph(name), self.tile
        if side is None:
            height, width = photograph.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
        else:
            top, left = row * side, column * side
        array = photograph[top : top + side, left : left + side]
        return Datum(self.ids[position], position, array, label=name)

    @staticmethod
    def place(datum_id: str) -> tuple[str, int, int]:
        """Where a tile, or the repeat of one, belongs: (photograph, row, column). A report assembles tiles by this."""
        name, cell = datum_id.partition("#")[0].split("/")
        row, column = cell[1:].split("c")
        return name, int(row), int(column)
