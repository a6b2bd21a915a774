"""The wind at the sea's and the land's surface, mean of each month from 1982 to 1992: 132 maps of 2.5 degrees, no gaps.

The analyses of the US Navy's oceanography centre (FNOC), in the Debian package ferret-datasets (28 MB; NOAA, public
domain). One map is both components in one month, in m/s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nfscale.datasets.base import Dataset, Datum
from nfscale.datasets.cache import Package, fetch_debian
from nfscale.media.netcdf import MapFile, library

_FILE = "monthly_navy_winds.cdf"
_COMPONENTS = ["UWND", "VWND"]
_FIRST_YEAR, _FIRST_TEST_YEAR, _MONTHS = 1982, 1991, 132
_PACKAGE = Package(
    name="ferret-datasets",
    version="7.6.0",
    files={
        _FILE: (
            f"usr/share/ferret-vis/data/{_FILE}",
            "225a9e4fed7bb1a7b558afb662abbe2dc5e3d3db4100fa019cb994f10b115faa",
        )
    },
    fetch=fetch_debian,
    installed=lambda: Path("/"),
    command="apt-get update && apt-get install ferret-datasets",
)


@dataclass(frozen=True)
class NavyWinds:
    """The first use fetches the Debian package with apt-get, unless it is installed. Labels are the months, 1 to 12;
    the split is by year: 1982 to 1990 train, 1991 and 1992 test."""

    def open(self) -> "NavyWindsDataset":
        library()
        return NavyWindsDataset(_PACKAGE.paths()[_FILE])


class NavyWindsDataset(Dataset):
    """Ids are `YEAR-MONTH`."""

    is_thread_bound = True  # as that of all NetCDF files

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _file(self) -> MapFile:
        return MapFile(self._path)

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"{_FIRST_YEAR + place // 12}-{place % 12 + 1:02d}" for place in range(_MONTHS)]

    def read(self, position: int) -> Datum:
        content = self._file.read(self._file.require(_COMPONENTS), position)
        split = "train" if _FIRST_YEAR + position // 12 < _FIRST_TEST_YEAR else "test"
        return Datum(self.ids[position], position, content, position % 12 + 1, split)
