"""Solids in a box: what signals of shapes share. Meshes, points that are drawn, grids that fields are decoded on.

Of a solid a pool of points is drawn once, evenly in the box and near the surface, the same ones for the same mesh;
each step of each field then draws its own minibatch of the pool. What a signal says of a point is the dear part
(microseconds each), so that a pool costs a solid what a few steps would otherwise.

The quality of all of them is the intersection over union of the volumes that the field and the datum call inside,
both within the box.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfscale.rng import Stream, as_tensor, datum_seed, uniform
from nfscale.signals.base import Pointwise, Samples, require_decodable

Inside = Callable[[np.ndarray], np.ndarray]
"""Which points lie inside: float64 [N, 3] in the datum's own coordinates -> bool [N]."""

Distance = Callable[[np.ndarray, float], np.ndarray]
"""How far points are from the surface, on either side: float64 [N, 3] -> [N], in the datum's own unit.

The number is the largest distance that matters; beyond it any larger one may be said, which spares most of the search.
"""

_MARGIN = 0.9
"""Of the box's half side: where the longest side of a solid ends. What is left shows whether a field knows where
the solid ends; more of it would be points spent on nothing."""

_DRAWS = {name: number for number, name in enumerate(("even", "triangle", "corner", "noise", "angle", "check", "any"))}
"""What numbers are drawn for, each with a sequence of its own."""

_ORDER_BITS = 10  # per axis of the curve along which points are ordered: cells of a 500th of the box


@dataclass(frozen=True)
class Mesh:
    """A surface of triangles."""

    vertices: np.ndarray
    """float64 [V, 3], (x, y, z)."""
    faces: np.ndarray
    """int64 [T, 3] positions of vertices."""


@dataclass(frozen=True)
class Solid:
    """A surface and what it encloses. `nfscale.media.solids.solid_of` makes one of a mesh."""

    mesh: Mesh
    inside: Inside
    distance: Distance | None = None
    """None: not known, and then there is no distance to be fitted."""


@dataclass(frozen=True)
class Grid:
    """What a field says at the centres of the voxels of a grid."""

    levels: np.ndarray
    """float32 [X, Y, Z], above 0 inside: logits of an occupancy; of distances, how far below the surface."""
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    """The coordinate c of the field is the point centre + scale * c of the datum."""

    def points(self, indices: np.ndarray) -> np.ndarray:
        """Where fractional voxel indices are in the datum's own coordinates: [..., 3] -> float64 [..., 3]."""
        sizes = np.array(self.levels.shape)
        return np.array(self.centre) + self.scale * (2 * indices + 1 - sizes) / sizes.max()


