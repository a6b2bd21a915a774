"""Occupancy: points of a box to the logit that they lie inside a solid, binary cross-entropy, IoU.

Three things can be fitted: a `Solid` (a mesh with a function that says which points it encloses), a voxel grid,
and `Labelled` points. Values are +1 inside and -1 outside, so that a sign is what values and logits share.

A point is predicted inside where its probability is above 1/2. The code released with Chng, Saratchandran & Lucey
(CVPR 2025) cuts the *logit* at 0.5 instead, which is probability 0.62.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nfscale.signals.base import Samples
from nfscale.signals.solids import Grid, Mesh, Solid, Solids, alike, grids, require_grid, voxel_centres


@dataclass(frozen=True)
class Labelled:
    """Points of which it is known whether they lie inside."""

    points: np.ndarray
    """[N, 3] in [-1, 1]."""
    inside: np.ndarray
    """bool [N]."""


@dataclass(frozen=True)
class Occupancy(Solids):
    """Solids in a box. Content: a solid, a voxel grid [X, Y, Z] of truths, or labelled points."""

    _named = "an occupancy"

    def _values_of(self, solid: Solid, centre: np.ndarray, scale: float, points: np.ndarray) -> np.ndarray:
        return _signs(solid.inside(centre + scale * points.astype(np.float64)))

    def _given(self, content: Any) -> tuple[np.ndarray, np.ndarray]:
        points, inside = _labelled(content)
        return points, _signs(inside)

    def _inside(self, values: Tensor) -> Tensor:
        return values[..., 0] > 0

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Binary cross-entropy of the logits, in nats."""
        entropy = softplus(-predicted * alike(predicted, samples)).mean(dim=-1)
        if samples.mask is None:
            return entropy.mean(dim=-1)
        return (entropy * samples.mask).sum(dim=-1) / samples.mask.sum(dim=-1)

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[Grid]:
        """Logits [F, X * Y * Z, 1] -> grids, see `grids`."""
        return grids(values, shape)

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


def _labelled(content: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [N, 3] and which lie inside, bool [N], of a voxel grid or of labelled points."""
    if isinstance(content, np.ndarray):
        inside = _voxels(content)
        return voxel_centres(inside.shape).numpy(), inside.reshape(-1)
    if isinstance(content, Mesh):
        raise ValueError("a mesh without what it encloses; nfscale.media.solids.solid_of(mesh) makes a solid of it")
    if not isinstance(content, Labelled):
        raise ValueError(f"a shape is a solid, a voxel grid or labelled points; got {type(content).__name__}")
    points, inside = np.asarray(content.points, np.float32), _truths(np.asarray(content.inside), "a label")
    if points.ndim != 2 or points.shape[1] != 3 or inside.shape != points.shape[:1] or not len(points):
        raise ValueError(f"labelled points are [N, 3] with [N] labels, got {list(points.shape)}, {list(inside.shape)}")
    if not (np.abs(points) <= 1).all():
        raise ValueError("labelled points lie in [-1, 1]; some are outside or not a number")
    return points, inside


def _voxels(content: np.ndarray) -> np.ndarray:
    require_grid(content)
    return _truths(content, "a voxel")


def _truths(array: np.ndarray, what: str) -> np.ndarray:
    """Booleans, or numbers that are 0 or 1, as booleans."""
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf" or not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{what} is true or false, or 1 or 0; got {array.dtype} with other values, or not a number")
    return array == 1


def _signs(inside: np.ndarray) -> np.ndarray:
    """bool [...] -> float32 [N, 1], +1 inside and -1 outside."""
    return np.where(inside.reshape(-1, 1), np.float32(1), np.float32(-1))
