"""Occupancy: points of a box to the logit that they lie inside a solid, binary cross-entropy, IoU.

Three things can be fitted: a `Solid` (a mesh with a function that says which points it encloses), a voxel grid,
and `Labelled` points. Of a solid a pool of points is drawn once, evenly in the box and near the surface, the
same ones for the same mesh; each step of each field then draws its own minibatch of the pool. Labelling
points is the dear part (microseconds each), so that a pool costs a solid what a few steps would otherwise.

Values are +1 inside and -1 outside, so that a sign is what values and logits share.

The quality is the intersection over union of the volumes {probability > 1/2} and {inside}, both within the box. The
code released with Chng, Saratchandran & Lucey (CVPR 2025) cuts the *logit* at 0.5 instead, which is probability 0.62.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nfscale.rng import Stream, as_tensor, datum_seed, uniform
from nfscale.signals.base import Pointwise, Samples, require_decodable

Inside = Callable[[np.ndarray], np.ndarray]
"""Which points lie inside: float64 [N, 3] in the datum's own coordinates -> bool [N]."""

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
    """A surface and what it encloses. `nfscale.media.occupancy.solid_of` makes one of a mesh."""

    mesh: Mesh
    inside: Inside


@dataclass(frozen=True)
class Labelled:
    """Points of which it is known whether they lie inside."""

    points: np.ndarray
    """[N, 3] in [-1, 1]."""
    inside: np.ndarray
    """bool [N]."""


@dataclass(frozen=True)
class Grid:
    """What a field says at the centres of the voxels of a grid: inside where the logit is above 0."""

    logits: np.ndarray
    """float32 [X, Y, Z]."""
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    """The coordinate c of the field is the point centre + scale * c of the datum."""

    def points(self, indices: np.ndarray) -> np.ndarray:
        """Where fractional voxel indices are in the datum's own coordinates: [..., 3] -> float64 [..., 3]."""
        sizes = np.array(self.logits.shape)
        return np.array(self.centre) + self.scale * (2 * indices + 1 - sizes) / sizes.max()