@dataclass(frozen=True)
class Solids(Pointwise):
    """The base of signals of solids in a box.

    Coordinates are (x, y, z). The longest side of a mesh spans [-0.9, 0.9], the longest side of a voxel grid
    [-1, 1] from edge to edge; both are scaled alike on all axes, and lie in the middle.
    """

    channels: int = 1
    pool: int = 262_144
    """Points of a solid to draw minibatches from."""
    near: float = 0.5
    """Share of the pool that lies near the surface; the rest is spread evenly over the box."""
    spread: float = 0.02
    """How near: standard deviation of the distance from a point of the surface, on each axis. The box is 2 wide."""
    check: int = 64_000
    """Points that loss and IoU are measured on, of a solid: one in each cell of a lattice, so that the number is
    rounded to a cube. Of a voxel grid and of labelled points: so many of them where there are more."""
    holdout: int | None = None
    """Keep one in so many points back, at random: of those that would be checked of a solid, of the voxels of a
    grid or of labelled points."""
    resolution: int = 64
    """Voxels on a side of the grid that a mesh is decoded at where no shape is asked for."""

    dimensions = 3
    quality_name = "iou"

    def __post_init__(self) -> None:
        if self.channels != 1:
            raise ValueError(f"signal.channels: {self._named} has 1 channel, got {self.channels}")
        for name in ("pool", "check", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"signal.{name} is at least 1, got {getattr(self, name)}")
        if not 0 <= self.near < 1:
            raise ValueError(f"signal.near is in [0, 1), got {self.near}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout is at least 2, got {self.holdout}")
        if not 0 < self.spread < 1:
            raise ValueError(f"signal.spread is in (0, 1), got {self.spread}")

    # What a signal says of points

    _named = "a solid"
    """The datum, in the messages."""

    def _values_of(self, solid: Solid, centre: np.ndarray, scale: float, points: np.ndarray) -> np.ndarray:
        """Of a solid at points float32 [N, 3] of the box: float32 [N, ...], as the samples have them."""
        raise NotImplementedError

    def _given(self, content: Any) -> tuple[np.ndarray, np.ndarray]:
        """Points float32 [N, 3] and values float32 [N, ...] of a datum that brings both; raises ValueError."""
        raise NotImplementedError

    def _inside(self, values: Tensor) -> Tensor:
        """Of values or predictions [..., N, ...], those that mean inside: bool [..., N]."""
        raise NotImplementedError

    def _spreads(self, count: int) -> np.ndarray | float:
        """`spread` of each of so many points near the surface: [count, 1], or one for all."""
        return self.spread

    # The contract

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """There is one channel."""
        return keys | {"channels": 1} if keys["channels"] == "auto" else keys

    def samples(self, content: Any) -> Samples:
        """Samples along a Morton curve."""
        if isinstance(content, Solid):
            return self._of_solid(content)
        fitted, heldout = self._divided(*self._given(content))
        check = None
        if len(fitted.values) > self.check:
            some = _any(len(fitted.values), self.check)
            check = Samples(fitted.coordinates[some], fitted.values[some])
        self._require_both(check or fitted)
        return Samples(fitted.coordinates, fitted.values, check=check, heldout=heldout)

    def _of_solid(self, solid: Solid) -> Samples:
        centre, scale = frame(solid.mesh)
        near = round(self.near * self.pool)
        pool = np.concatenate([_even(self.pool - near), _near(solid.mesh, centre, scale, near, self._spreads(near))])
        fresh = _lattice(max(2, round(self.check ** (1 / 3))))
        values = self._values_of(solid, centre, scale, np.concatenate([pool, fresh]))
        check, heldout = self._divided(fresh, values[len(pool) :])
        self._require_both(check)
        fitted = _samples(pool, values[: len(pool)])
        return Samples(fitted.coordinates, fitted.values, check=check, heldout=heldout)

    def _divided(self, points: np.ndarray, values: np.ndarray) -> tuple[Samples, Samples | None]:
        """Points that are used and points that are held back."""
        held = np.zeros(len(points), bool)
        if self.holdout is not None:
            held[_any(len(points), len(points) // self.holdout)] = True
        heldout = _samples(points[held], values[held]) if held.any() else None
        return _samples(points[~held], values[~held]), heldout

    def _require_both(self, measured: Samples) -> None:
        """Refuse a shape without an inside or without an outside: neither has an IoU to speak of."""
        share = float(self._inside(measured.values).float().mean())
        if share in (0.0, 1.0):
            seen = "nothing" if share == 0 else "everything"
            raise ValueError(f"{seen} lies inside: the surface is flat, wide open or thinner than the points are apart")

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Intersection over union: 1 where nothing lies inside and nothing is predicted to."""
        guessed, inside = self._inside(predicted), self._inside(alike(predicted, samples))
        weight = 1.0 if samples.mask is None else samples.mask
        common, either = ((part * weight).sum(dim=1) for part in (guessed & inside, guessed | inside))
        return torch.where(either > 0, common / either.clamp(min=1e-30), torch.ones_like(either))

    def measures(self, content: Any) -> dict[str, float]:
        """The grid that the datum is decoded at, and how coordinates become the datum's own: centre + scale * c."""
        sizes, centre, scale = (self.resolution,) * 3, (0.0, 0.0, 0.0), 1.0
        if isinstance(content, Solid):
            centre, scale = frame(content.mesh)
        elif isinstance(content, np.ndarray):
            sizes = content.shape  # voxel i of the datum spans i to i + 1
            centre, scale = np.array(sizes) / 2, max(sizes) / 2
        numbers = [*(float(size) for size in sizes), *(float(c) for c in centre), float(scale)]
        return dict(zip(_MEASURES, numbers, strict=True))

    def shape_of(self, measures: dict[str, float]) -> tuple[Any, ...]:
        """(X, Y, Z, centre x, y, z, scale)."""
        numbers = [measures[name] for name in _MEASURES]
        return (*(int(size) for size in numbers[:3]), *numbers[3:])

    def shape_from(self, text: str, fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        """`128`: voxels along the longest side; or `128x96x64`, along x, y and z."""
        parts = text.lower().split("x")
        if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"cannot read {text!r}; write the voxels of the longest side, such as 128, or 128x96x64")
        sizes = [int(part) for part in parts]
        if len(sizes) == 1:
            sizes = [max(1, round(sizes[0] * size / max(fitted[:3]))) for size in fitted[:3]]
        require_decodable(sizes[0] * sizes[1] * sizes[2])
        return (*sizes, *fitted[3:])

    def coordinates(self, shape: tuple[Any, ...]) -> Tensor:
        """Centres of cubic voxels, z fastest: [X * Y * Z, 3]."""
        return voxel_centres(tuple(int(size) for size in shape[:3]))


_MEASURES = ("size_x", "size_y", "size_z", "centre_x", "centre_y", "centre_z", "scale")


def grids(levels: Tensor, shape: tuple[Any, ...]) -> list[Grid]:
    """[F, X * Y * Z] -> grids. Of a shape without centre and scale: in the coordinates of the fields."""
    centre, scale = (tuple(shape[3:6]), shape[6]) if len(shape) > 3 else ((0.0, 0.0, 0.0), 1.0)
    fields = levels.detach().cpu().reshape(-1, *(int(size) for size in shape[:3])).numpy()
    return [Grid(field, centre, scale) for field in fields]


def alike(predicted: Tensor, samples: Samples) -> Tensor:
    """The values, for predictions of their shape.

    Raises:
        ValueError: if the shapes differ (both are printed).
    """
    if predicted.shape != samples.values.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} against values {tuple(samples.values.shape)}")
    return samples.values


def require_grid(content: np.ndarray) -> None:
    """Refuse an array that is no voxel grid.

    Raises:
        ValueError: saying what was seen.
    """
    if content.ndim != 3 or 0 in content.shape:
        raise ValueError(f"a voxel grid is [x, y, z], got shape {list(content.shape)}")


def frame(mesh: Mesh) -> tuple[np.ndarray, float]:
    """Centre [3] and scale that bring the longest side of the mesh to [-_MARGIN, _MARGIN].

    Raises:
        ValueError: if the mesh has no size, or none that is a number.
    """
    used = mesh.vertices[np.unique(mesh.faces)]
    if not len(used) or not np.isfinite(used).all():
        raise ValueError("the mesh has no faces, or vertices that are not a number")
    low, high = used.min(axis=0).astype(np.float64), used.max(axis=0).astype(np.float64)
    scale = float((high / 2 - low / 2).max()) / _MARGIN  # halved first: the difference of large numbers may overflow
    if not 1e-100 < scale < 1e100:
        raise ValueError(f"the mesh is {2 * scale * _MARGIN:.3g} in size; a solid is larger than a point, and finite")
    return low / 2 + high / 2, scale


# --- points


def _samples(points: np.ndarray, values: np.ndarray) -> Samples:
    """Points [N, 3] with values [N, ...] as samples in the order of a Morton curve."""
    order = _z_order(points)
    return Samples(torch.from_numpy(points[order]), torch.from_numpy(values[order]))


def _z_order(points: np.ndarray) -> np.ndarray:
    """Positions [N] of points [N, 3] in [-1, 1], visited along the Morton curve."""
    cells = ((points + 1) * (1 << _ORDER_BITS) / 2).astype(np.int64).clip(0, (1 << _ORDER_BITS) - 1)
    code = np.zeros(len(points), np.int64)
    for bit, axis in product(range(_ORDER_BITS), range(3)):
        code |= ((cells[:, axis] >> bit) & 1) << (3 * bit + 2 - axis)
    return np.argsort(code, kind="stable")


@lru_cache(maxsize=4)
def voxel_centres(sizes: tuple[int, ...]) -> Tensor:
    """float32 [X * Y * Z, 3] of cubic voxels whose longest row spans [-1, 1]."""
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1 - n) / max(sizes) for n in sizes]
    return torch.cartesian_prod(*axes).to(torch.float32)


