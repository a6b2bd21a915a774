"""Fashion-MNIST: 70,000 articles of clothing, 28 x 28 grey pixels, ten classes (Xiao, Rasul & Vollgraf, 2017; MIT).

The Debian package dataset-fashion-mnist (31 MB) holds the four files in the idx format of MNIST.
"""

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from nfscale.datasets.base import ComputedIds, Dataset, Datum, row_id
from nfscale.datasets.cache import Package, fetch_debian

_FOLDER = "usr/share/datasets/fashion-mnist"
_SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_SPLITS = {"train": "train", "test": "t10k"}
_PACKAGE = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9",
    files={name: (f"{_FOLDER}/{name}", sha) for name, sha in _SHA256.items()},
    fetch=fetch_debian,
    installed=lambda: Path("/"),
    command="apt-get update && apt-get install dataset-fashion-mnist",
)


@dataclass(frozen=True)
class FashionMnist:
    """The first use fetches the Debian package with apt-get, unless it is installed."""

    split: Literal["train", "test", "all"] = "all"
    """60,000, 10,000 or both, in this order."""

    def open(self) -> "FashionMnistDataset":
        paths = _PACKAGE.paths()
        splits = list(_SPLITS) if self.split == "all" else [self.split]
        parts = []
        for split in splits:
            images, labels = (
                read_idx(paths[f"{_SPLITS[split]}-{kind}-ubyte.gz"]) for kind in ("images-idx3", "labels-idx1")
            )
            parts.append((split, images, labels))
        return FashionMnistDataset(parts)


class FashionMnistDataset(Dataset):
    """Ids are `SPLIT/NUMBER`, so that those of a split are the same whether it is read alone."""

    def __init__(self, parts: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
        self._parts = parts

    def _place(self, position: int) -> tuple[str, int, np.ndarray, np.ndarray]:
        for split, images, labels in self._parts:
            if position < len(images):
                return split, position, images, labels
            position -= len(images)
        raise IndexError(position)

    @cached_property
    def ids(self) -> Sequence[str]:
        def id_at(position: int) -> str:
            split, place, _, _ = self._place(position)
            return row_id(place, split)

        return ComputedIds(sum(len(images) for _, images, _ in self._parts), id_at)

    def read(self, position: int) -> Datum:
        split, place, images, labels = self._place(position)
        return Datum(self.ids[position], position, images[place], label=int(labels[place]), split=split)


@lru_cache(maxsize=4)
def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of bytes as uint8 of the shape that its header states.

    Raises:
        ValueError: if it is none, or holds another number of bytes than its header states.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is no idx file of bytes: it starts with {content[:4].hex()}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path.name} ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path.name} holds {len(content) - start} bytes, its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
