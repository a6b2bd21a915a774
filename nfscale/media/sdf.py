"""Files and pages of signed distances: meshes and voxel grids of distances, see `nfscale.media.solids`.

A rebuilt surface is compared with that of the mesh by points of both, each equally likely on its surface. Of each the
closest point of the other surface is looked up. The Chamfer distance is the mean of how far these are, averaged over
both directions, in percent of the diagonal of the mesh's bounding box; the normal consistency is the mean of the
cosine between both normals, whichever way they face, averaged likewise (Mescheder et al., "Occupancy Networks", CVPR
2019, have the same two, with the sides of the box as the unit).
"""

from dataclasses import replace
from typing import Any

import numpy as np

from nfscale.media.base import Decode, Panel
from nfscale.media.solids import SolidMedium, closest, mesh_of
from nfscale.signals.solids import Grid, Mesh, on_surface

_COMPARED = 20_000
"""Points of each surface: the mean of as many distances errs by a hundredth of itself, and they take a second."""


class SdfMedium(SolidMedium):
    """Content: a `Solid`, or a voxel grid [X, Y, Z] of distances in voxels, as `signals.Sdf` takes them."""

    def voxels(self, grid: Grid) -> np.ndarray:
        """Signed distances at the centres of voxels, in the datum's own unit."""
        return (-grid.scale * grid.levels).astype(np.float32)

    def measurable(self, original: Any) -> bool:
        return isinstance(original, Mesh)

    def measures(self, original: Mesh, rebuilt: Grid) -> dict[str, float]:
        """`chamfer_percent`, lower is better, and `normal_consistency`, of 1; without a surface 100 and 0."""
        return compared(original, mesh_of(rebuilt))

    def panels(self, original: Mesh | Grid, rebuilt: Grid, decode: Decode) -> list[Panel]:
        """Those of solids, with the Chamfer distance below the last."""
        shown = super().panels(original, rebuilt, decode)
        if not isinstance(original, Mesh):
            return shown
        away = self.measures(original, rebuilt)["chamfer_percent"]
        return [*shown[:-1], replace(shown[-1], caption=f"Chamfer distance {away:.2g} % of the diagonal")]


def compared(original: Mesh, rebuilt: Mesh) -> dict[str, float]:
    """Chamfer distance and normal consistency of two surfaces."""
    if not len(rebuilt.faces):
        return {"chamfer_percent": 100.0, "normal_consistency": 0.0}
    diagonal = float(np.linalg.norm(np.ptp(original.vertices[np.unique(original.faces)], axis=0)))
    there, back = _directed(original, rebuilt), _directed(rebuilt, original)
    return {
        "chamfer_percent": 100 * (there[0] + back[0]) / 2 / diagonal,
        "normal_consistency": (there[1] + back[1]) / 2,
    }


def _directed(one: Mesh, other: Mesh) -> tuple[float, float]:
    """From points of the first surface to the second: the mean distance, and the mean cosine between normals."""
    points, chosen = on_surface(one.vertices[one.faces], _COMPARED)
    away, found = closest(other, points)
    cosines = np.abs((_normals(one)[chosen] * _normals(other)[found]).sum(axis=1))
    return float(away.mean()), float(cosines.mean())


def _normals(mesh: Mesh) -> np.ndarray:
    """Of each triangle, of length 1, or 0 where it has no area: [T, 3]."""
    corners = mesh.vertices[mesh.faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return across / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-300)
