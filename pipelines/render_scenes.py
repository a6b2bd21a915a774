"""Views of textured meshes in the layout of Blender's NeRF data: a folder per mesh, for `dataset: {kind: folder}`.

    python pipelines/render_scenes.py meshes/ scenes/ --size 96 --views 48 --test-views 8
    nfscale encode pipelines/scenes.yaml \
        'dataset={kind: folder, path: scenes/, pattern: "*/transforms_train.json"}' output=runs/mine

Needs pip install 'nfscale[scenes]'; no display. OBJ, GLB, PLY, OFF and STL files are read, with their textures; each is
scaled into the ball of radius 1. A folder that is there already is left as it is. Scenes that Blender itself has
rendered need none of this: they have the layout.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from nfscale.errors import NfscaleError
from nfscale.media.render import ViewSettings, load_surface, mesh_files, render_scene


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", type=Path, nargs="+", help="mesh files, or folders of them")
    parser.add_argument("scenes", type=Path, help="folder to write to")
    parser.add_argument("--size", type=int, default=96, help="pixels of a side of a view")
    parser.add_argument("--views", type=int, default=48, help="views to train on")
    parser.add_argument("--test-views", type=int, default=8, help="views to hold back")
    options = parser.parse_args()
    if min(options.size, options.views, options.test_views) < 1:
        parser.error("--size, --views and --test-views are at least 1")
    settings = ViewSettings(options.size, options.views, options.test_views)
    failed = 0
    for path in mesh_files(options.meshes):
        try:
            print(f"{path} -> {rendered(path, options.scenes, settings)}")
        except (NfscaleError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        except Exception as error:  # a damaged mesh makes its reader raise anything; the others are rendered
            print(f"{path}: {type(error).__name__} {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def rendered(path: Path, scenes: Path, settings: ViewSettings) -> Path:
    """The scene's folder, which appears whole."""
    home = scenes / path.stem
    if home.exists():
        return home
    scenes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scenes, prefix=".rendering-") as working:
        whole = Path(working) / "scene"
        whole.mkdir()
        render_scene(load_surface(path, 2 * settings.size), whole, settings)
        shutil.move(whole, home)
    return home


if __name__ == "__main__":
    sys.exit(main())
