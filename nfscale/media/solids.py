"""What media of solids share: meshes in, meshes by marching cubes out; a datum is shown from two sides.

What lies inside a mesh is decided by its generalized winding number (Barill et al., "Fast Winding Numbers for Soups
and Clouds", SIGGRAPH 2018, as libigl has it): how often the surface goes around a point, which is a whole number
for a closed surface and something between for one with holes. A point is inside where it is above a half in size:
surfaces may be open, made of several parts, or turned inside out. How far the surface is, is the distance to the
closest point of any triangle, by libigl's tree of boxes.
"""

from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from nfscale.errors import CallerError
from nfscale.media import meshes, pictures
from nfscale.media.base import Beside, Decode, Panel
from nfscale.signals.solids import Grid, Mesh, Solid

MAX_VOXELS = 512**3
"""Of a grid: 134 million, which take 2 GB of coordinates and values."""

_GRIDS = (".npy", ".npz")
_INSIDE = 0.5  # of the winding number
_VIEWS = ((-30.0, 20.0), (150.0, 20.0))  # azimuth and elevation in degrees: from the front and from behind
_PICTURE = 220  # pixels of a side
_CANDIDATES = 1 << 20  # pixels that triangles may cover, looked at together: 200 MB
_CLAY, _WRONG = np.array([148, 176, 206]), np.array([230, 70, 40])
_DARKEST = 0.35  # share of the colour that a surface seen from its edge keeps: it shows on a black page, too
_FAR = 0.02  # of the longest side: a distance that shows in full colour


class SolidMedium:
    """The base of media whose content is a `Solid`, or a voxel grid [X, Y, Z] of numbers."""

    suffixes = frozenset({*meshes.READERS, *_GRIDS})
    written: tuple[str, ...] = (".obj", ".ply", ".off", ".stl", ".glb", ".npy")
    panel_pixels = 200
    legend = (
        "original and rebuilt, each from two sides; original, red where the rebuilt surface is away by 2 % of its size"
    )

    def voxels(self, grid: Grid) -> np.ndarray:
        """What is written to a `.npy`: the content that such a grid would be read from."""
        raise NotImplementedError

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Solid | np.ndarray:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in _GRIDS:
            return read_grid(stream)
        if suffix not in meshes.READERS:
            known = ", ".join(sorted(self.suffixes))
            raise ValueError(f"no kind of mesh is known by the suffix {suffix!r}; known are {known}")
        return solid_of(meshes.read_mesh(stream, suffix))

    def write(self, content: Grid, path: Path) -> None:
        """The surface as `mesh_of` has it; to `.npy`, the grid itself."""
        if path.suffix.lower() == ".npy":
            np.save(path, self.voxels(content))
            return
        mesh = mesh_of(content)
        if not len(mesh.faces):
            raise CallerError("the field has nothing inside at this resolution, so there is no surface to write")
        made = _trimesh().Trimesh(mesh.vertices, mesh.faces, process=False)
        path.write_bytes(_encoded(made.export(file_type=path.suffix.lower()[1:])))

    def measurable(self, original: Any) -> bool:
        return False

    def measures(self, original: Any, rebuilt: Grid) -> dict[str, float]:
        return {}

    def panels(self, original: Any, rebuilt: Grid, decode: Decode) -> list[Panel]:
        """The original, what the field says, and the original with what is wrong."""
        made = mesh_of(rebuilt)
        mesh = mesh_of(original) if isinstance(original, Grid) else original
        if not isinstance(mesh, Mesh):  # points without a surface
            return [_panel(made, None)] if len(made.faces) else []
        if not len(made.faces):
            return [_panel(mesh, mesh)]
        return [_panel(mesh, mesh), _panel(made, mesh), _panel(mesh, mesh, _wrong(mesh, made))]


def solid_of(mesh: Mesh) -> Solid:
    """A mesh with what it encloses.

    Raises:
        ValueError: if it is no surface, see `meshes.checked`.
        CallerError: if libigl is not installed.
    """
    igl, mesh = _igl(), meshes.checked(mesh)

    def inside(points: np.ndarray) -> np.ndarray:
        return np.abs(igl.fast_winding_number(mesh.vertices, mesh.faces, points)) > _INSIDE

    def distance(points: np.ndarray, largest: float) -> np.ndarray:
        unsigned = igl.SignedDistanceType.SIGNED_DISTANCE_TYPE_UNSIGNED
        away = igl.signed_distance(points, mesh.vertices, mesh.faces, unsigned, -largest, largest)[0]
        return np.where(np.isnan(away), np.inf, away)  # it says NaN beyond the bounds

    return Solid(mesh, inside, distance)


