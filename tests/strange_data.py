"""Data that do to their reader what data in the wild do, for jobs with `dataset.kind: function`."""

import ctypes
import time
from pathlib import Path

import numpy as np


class Deadly:
    """Small images; the `deadly` one segfaults, and leaves a line in `log` for each time that it did."""

    def __init__(self, count: int, deadly: int, log: str) -> None:
        self._count, self._deadly, self._log = count, deadly, log
        self.ids = [f"image-{position}" for position in range(count)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict:
        if position == self._deadly:
            with Path(self._log).open("a") as log:
                log.write("killed\n")
            ctypes.string_at(0)
        return _image(position)


class Held:
    """Small images; from the `first` one on they come only once the file `until` is there."""

    def __init__(self, count: int, first: int, until: str) -> None:
        self._count, self._first, self._until = count, first, Path(until)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict:
        while position >= self._first and not self._until.exists():
            time.sleep(0.05)
        return _image(position)


def _image(position: int) -> dict:
    image = np.random.default_rng(position).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    return {"array": image, "label": position % 3}
