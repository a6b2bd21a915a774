"""110 blocks of 32 x 32 x 32 mm out of the average of many heads (MNI ICBM 152, T1-weighted, 1 mm), or of its tissues.

The three maps come inside the nilearn wheel (11.5 MB): brightness in magnetic resonance, and the shares of grey and of
white matter. Blocks of air are left out, and so is what is left around all blocks, 2 to 15 mm on each side. Every block
has the affine that says where in the head it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from nfscale.datasets.base import Dataset, Datum, require
from nfscale.datasets.cache import Package, fetch_wheel
from nfscale.hostile import reason_of
from nfscale.media import nifti
from nfscale.signals.volume import Voxels, cut

_SIZES = (189, 233, 197)  # z, y, x
_FULL_RANGE = (0.0, 255.0)  # of the bytes in the files
_LEAST_SHARE = 0.01  # of cells that are not air; the other half of the blocks are easy, and would hide the head's
_SHA256 = {
    "t1": "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    "gm": "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
    "wm": "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
}
_PACKAGE = Package(
    name="nilearn",
    version="0.14.1",
    files={
        f"{name}.nii.gz": (f"nilearn/datasets/data/mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz", sha)
        for name, sha in _SHA256.items()
    },
    fetch=fetch_wheel,
    command="pip install nilearn==0.14.1",
)


@dataclass(frozen=True)
class Brain:
    """The first use fetches the wheel with pip. Labels are the maps."""

    part: Literal["t1", "gm", "wm", "all"] = "t1"
    """t1: the picture. gm, wm: grey and white matter, 118 and 110 blocks. all: the three together."""
    size: int | None = 32
    """Millimetres along each side of a block. null: the whole map of 197 x 233 x 189 mm, which `signal.tile` cuts."""

    def open(self) -> "BrainDataset":
        require(
            self.size is None or 2 <= self.size <= min(_SIZES),
            f"dataset.size is 2 to {min(_SIZES)} mm, got {self.size}",
        )
        nifti.library()
        names = list(_SHA256) if self.part == "all" else [self.part]
        return BrainDataset(_PACKAGE.paths(), names, self.size)


class BrainDataset(Dataset):
    """Blocks by map, z, y and x; ids say where one belongs: `t1/z02y03x01`. Whole maps: `t1`."""

    def __init__(self, paths: dict[str, Path], names: Sequence[str], size: int | None) -> None:
        self._paths, self._is_whole = paths, size is None
        self._sides = _SIZES if size is None else (size,) * 3
        counts = [length // side for length, side in zip(_SIZES, self._sides, strict=True)]
        taken = [count * side for count, side in zip(counts, self._sides, strict=True)]
        self._starts = [(length - inside) // 2 for length, inside in zip(_SIZES, taken, strict=True)]
        self._volumes: dict[str, Voxels] = {}
        places = [(name, *map(int, place)) for name in names for place in np.ndindex(*counts)]
        self._places = [place for place in places if not self._is_air(*place)]

    @cached_property
    def ids(self) -> Sequence[str]:
        if self._is_whole:
            return [name for name, *_ in self._places]
        return [f"{name}/z{z:02d}y{y:02d}x{x:02d}" for name, z, y, x in self._places]

    def read(self, position: int) -> Datum:
        name, *place = self._places[position]
        try:
            block = self._block(name, *place)
        except (OSError, ValueError) as error:
            return Datum(self.ids[position], position, None, name, error=reason_of(error))
        return Datum(self.ids[position], position, block, name)

    def _block(self, name: str, *place: int) -> Voxels:
        whole = self._whole(name)
        axes = list(zip(self._starts, place, self._sides, strict=True))
        first = [start + index * side for start, index, side in axes]
        box = tuple(slice(one, one + side) for one, side in zip(first, self._sides, strict=True))
        assert whole.affine is not None
        return Voxels(whole.values[box].copy(), cut(whole.affine, first), _FULL_RANGE)

    def _is_air(self, name: str, *place: int) -> bool:
        try:
            return int(np.count_nonzero(self._block(name, *place).values)) < _LEAST_SHARE * math.prod(self._sides)
        except (OSError, ValueError):
            return False  # a datum that says why

    def _whole(self, name: str) -> Voxels:
        """A map, 35 MB, which every reader of a machine holds once."""
        if name not in self._volumes:
            self._volumes[name] = nifti.read_nifti(self._paths[f"{name}.nii.gz"].read_bytes())
        return self._volumes[name]
