"""Views of textured meshes in the layout of Blender's NeRF data: ray casting on the CPU, no display needed.

The world is Blender's, z up; a mesh is turned upright (its y axis is up, as OBJ files have it), centred, and scaled
into the ball of radius 1. Cameras are at one distance from the origin and look at it: those of `train` spread over the
sphere from below the horizon to the top, those of `test` on a circle between them. Surfaces are diffuse, lit by one
distant light and from all around, so a point looks the same from everywhere, which is what a field without a viewing
direction can represent.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nfscale.errors import CallerError

CAMERA_ANGLE_X = 0.6911112070083618
"""Horizontal field of view in radians, that of the NeRF-synthetic scenes."""

RENDERING = 1
"""Counts the ways in which this module has rendered: another number, other pictures."""

_RADIUS = 3.0  # of the cameras: the ball of radius 1 just fills the view, as 1 / sin(angle / 2) is 2.95
_LOWEST, _HIGHEST = math.radians(-20), math.radians(80)  # elevations of the training views
_TEST_ELEVATION = math.radians(30)
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_LIGHT = np.array([0.35, -0.55, 0.76])
_AMBIENT = 0.45  # of the light that a surface facing the lamp gets: what faces away keeps its texture
_LAYERS = 8  # see-through surfaces that a ray passes at most
_SEE_THROUGH = 0.5  # opacity below which a surface is not there


@dataclass(frozen=True)
class ViewSettings:
    """How a mesh is shown."""

    size: int = 64
    """Pixels of a side."""
    train: int = 48
    test: int = 8
    supersampling: int = 2
    """Rays per pixel, along each side."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Triangles [T] with what a ray that meets them needs to know."""

    corners: np.ndarray
    """float64 [T, 3, 3]."""
    normals: np.ndarray
    """float64 [T, 3, 3], at the corners."""
    uv: np.ndarray
    """float64 [T, 3, 2]."""
    material: np.ndarray
    """int64 [T], into the textures."""
    textures: list[np.ndarray]
    """float32 [h, w, 4] in [0, 1]; of a plain colour [1, 1, 4]."""

    @cached_property
    def caster(self) -> Any:
        """The triangles in embree's tree: made once, for it takes as long as a view."""
        trimesh, intersector = renderer()
        corners = self.corners.reshape(-1, 3)
        return intersector(trimesh.Trimesh(corners, np.arange(len(corners)).reshape(-1, 3), process=False))


