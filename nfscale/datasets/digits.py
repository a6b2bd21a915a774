"""scikit-learn's 1,797 handwritten digits of 8 x 8 grey pixels (UCI ML, Alpaydin & Kaynak), labelled 0 to 9."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nfscale.datasets.base import Dataset, Datum

_PEAK = 16  # grey levels run from 0 to 16


@dataclass(frozen=True)
class Digits:
    """Comes inside the scikit-learn wheel; nothing to download."""

    def open(self) -> "DigitsDataset":
        return DigitsDataset()


class DigitsDataset(Dataset):
    @cached_property
    def _bunch(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        return (bunch.images / _PEAK).astype(np.float32), bunch.target

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"digit-{index:04d}" for index in range(len(self._bunch[0]))]

    def read(self, position: int) -> Datum:
        images, targets = self._bunch
        return Datum(self.ids[position], position, images[position], label=int(targets[position]))
