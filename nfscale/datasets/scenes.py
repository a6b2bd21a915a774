"""175 scenes, each a piece of furniture or another thing seen from all around: views rendered from textured meshes.

The meshes are the public-domain models (CC0, from blendswap.com) of Sweet Home 3D in the Debian package
sweethome3d-furniture (120 MB, of which 25 are kept). No package was found that ships posed views, so they are rendered
here, in the standard layout of Blender's NeRF data, by `nfscale.media.render`: a scene takes about a second when it is
first read, and stays in the cache folder. Ids are the names of the models, labels their categories.
"""

import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from nfscale.datasets.base import Dataset, Datum, require
from nfscale.datasets.cache import Package, fetch_debian
from nfscale.errors import CallerError
from nfscale.files.user import cache_folder

if TYPE_CHECKING:
    from nfscale.media.render import ViewSettings

_ARCHIVE = "BlendSwap-CC-0.sh3f"
_CATALOGUE = "PluginFurnitureCatalog.properties"
_PACKAGE = Package(
    name="sweethome3d-furniture",
    version="1.8",
    files={
        _ARCHIVE: (
            f"usr/share/sweethome3d/furniture/{_ARCHIVE}",
            "7ef093fe70cedbb160bdb532d86a84580459635e34130c16777f549eba1993dc",
        )
    },
    fetch=fetch_debian,
    installed=lambda: Path("/"),
    command="apt-get update && apt-get install sweethome3d-furniture",
)


@dataclass(frozen=True)
class Scenes:
    """The first use fetches the Debian package with apt-get, unless it is installed. Needs nfscale[scenes]."""

    size: int = 96
    """Pixels of a side of each view."""
    views: int = 48
    """To train on, spread over the sphere above 20 degrees below the horizon."""
    test_views: int = 8
    """Held back, on a circle 30 degrees above the horizon."""

    def open(self) -> "ScenesDataset":
        from nfscale.media.render import ViewSettings, renderer

        for name, most in (("size", 1024), ("views", 1000), ("test_views", 16)):
            require(0 < getattr(self, name) <= most, f"dataset.{name} is from 1 to {most}, got {getattr(self, name)}")
        renderer()
        return ScenesDataset(_PACKAGE.paths()[_ARCHIVE], ViewSettings(self.size, self.views, self.test_views))


class ScenesDataset(Dataset):
    """Scenes by the names of their models, in alphabetical order."""

    def __init__(self, archive: Path, settings: "ViewSettings") -> None:
        self._archive, self._settings = archive, settings

    @cached_property
    def _models(self) -> dict[str, tuple[str, str]]:
        """Id -> (path in the archive, category)."""
        with zipfile.ZipFile(self._archive) as archive:
            text = archive.read(_CATALOGUE).decode("latin-1")
        return catalogue_of(text)

    @cached_property
    def ids(self) -> Sequence[str]:
        return sorted(self._models)

    def read(self, position: int) -> Datum:
        from nfscale.media.radiance import RadianceMedium

        name = self.ids[position]
        path, category = self._models[name]
        try:
            folder = self._rendered(name, path)
            cameras = "transforms_train.json"

            def beside(relative: str) -> BinaryIO:
                return (folder / relative).open("rb")

            with beside(cameras) as stream:
                return Datum(name, position, RadianceMedium().read(stream, cameras, beside), category)  # type: ignore[arg-type]
        except ValueError as error:
            return Datum(name, position, None, category, error=str(error))

    def _rendered(self, name: str, path: str) -> Path:
        """The folder of a scene. It appears whole, by a rename; of two that render at once either's may stay.

        Raises:
            CallerError: if the cache folder cannot be written.
            ValueError: if the model cannot be rendered.
        """
        from nfscale.media.render import RENDERING, load_surface, render_scene

        settings = self._settings
        counts = f"{settings.size}-{settings.train}-{settings.test}-{settings.supersampling}"
        home = cache_folder() / f"scenes-{_PACKAGE.version}-{RENDERING}-{counts}"
        if (home / name).is_dir():
            return home / name
        try:
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home, prefix=".rendering-") as working:
                with zipfile.ZipFile(self._archive) as archive:
                    beside = f"{PurePosixPath(path).parent}/"
                    archive.extractall(working, [one for one in archive.namelist() if one.startswith(beside)])
                whole = Path(working) / "scene"
                whole.mkdir()
                render_scene(load_surface(Path(working) / path, 2 * settings.size), whole, settings)
                try:
                    whole.rename(home / name)
                except OSError:
                    if not (home / name).is_dir():  # no other process was first
                        raise
        except OSError as error:
            raise CallerError(f"cannot render into {home}: {error.strerror or error}") from error
        return home / name


def catalogue_of(text: str) -> dict[str, tuple[str, str]]:
    """The models of a furniture catalogue, a Java properties file: name of the model -> (path, category)."""
    entries = dict(re.findall(r"^(model#\d+|category#\d+)=(.*?)\s*$", text, re.MULTILINE))
    found = {}
    for key, path in entries.items():
        if key.startswith("model#"):
            inside = PurePosixPath(path.lstrip("/"))
            found[inside.stem] = (str(inside), entries.get(key.replace("model", "category"), ""))
    return found