@dataclass(frozen=True)
class Occupancy(Pointwise):
    """Solids in a box.

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
            raise ValueError(f"signal.channels: an occupancy has 1 channel, got {self.channels}")
        for name in ("pool", "check", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"signal.{name} is at least 1, got {getattr(self, name)}")
        if not 0 <= self.near < 1:
            raise ValueError(f"signal.near is in [0, 1), got {self.near}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout is at least 2, got {self.holdout}")
        if not 0 < self.spread < 1:
            raise ValueError(f"signal.spread is in (0, 1), got {self.spread}")

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """There is one channel."""
        return keys | {"channels": 1} if keys["channels"] == "auto" else keys

    def samples(self, content: Solid | Labelled | np.ndarray) -> Samples:
        """Samples of a solid, of a voxel grid [X, Y, Z] of truths, or of labelled points, along a Morton curve."""
        if isinstance(content, Solid):
            return self._of_solid(content)
        fitted, heldout = self._divided(*_labelled(content))
        check = None
        if len(fitted.values) > self.check:
            some = _any(len(fitted.values), self.check)
            check = Samples(fitted.coordinates[some], fitted.values[some])
        _require_both(check or fitted)
        return Samples(fitted.coordinates, fitted.values, check=check, heldout=heldout)

    def _of_solid(self, solid: Solid) -> Samples:
        centre, scale = _frame(solid.mesh)
        near = round(self.near * self.pool)
        pool = np.concatenate([_even(self.pool - near), _near(solid.mesh, centre, scale, near, self.spread)])
        fresh = _lattice(max(2, round(self.check ** (1 / 3))))
        inside = solid.inside(centre + scale * np.concatenate([pool, fresh]).astype(np.float64))
        check, heldout = self._divided(fresh, inside[len(pool) :])
        _require_both(check)
        fitted = _samples(pool, inside[: len(pool)])
        return Samples(fitted.coordinates, fitted.values, check=check, heldout=heldout)

    def _divided(self, points: np.ndarray, inside: np.ndarray) -> tuple[Samples, Samples | None]:
        """Points that are used and points that are held back."""
        held = np.zeros(len(points), bool)
        if self.holdout is not None:
            held[_any(len(points), len(points) // self.holdout)] = True
        heldout = _samples(points[held], inside[held]) if held.any() else None
        return _samples(points[~held], inside[~held]), heldout

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Binary cross-entropy of the logits, in nats."""
        entropy = softplus(-predicted * _alike(predicted, samples)).mean(dim=-1)
        if samples.mask is None:
            return entropy.mean(dim=-1)
        return (entropy * samples.mask).sum(dim=-1) / samples.mask.sum(dim=-1)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Intersection over union: 1 where nothing lies inside and nothing is predicted to."""
        guessed, inside = predicted > 0, _alike(predicted, samples) > 0
        weight = 1.0 if samples.mask is None else samples.mask[..., None]
        common, either = (((part * weight).sum(dim=(1, 2))) for part in (guessed & inside, guessed | inside))
        return torch.where(either > 0, common / either.clamp(min=1e-30), torch.ones_like(either))

    def measures(self, content: Solid | Labelled | np.ndarray) -> dict[str, float]:
        """The grid that the datum is decoded at, and how coordinates become the datum's own: centre + scale * c."""
        sizes, centre, scale = (self.resolution,) * 3, (0.0, 0.0, 0.0), 1.0
        if isinstance(content, Solid):
            centre, scale = _frame(content.mesh)
        elif not isinstance(content, Labelled):
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
        return _voxel_centres(tuple(int(size) for size in shape[:3]))

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[Grid]:
        """Logits [F, X * Y * Z, 1] -> grids. Of a shape without centre and scale: in the coordinates of the fields."""
        centre, scale = (tuple(shape[3:6]), shape[6]) if len(shape) > 3 else ((0.0, 0.0, 0.0), 1.0)
        logits = values.detach().cpu().reshape(-1, *(int(size) for size in shape[:3])).numpy()
        return [Grid(field, centre, scale) for field in logits]

    def original(self, content: Solid | Labelled | np.ndarray) -> Mesh | Labelled | Grid:
        """The surface of a solid; a voxel grid as if a field had said it; labelled points as they are."""
        if isinstance(content, Solid):
            return content.mesh
        if isinstance(content, Labelled):
            return content
        (grid,) = self.reconstruct(torch.from_numpy(_signs(_voxels(content))), self.shape_of(self.measures(content)))
        return grid

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "occupancy",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(x, y, z) = (point - centre) / scale, in [-1, 1]; centre, scale are in the row's metrics",
            "coordinate_range": [-1.0, 1.0],
            "output": {"scale": 1.0, "shift": 0.0, "meaning": "logit of being inside; probability 1/2 at 0"},
            "quality": "iou is the intersection over union of {logit > 0} and the solid, in the box [-1, 1]^3 "
            "or in that of the voxel grid",
        }


_MEASURES = ("size_x", "size_y", "size_z", "centre_x", "centre_y", "centre_z", "scale")


def _alike(predicted: Tensor, samples: Samples) -> Tensor:
    """The values, for predictions of their shape.

    Raises:
        ValueError: if the shapes differ (both are printed).
    """
    if predicted.shape != samples.values.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} against values {tuple(samples.values.shape)}")
    return samples.values


# --- contents