def read_grid(stream: BinaryIO) -> np.ndarray:
    """A voxel grid [X, Y, Z] out of a .npy, or a .npz that holds one array.

    Raises:
        ValueError: in a sentence that becomes the row's reason.
    """
    from nfscale.datasets.folder import reason_of

    try:
        return _grid(stream)
    except Exception as error:  # a damaged file makes NumPy raise EOFError, BadZipFile, zlib.error, KeyError, ...
        raise ValueError(reason_of(error)) from error


def _grid(stream: BinaryIO) -> np.ndarray:
    import zipfile

    if stream.read(2) != b"PK":
        stream.seek(0)
        return _array(stream)
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if len(names) != 1:
            raise ValueError(f"a .npz with {len(names)} arrays; expected one, the voxel grid")
        with archive.open(names[0]) as member:
            return _array(member)


def _array(stream: Any) -> np.ndarray:
    """A .npy of three dimensions, read after its header has been looked at."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if len(shape) != 3 or dtype.kind not in "biuf":
        raise ValueError(f"a voxel grid is [x, y, z] of truths or numbers, got {dtype} {list(shape)}")
    count = shape[0] * shape[1] * shape[2]
    if not 0 < count <= MAX_VOXELS:
        raise ValueError(f"a voxel grid of {' x '.join(map(str, shape))}; from 1 to {MAX_VOXELS} voxels are read")
    content = stream.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise ValueError(f"cut off: {len(content)} bytes of values, the header claims {count * dtype.itemsize}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def mesh_of(grid: Grid) -> Mesh:
    """The surface where the level is 0, in the datum's own coordinates; without faces where nothing is inside.

    By marching cubes between the centres of voxels. What lies beyond the grid is outside, so that surfaces close.
    """
    from skimage.measure import marching_cubes

    levels = grid.levels
    if not (levels > 0).any():
        return Mesh(np.empty((0, 3)), np.empty((0, 3), np.int64))
    outside = min(-1.0, float(levels.min()))
    padded = np.pad(levels, 1, constant_values=outside)
    vertices, faces, *_ = marching_cubes(padded, 0.0, gradient_direction="ascent")  # so that faces look outwards
    return Mesh(grid.points(vertices.astype(np.float64) - 1), np.ascontiguousarray(faces, np.int64))


def closest(mesh: Mesh, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the surface is from points [N, 3], and the triangle that is closest: [N], [N]."""
    squared, triangles, _ = _igl().point_mesh_squared_distance(points, mesh.vertices, mesh.faces)
    return np.sqrt(squared), triangles


def _wrong(original: Mesh, rebuilt: Mesh) -> np.ndarray:
    """Of each triangle of the original, how far the rebuilt surface is from its middle: [T], 1 is too far."""
    away, _ = closest(rebuilt, original.vertices[original.faces].mean(axis=1))
    used = original.vertices[np.unique(original.faces)]
    return away / (_FAR * np.ptp(used, axis=0).max())


# --- pictures


def _panel(mesh: Mesh, framed: Mesh | None, wrong: np.ndarray | None = None) -> Panel:
    """Both views of a mesh, one below the other, at the scale of the mesh by which the picture is framed."""
    views = [drawn(mesh, framed or mesh, azimuth, elevation, wrong) for azimuth, elevation in _VIEWS]
    return Panel("image/png", pictures.encoded(np.concatenate(views), "PNG"))


