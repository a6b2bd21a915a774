"""Twelve photographs of nature of 1.3 to 4.9 million pixels: desktop backgrounds of MATE (GPL-2+, 1.26.0).

They are files of the Debian package mate-backgrounds (47 MB). One photograph is more than a field should hold:
`signal.tile` cuts them. Ids are the files' names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nfscale.datasets.base import Dataset, Datum, require
from nfscale.datasets.cache import Package, fetch_debian
from nfscale.hostile import reason_of
from nfscale.media.image import read_image

_SHA256 = {
    "Aqua": "5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce",
    "Blinds": "f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600",
    "Dune": "8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91",
    "FreshFlower": "972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e",
    "Garden": "d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78",
    "GreenMeadow": "8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832",
    "LadyBird": "e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d",
    "RainDrops": "3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16",
    "Storm": "77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957",
    "TwoWings": "665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb",
    "Wood": "19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07",
    "YellowFlower": "254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306",
}
_PACKAGE = Package(
    name="mate-backgrounds",
    version="1.26.0",
    files={f"{name}.jpg": (f"usr/share/backgrounds/mate/nature/{name}.jpg", sha) for name, sha in _SHA256.items()},
    fetch=fetch_debian,
    installed=lambda: Path("/"),
    command="apt-get update && apt-get install mate-backgrounds",
)


@dataclass(frozen=True)
class Backgrounds:
    """The first use fetches the Debian package with apt-get, unless it is installed."""

    part: str = "all"
    """Or the name of one: Wood has 2560 x 1920 pixels, LadyBird and TwoWings 2560 x 1600."""

    def open(self) -> "BackgroundsDataset":
        require(
            self.part in ("all", *_SHA256),
            f"dataset.part: no photograph {self.part!r}; there are all, {', '.join(_SHA256)}",
        )
        return BackgroundsDataset(_PACKAGE.paths(), list(_SHA256) if self.part == "all" else [self.part])


class BackgroundsDataset(Dataset):
    def __init__(self, paths: dict[str, Path], names: list[str]) -> None:
        self._paths, self._names = paths, names

    @property
    def ids(self) -> Sequence[str]:
        return self._names

    def read(self, position: int) -> Datum:
        name = self._names[position]
        try:
            return Datum(name, position, read_image(self._paths[f"{name}.jpg"]))
        except (OSError, ValueError) as error:
            return Datum(name, position, None, error=reason_of(error))