def _labelled(content: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [N, 3] and which lie inside, bool [N], of a voxel grid or of labelled points."""
    if isinstance(content, np.ndarray):
        inside = _voxels(content)
        return _voxel_centres(inside.shape).numpy(), inside.reshape(-1)
    if isinstance(content, Mesh):
        raise ValueError("a mesh without what it encloses; nfscale.media.occupancy.solid_of(mesh) makes a solid of it")
    if not isinstance(content, Labelled):
        raise ValueError(f"a shape is a solid, a voxel grid or labelled points; got {type(content).__name__}")
    points, inside = np.asarray(content.points, np.float32), _truths(np.asarray(content.inside), "a label")
    if points.ndim != 2 or points.shape[1] != 3 or inside.shape != points.shape[:1] or not len(points):
        raise ValueError(f"labelled points are [N, 3] with [N] labels, got {list(points.shape)}, {list(inside.shape)}")
    if not (np.abs(points) <= 1).all():
        raise ValueError("labelled points lie in [-1, 1]; some are outside or not a number")
    return points, inside


def _voxels(content: np.ndarray) -> np.ndarray:
    if content.ndim != 3 or 0 in content.shape:
        raise ValueError(f"a voxel grid is [x, y, z], got shape {list(content.shape)}")
    return _truths(content, "a voxel")


def _truths(array: np.ndarray, what: str) -> np.ndarray:
    """Booleans, or numbers that are 0 or 1, as booleans."""
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf" or not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{what} is true or false, or 1 or 0; got {array.dtype} with other values, or not a number")
    return array == 1


def _frame(mesh: Mesh) -> tuple[np.ndarray, float]:
    """Centre [3] and scale that bring the longest side of the mesh to [-_MARGIN, _MARGIN]."""
    used = mesh.vertices[np.unique(mesh.faces)]
    if not len(used) or not np.isfinite(used).all():
        raise ValueError("the mesh has no faces, or vertices that are not a number")
    low, high = used.min(axis=0).astype(np.float64), used.max(axis=0).astype(np.float64)
    scale = float((high / 2 - low / 2).max()) / _MARGIN  # halved first: the difference of large numbers may overflow
    if not 1e-100 < scale < 1e100:
        raise ValueError(f"the mesh is {2 * scale * _MARGIN:.3g} in size; a solid is larger than a point, and finite")
    return low / 2 + high / 2, scale


def _require_both(measured: Samples) -> None:
    """Refuse a shape without an inside or without an outside: neither has an IoU to speak of."""
    share = float((measured.values > 0).float().mean())
    if share in (0.0, 1.0):
        seen = "nothing" if share == 0 else "everything"
        raise ValueError(f"{seen} lies inside: the surface is flat, wide open or thinner than the points are apart")


# --- points


def _samples(points: np.ndarray, inside: np.ndarray) -> Samples:
    """Points [N, 3] with labels [N] as samples in the order of a Morton curve."""
    order = _z_order(points)
    return Samples(torch.from_numpy(points[order]), torch.from_numpy(_signs(inside[order])))


def _signs(inside: np.ndarray) -> np.ndarray:
    """bool [...] -> float32 [N, 1], +1 inside and -1 outside."""
    return np.where(inside.reshape(-1, 1), np.float32(1), np.float32(-1))


def _z_order(points: np.ndarray) -> np.ndarray:
    """Positions [N] of points [N, 3] in [-1, 1], visited along the Morton curve."""
    cells = ((points + 1) * (1 << _ORDER_BITS) / 2).astype(np.int64).clip(0, (1 << _ORDER_BITS) - 1)
    code = np.zeros(len(points), np.int64)
    for bit, axis in product(range(_ORDER_BITS), range(3)):
        code |= ((cells[:, axis] >> bit) & 1) << (3 * bit + 2 - axis)
    return np.argsort(code, kind="stable")


@lru_cache(maxsize=4)
def _voxel_centres(sizes: tuple[int, ...]) -> Tensor:
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


def _near(mesh: Mesh, centre: np.ndarray, scale: float, count: int, spread: float) -> np.ndarray:
    """Points of the surface, each equally likely, moved by a normal deviate on each axis: float32 [count, 3]."""
    corners = (mesh.vertices[mesh.faces].astype(np.float64) - centre) / scale  # [T, 3, 3]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    total = np.cumsum(areas)
    if not total[-1] > 0:
        raise ValueError("the surface has no area: all of its triangles are flat")
    chosen = np.searchsorted(total, _drawn("triangle", count) * total[-1], side="right").clip(max=len(total) - 1)
    u, v = _drawn("corner", 2 * count).reshape(2, -1).astype(np.float64)
    folded = u + v > 1
    u, v = np.where(folded, 1 - u, u), np.where(folded, 1 - v, v)
    weights = np.stack([1 - u - v, u, v], axis=1)
    points = (corners[chosen] * weights[:, :, None]).sum(axis=1)
    return (points + spread * _normal(3 * count).reshape(-1, 3)).clip(-1, 1).astype(np.float32)


def _normal(count: int) -> np.ndarray:
    """Normal deviates by the transform of Box and Muller: float64 [count]."""
    radius = np.sqrt(-2 * np.log1p(-_drawn("noise", count).astype(np.float64)))
    return radius * np.cos(2 * np.pi * _drawn("angle", count))


def _any(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` positions, at random but the same ones at every call, in their order."""
    return np.sort(np.argsort(_drawn("any", count), kind="stable")[:wanted])
