"""Digits as a dataset of the user's own, which counts the steps of every process that fits them.

Whoever is killed has told how far it came: after each check a line `PROCESS STEPS` is appended to `log`, and what these
lines hold beyond the steps of the committed rows was thrown away.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from nfscale.engine import loop


class Digits:
    """Every digit `repeats` times, each time with another id."""

    def __init__(self, log: str, count: int) -> None:
        digits = load_digits()
        self._images, self._labels = (digits.images * 255 / 16).astype(np.uint8), digits.target
        self._count = count
        _count_steps(Path(log))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> dict[str, Any]:
        place = position % len(self._images)
        return {"array": self._images[place], "label": int(self._labels[place])}


def _count_steps(log: Path) -> None:
    """Let the engine of this process append to the log what it tells its observer."""
    if hasattr(loop.Check, "counted"):
        return

    class Counted(loop.Check):
        counted = True

        def __init__(self, *values: Any, **named: Any) -> None:
            super().__init__(*values, **named)
            with log.open("ab", buffering=0) as stream:  # short lines of several processes do not mix
                stream.write(b"%d %d\n" % (os.getpid(), self.steps))

    loop.Check = Counted


def steps_run(log: Path) -> int:
    """Field steps that all processes took."""
    return sum(int(line.split()[1]) for line in log.read_text().splitlines()) if log.exists() else 0