def render_scene(surface: Surface, folder: Path, settings: ViewSettings) -> None:
    """Write `transforms_train.json`, `transforms_test.json` and their pictures into a folder that exists."""
    from PIL import Image

    for split, poses in (("train", train_poses(settings.train)), ("test", test_poses(settings.test))):
        (folder / split).mkdir()
        frames = []
        for number, pose in enumerate(poses):
            name = f"{split}/r_{number:03d}"
            Image.fromarray(view_of(surface, pose, settings)).save(folder / f"{name}.png")
            frames.append({"file_path": f"./{name}", "transform_matrix": pose.tolist()})
        text = json.dumps({"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}, indent=1)
        (folder / f"transforms_{split}.json").write_text(text)


# --- cameras


def train_poses(count: int) -> np.ndarray:
    """Evenly spread by area, in turns of the golden angle: [count, 4, 4]."""
    low, high = math.sin(_LOWEST), math.sin(_HIGHEST)
    heights = low + (high - low) * (np.arange(count) + 0.5) / count
    return np.stack([orbit_pose(n * _GOLDEN_ANGLE, math.asin(h), _RADIUS) for n, h in enumerate(heights)])


def test_poses(count: int) -> np.ndarray:
    """Around the object at one elevation: [count, 4, 4]."""
    turns = 2 * math.pi * (np.arange(count) + 0.5) / count
    return np.stack([orbit_pose(turn, _TEST_ELEVATION, _RADIUS) for turn in turns])


def orbit_pose(turn: float, elevation: float, radius: float) -> np.ndarray:
    """Camera to world of a camera that looks at the origin, z up: [4, 4]. It looks down its -z, its y is up."""
    back = np.array([math.cos(turn) * math.cos(elevation), math.sin(turn) * math.cos(elevation), math.sin(elevation)])
    right = np.array([-math.sin(turn), math.cos(turn), 0.0])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = right, np.cross(back, right), back, radius * back
    return pose


# --- meshes


def load_surface(path: Path, texture_side: int) -> Surface:
    """A mesh file with its materials, upright and scaled into the ball of radius 1.

    Args:
        texture_side: larger textures are shrunk to this many pixels, so that distant ones do not flicker.

    Raises:
        CallerError: if trimesh is not installed.
        ValueError: if the file holds no surface.
    """
    trimesh = renderer()[0]
    loaded = trimesh.load(path, process=False)
    parts = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    parts = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not parts:
        raise ValueError(f"{path.name} holds no triangles")
    textures = [_texture_of(part, texture_side) for part in parts]
    corners = _upright(np.concatenate([part.vertices[part.faces] for part in parts]))
    corners -= (corners.min(axis=(0, 1)) + corners.max(axis=(0, 1))) / 2
    reach = np.linalg.norm(corners, axis=2).max()
    if not (np.isfinite(reach) and reach > 0):
        raise ValueError(f"{path.name} has no extent, or vertices that are not finite")
    return Surface(
        corners=corners / reach,
        normals=_upright(np.concatenate([part.vertex_normals[part.faces] for part in parts])),
        uv=np.concatenate([_uv_of(part) for part in parts]),
        material=np.concatenate([np.full(len(part.faces), number) for number, part in enumerate(parts)]),
        textures=textures,
    )


def renderer() -> tuple[Any, Any]:
    """trimesh, and its intersector that uses embree.

    Raises:
        CallerError: saying what to install.
    """
    try:
        import trimesh
        from trimesh.ray.ray_pyembree import RayMeshIntersector
    except ImportError as error:
        raise CallerError(f"rendering scenes needs {error.name}; run `pip install 'nfscale[scenes]'`") from error
    return trimesh, RayMeshIntersector


def _upright(vectors: np.ndarray) -> np.ndarray:
    """y up -> z up."""
    return np.stack([vectors[..., 0], -vectors[..., 2], vectors[..., 1]], axis=-1)


def _uv_of(part: Any) -> np.ndarray:
    """[T, 3, 2]; zeros where the mesh has none."""
    uv = getattr(part.visual, "uv", None)
    return np.zeros((len(part.faces), 3, 2)) if uv is None else np.nan_to_num(np.asarray(uv)[part.faces])


def _texture_of(part: Any, side: int) -> np.ndarray:
    """Colour and opacity of a part: its picture, or its plain colour."""
    material = getattr(part.visual, "material", None)
    picture = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    dissolve = (getattr(material, "kwargs", None) or {}).get("d", 1.0)  # of MTL files: 1 is opaque
    if picture is not None and getattr(part.visual, "uv", None) is not None:
        picture = picture.convert("RGBA")
        picture.thumbnail((side, side))
        texture = np.asarray(picture, dtype=np.float32) / 255
    else:
        colour = getattr(part.visual, "main_color", None) if material is None else material.main_color
        texture = np.asarray(colour, dtype=np.float32).reshape(1, 1, 4) / 255
    texture = texture.copy()
    texture[..., 3] *= float(np.ravel(dissolve)[0])
    return texture


# --- pictures


def view_of(surface: Surface, pose: np.ndarray, settings: ViewSettings) -> np.ndarray:
    """What a camera sees: uint8 [size, size, 4], colour not premultiplied, transparent where nothing is."""
    size, fine = settings.size, settings.size * settings.supersampling
    offsets = ((np.arange(fine) + 0.5) / fine * 2 - 1) * math.tan(CAMERA_ANGLE_X / 2)
    across, down = np.meshgrid(offsets, offsets)
    directions = np.stack([across, -down, -np.ones_like(across)], axis=-1).reshape(-1, 3) @ pose[:3, :3].T
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    seen = _traced(surface, np.broadcast_to(pose[:3, 3], directions.shape), directions)
    block = settings.supersampling
    cells = seen.reshape(size, block, size, block, 4)
    opacity = cells[..., 3].mean(axis=(1, 3))
    colour = (cells[..., :3] * cells[..., 3:]).mean(axis=(1, 3)) / np.maximum(opacity, 1e-6)[..., None]
    return np.rint(np.concatenate([colour, opacity[..., None]], axis=-1).clip(0, 1) * 255).astype(np.uint8)


def _traced(surface: Surface, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Colour and opacity (0 or 1) at the first surface that is not see-through: [R, 4]."""
    seen = np.zeros((len(origins), 4))
    going, starts = np.arange(len(origins)), origins.copy()
    for _ in range(_LAYERS):
        met = surface.caster.intersects_first(starts[going], directions[going])
        going, met = going[met >= 0], met[met >= 0]
        if not len(going):
            break
        places, weights = _place_on(surface, met, origins[going], directions[going])
        colour = _colour_at(surface, met, weights, directions[going])
        solid = colour[:, 3] >= _SEE_THROUGH
        seen[going[solid], :3], seen[going[solid], 3] = colour[solid, :3], 1.0
        going = going[~solid]
        starts[going] = places[~solid] + 1e-4 * directions[going]
    return seen


def _place_on(
    surface: Surface, met: np.ndarray, origins: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where rays meet the planes of their triangles: points [R, 3] and barycentric weights [R, 3]."""
    a, b, c = (surface.corners[met, corner] for corner in range(3))
    ab, ac = b - a, c - a
    normal = np.cross(ab, ac)
    slope = (normal * directions).sum(axis=1)
    along = (normal * (a - origins)).sum(axis=1) / np.where(np.abs(slope) > 1e-12, slope, 1e-12)
    places = origins + along[:, None] * directions
    area = np.maximum((normal * normal).sum(axis=1), 1e-30)
    ap = places - a
    at_b = (np.cross(ap, ac) * normal).sum(axis=1) / area
    at_c = (np.cross(ab, ap) * normal).sum(axis=1) / area
    return places, np.clip(np.stack([1 - at_b - at_c, at_b, at_c], axis=1), 0, 1)


def _colour_at(surface: Surface, met: np.ndarray, weights: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Lit colour and opacity: [R, 4]. A surface has two sides, and the one that is seen is lit."""
    uv = (weights[:, :, None] * surface.uv[met]).sum(axis=1)
    colour = np.empty((len(met), 4))
    for number in np.unique(surface.material[met]):
        of = surface.material[met] == number
        colour[of] = _looked_up(surface.textures[number], uv[of])
    normal = (weights[:, :, None] * surface.normals[met]).sum(axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    facing = np.where((normal * directions).sum(axis=1, keepdims=True) > 0, -1.0, 1.0)
    light = np.clip((facing * normal) @ (_LIGHT / np.linalg.norm(_LIGHT)), 0, 1)
    colour[:, :3] *= (_AMBIENT + (1 - _AMBIENT) * light)[:, None]
    return colour


def _looked_up(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """The texture at u to the right and v upwards, repeated: bilinear, [R, 4]."""
    height, width = texture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    right_part, lower_part = (x - left)[:, None], (y - top)[:, None]

    def at(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return texture[row % height, column % width]

    upper = at(top, left) * (1 - right_part) + at(top, left + 1) * right_part
    lower = at(top + 1, left) * (1 - right_part) + at(top + 1, left + 1) * right_part
    return upper * (1 - lower_part) + lower * lower_part


def mesh_files(paths: Sequence[Path]) -> list[Path]:
    """These files, and the meshes in these folders."""
    suffixes = {".obj", ".glb", ".gltf", ".ply", ".off", ".stl"}
    found = []
    for path in paths:
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes) if path.is_dir() else [path]
        found += below
    return found
