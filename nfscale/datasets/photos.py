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

    tile: int = 64

    def open(self) -> "PhotosDataset":
        require(self.tile >= 2, f"dataset.tile is at least 2 pixels, got {self.tile}")
        return PhotosDataset(self.tile)


class PhotosDataset(Dataset):
    """Tiles by photograph, row and column; ids say where a tile belongs: `coffee/r02c05`."""

    def __init__(self, tile: int) -> None:
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
            places += [(name, r, c) for r in range(height // self.tile) for c in range(width // self.tile)]
        return places

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"{name}/r{row:02d}c{column:02d}" for name, row, column in self._places]

    def read(self, position: int) -> Datum:
        name, row, column = self._places[position]
        top, left = row * self.tile, column * self.tile
        array = self._photograph(name)[top : top + self.tile, left : left + self.tile]
        return Datum(self.ids[position], position, array, label=name)

    @staticmethod
    def place(datum_id: str) -> tuple[str, int, int]:
        """Where a tile, or the repeat of one, belongs: (photograph, row, column). A report assembles tiles by this."""
        name, cell = datum_id.partition("#")[0].split("/")
        row, column = cell[1:].split("c")
        return name, int(row), int(column)