def _drawn(purpose: str, count: int) -> np.ndarray:
    """Uniform float32 [count] in [0, 1), the same at every call: shapes are asked at the same points."""
    seed = as_tensor([datum_seed(0, "occupancy")])
    return uniform(seed, Stream.SAMPLING, _DRAWS[purpose], count)[0].numpy()


def _even(count: int) -> np.ndarray:
    """Points spread evenly over the box: float32 [count, 3]."""
    return _drawn("even", 3 * count).reshape(-1, 3) * 2 - 1


@lru_cache(maxsize=2)
def _lattice(cells: int) -> np.ndarray:
    """A point in each of cells^3 cells: an estimate of a volume from them errs less than from independent points."""
    corners = np.indices((cells,) * 3).reshape(3, -1).T.astype(np.float32)
    return (corners + _drawn("check", 3 * cells**3).reshape(-1, 3)) * np.float32(2 / cells) - 1


def on_surface(corners: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of triangles [T, 3, 3], each equally likely: float64 [count, 3], and the triangle of each, [count].

    Raises:
        ValueError: if all of the triangles are flat.
    """
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    total = np.cumsum(areas)
    if not total[-1] > 0:
        raise ValueError("the surface has no area: all of its triangles are flat")
    chosen = np.searchsorted(total, _drawn("triangle", count) * total[-1], side="right").clip(max=len(total) - 1)
    u, v = _drawn("corner", 2 * count).reshape(2, -1).astype(np.float64)
    folded = u + v > 1
    u, v = np.where(folded, 1 - u, u), np.where(folded, 1 - v, v)
    weights = np.stack([1 - u - v, u, v], axis=1)
    return (corners[chosen] * weights[:, :, None]).sum(axis=1), chosen


def _near(mesh: Mesh, centre: np.ndarray, scale: float, count: int, spread: np.ndarray | float) -> np.ndarray:
    """Points of the surface, each equally likely, moved by a normal deviate on each axis: float32 [count, 3]."""
    points, _ = on_surface((mesh.vertices[mesh.faces].astype(np.float64) - centre) / scale, count)
    return (points + spread * _normal(3 * count).reshape(-1, 3)).clip(-1, 1).astype(np.float32)


def _normal(count: int) -> np.ndarray:
    """Normal deviates by the transform of Box and Muller: float64 [count]."""
    radius = np.sqrt(-2 * np.log1p(-_drawn("noise", count).astype(np.float64)))
    return radius * np.cos(2 * np.pi * _drawn("angle", count))


def _any(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` positions, at random but the same ones at every call, in their order."""
    return np.sort(np.argsort(_drawn("any", count), kind="stable")[:wanted])