def drawn(mesh: Mesh, framed: Mesh, azimuth: float, elevation: float, wrong: np.ndarray | None = None) -> np.ndarray:
    """A mesh of clay as seen from far away, y up, lit from behind the eye: uint8 [H, W, 4], clear around it.

    Args:
        framed: the mesh that just fills the picture.
        wrong: of each triangle, from 0 (clay) to 1 (red).
    """
    side = 2 * _PICTURE  # drawn at twice the size: four pixels make one
    turned = _rotation(azimuth, elevation)
    seen = framed.vertices[np.unique(framed.faces)] @ turned.T
    low, high = seen.min(axis=0), seen.max(axis=0)
    scale = 0.96 * side / max(float((high - low)[:2].max()), 1e-300)
    corners = ((mesh.vertices @ turned.T - (low + high) / 2) * scale + side / 2)[mesh.faces]
    nearest, which = _rasterized(corners, side)
    edges = corners[:, 1:] - corners[:, :1]
    normals = np.cross(edges[:, 0], edges[:, 1])
    facing = np.abs(normals[:, 2]) / np.maximum(np.linalg.norm(normals, axis=1), 1e-300)
    colours = np.broadcast_to(_CLAY, (len(mesh.faces), 3)).astype(np.float64)
    if wrong is not None:
        colours = colours + (_WRONG - colours) * wrong.clip(0, 1)[:, None]
    colours = colours * (_DARKEST + (1 - _DARKEST) * facing)[:, None]
    shown = np.isfinite(nearest)
    image = np.zeros((side, side, 4))
    image[shown] = np.concatenate([colours[which[shown]], np.full((int(shown.sum()), 1), 255.0)], axis=1)
    image = image[::-1].reshape(_PICTURE, 2, _PICTURE, 2, 4).mean(axis=(1, 3))  # rows go down, y goes up
    image[..., :3] *= 255 / np.maximum(image[..., 3:], 1)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def _rotation(azimuth: float, elevation: float) -> np.ndarray:
    """The turn [3, 3] after which z points to an eye above the (x, z) plane."""
    a, e = np.radians([azimuth, elevation])
    around = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    over = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
    return over @ around


def _rasterized(corners: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each pixel [side, side], rows by y: the largest z of a triangle [T, 3, 3] there (-inf: none), and which."""
    nearest, which = np.full(side * side, -np.inf), np.zeros(side * side, np.int64)
    low = np.floor(corners[:, :, :2].min(axis=1)).clip(0, side).astype(np.int64)
    high = (np.floor(corners[:, :, :2].max(axis=1)) + 1).clip(0, side).astype(np.int64)
    spans = (high - low).clip(0)
    counts = spans[:, 0] * spans[:, 1]
    edges = np.searchsorted(np.cumsum(counts), np.arange(0, counts.sum() + _CANDIDATES, _CANDIDATES), side="left")
    for start, stop in zip(edges[:-1], [*edges[1:-1], len(corners)], strict=True):
        own = np.repeat(np.arange(start, stop), counts[start:stop])
        place = np.arange(len(own)) - np.repeat(np.cumsum(counts[start:stop]) - counts[start:stop], counts[start:stop])
        x, y = low[own, 0] + place % spans[own, 0], low[own, 1] + place // spans[own, 0]
        one, two, three = corners[own].transpose(1, 0, 2)
        ux, uy, vx, vy = two[:, 0] - one[:, 0], two[:, 1] - one[:, 1], three[:, 0] - one[:, 0], three[:, 1] - one[:, 1]
        area = ux * vy - uy * vx
        dx, dy = x + 0.5 - one[:, 0], y + 0.5 - one[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            u, v = (dx * vy - dy * vx) / area, (ux * dy - uy * dx) / area
        z = one[:, 2] + u * (two[:, 2] - one[:, 2]) + v * (three[:, 2] - one[:, 2])
        pixel = y * side + x
        covered = np.flatnonzero((u >= 0) & (v >= 0) & (u + v <= 1) & (area != 0))
        covered = covered[z[covered] > nearest[pixel[covered]]]
        covered = covered[np.argsort(z[covered], kind="stable")]  # of several at one pixel the last stays
        nearest[pixel[covered]], which[pixel[covered]] = z[covered], own[covered]
    return nearest.reshape(side, side), which.reshape(side, side)


# --- packages that not everyone has


def _igl() -> Any:
    try:
        import igl
    except ImportError as error:
        raise CallerError("what lies inside a mesh is decided by libigl; pip install 'nfscale[shapes]'") from error
    return igl


def _trimesh() -> Any:
    try:
        import trimesh
    except ImportError as error:
        raise CallerError("meshes are written by trimesh; pip install 'nfscale[shapes]', or write .npy") from error
    return trimesh


def _encoded(exported: str | bytes) -> bytes:
    return exported.encode() if isinstance(exported, str) else exported
