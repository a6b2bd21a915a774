"""scikit-learn's 1,797 handwritten digits of 8 x 8 grey pixels (UCI ML, Alpaydin & Kaynak), labelled 0 to 9."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

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
        # The package is not imported: it brings scipy, which takes seconds and hundreds of megabytes of addresses.
        package = find_spec("sklearn")
        assert package is not None, "it is required"
        (root,) = package.submodule_search_locations or [""]
        rows = np.loadtxt(Path(root) / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.float32)
        return rows[:, :-1].reshape(-1, 8, 8) / np.float32(_PEAK), rows[:, -1].astype(np.int64)

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"digit-{index:04d}" for index in range(len(self._bunch[0]))]

    def read(self, position: int) -> Datum:
        images, targets = self._bunch
        return Datum(self.ids[position], position, images[position], label=int(targets[position]))
