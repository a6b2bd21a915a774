"""38 closed triangle meshes: animals, people, knots and machine parts, of 446 to 75,408 triangles.

They come with the examples of CGAL in the Debian package libcgal-demo (24 MB). Who made the single meshes is not
stated there (several are from the Stanford repository), so they are fetched and used, and not passed on. Of the
package's meshes these are the closed ones of at least 400 triangles that have an inside and an outside everywhere,
each shape once. Ids and labels are the names of the files.
"""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nfscale.datasets.base import Dataset, Datum
from nfscale.datasets.cache import Package, fetch_debian

_ARCHIVE = "data.tar.gz"
_PACKAGE = Package(
    name="libcgal-demo",
    version="5.5.1",
    files={
        _ARCHIVE: (
            f"usr/share/doc/libcgal-dev/{_ARCHIVE}",
            "027b0920ebb9d396e8b99704f84ce7a417e37c364bea87a2b24bdeab02df76ab",
        )
    },
    fetch=fetch_debian,
    installed=lambda: Path("/"),
    command="apt-get update && apt-get install libcgal-demo",
)

# fmt: off
NAMES = (
    "anchor", "armadillo", "bear", "bear_bis", "blobby", "bones", "bull", "bunny00", "cactus", "camel", "cheese",
    "couplingdown", "cow", "cube-meshed", "dino", "eight", "elephant", "elk", "ellipe0.003", "fandisk", "femur",
    "hand", "handle", "helmet", "homer", "joint", "knot", "knot1", "knot2", "larger_sphere", "man", "oblong",
    "pinion", "retinal", "rotor", "spool", "triceratops", "turbine",
)
# fmt: on
"""Left out: `blade`, `blobby-shuffled`, `boeing` and `oblong-shuffled`, whose triangles face both ways, and shapes
that are there a second time with other triangles."""


@dataclass(frozen=True)
class Shapes:
    """The first use fetches the Debian package with apt-get, unless it is installed."""

    def open(self) -> "ShapesDataset":
        return ShapesDataset(_PACKAGE.paths()[_ARCHIVE])


class ShapesDataset(Dataset):
    """Meshes inside the package's archive, which every process unpacks once into memory (13 MB), when it first reads.

    Raises:
        CallerError: at the first read, if libigl is not installed.
    """

    def __init__(self, archive: Path) -> None:
        self._archive = archive

    @property
    def ids(self) -> Sequence[str]:
        return NAMES

    def read(self, position: int) -> Datum:
        from nfscale.media.meshes import read_mesh
        from nfscale.media.solids import solid_of

        name = NAMES[position]
        try:
            solid = solid_of(read_mesh(io.BytesIO(_files(self._archive)[name]), ".off"))
        except ValueError as error:
            return Datum(name, position, None, name, error=str(error))
        return Datum(name, position, solid, name)


@lru_cache(maxsize=1)
def _files(archive: Path) -> dict[str, bytes]:
    """The OFF file of each mesh, by its name."""
    wanted = {f"data/meshes/{name}.off": name for name in NAMES}
    found = {}
    with tarfile.open(archive, "r:gz") as files:
        for member in files:
            if member.name in wanted and (content := files.extractfile(member)) is not None:
                found[wanted[member.name]] = content.read()
    return found
