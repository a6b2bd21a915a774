"""Signed distance: points of a box to how far the surface of a solid is, less than 0 inside.

The distance is that to the closest point of the surface (Park et al., "DeepSDF", CVPR 2019), its sign what the solid
says is inside, for a mesh the generalized winding number: open surfaces have a distance too. It is cut off at
`truncate` (Curless & Levoy, SIGGRAPH 1996), beyond which a surface is only known to be far, and told in that unit,
so that values fill [-1, 1] whatever the size of the solid. Most points lie near the surface, at two widths, as in
DeepSDF. A pool of them is drawn once, and each step of each field draws its minibatch of the pool.

The loss is the squared error. With `eikonal` above 0 it also asks that the distance grows by one for each step away
from the surface (Gropp et al., ICML 2020). The slope is taken by central differences (Li et al., "Neuralangelo", CVPR
2023), six points more of the field for each sample, so that it needs no derivative with respect to coordinates, and
values and predictions get a second column: the length of the slope, which is 1 up to the cut and 0 beyond it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfscale.signals.base import Apply, Samples, mean_squared_error
from nfscale.signals.solids import Grid, Mesh, Solid, Solids, alike, grids, require_grid, voxel_centres

_SLOPE_STEP = 0.01
"""Half of what central differences reach over: a tenth of the default cut, and 100 times what float32 rounds away."""


@dataclass(frozen=True)
class Sdf(Solids):
    """Distances to the surfaces of solids in a box. Content: a solid that knows them, or a voxel grid of them.

    A grid [X, Y, Z] is of signed distances at the centres of voxels, less than 0 inside, with the side of a voxel as
    unit. The unit of a field's values is `truncate` times half the side of the box: the distance in the datum's
    own unit is value * truncate * scale.
    """

    near: float = 0.8
    spread: float = 0.01
    wide: float = 0.05
    """As `spread`, of every other point near the surface."""
    truncate: float = 0.1
    """The largest distance that is told from larger ones; the box is 2 wide. 4 is none: nothing is so far away."""
    eikonal: float = 0.0
    """Weight of the squared error of the slope's length beside that of the distance. 0: no slope is taken, and steps
    need a sixth of the time."""

    _named = "a signed distance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.wide < 1:
            raise ValueError(f"signal.wide is in (0, 1), got {self.wide}")
        if not 0 < self.truncate <= 4:
            raise ValueError(f"signal.truncate is above 0 and at most 4, got {self.truncate}")
        if not 0 <= self.eikonal < float("inf"):
            raise ValueError(f"signal.eikonal is at least 0, got {self.eikonal}")

    @property
    def squared_error(self) -> bool:
        return not self.eikonal

    @property
    def points_per_sample(self) -> int:
        return 7 if self.eikonal else 1

    def _spreads(self, count: int) -> np.ndarray | float:
        return np.where(np.arange(count) % 2, self.wide, self.spread)[:, None]

    def _values_of(self, solid: Solid, centre: np.ndarray, scale: float, points: np.ndarray) -> np.ndarray:
        if solid.distance is None:
            raise ValueError("a solid that does not know how far its surface is; make it with solid_of(mesh)")
        places = centre + scale * points.astype(np.float64)
        away = solid.distance(places, 1.01 * self.truncate * scale) / scale
        return self._values(np.where(solid.inside(places), -away, away))

    def _given(self, content: Any) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(content, Mesh):
            raise ValueError("a mesh without what it encloses; nfscale.media.solids.solid_of(mesh) makes a solid of it")
        if not isinstance(content, np.ndarray):
            raise ValueError(f"distances are of a solid or a voxel grid of them; got {type(content).__name__}")
        return voxel_centres(content.shape).numpy(), self._of_grid(content)

    def _of_grid(self, content: np.ndarray) -> np.ndarray:
        """Distances in voxels [X, Y, Z] as values [N, C]."""
        require_grid(content)
        if content.dtype.kind not in "iuf" or not np.isfinite(content).all():
            raise ValueError(f"a voxel is a signed distance, a number; got {content.dtype}, or not a number")
        return self._values(content.reshape(-1).astype(np.float64) * 2 / max(content.shape))

    def _values(self, distances: np.ndarray) -> np.ndarray:
        """Signed distances [N] in coordinates as float32 [N, 1], with a slope [N, 2]."""
        cut = (distances / self.truncate).clip(-1, 1)
        columns = [cut, np.abs(cut) < 1] if self.eikonal else [cut]
        return np.stack(columns, axis=1).astype(np.float32)

    def _inside(self, values: Tensor) -> Tensor:
        return values[..., 0] < 0

    def predict(self, apply: Apply, samples: Samples) -> Tensor:
        """Distances [F, N, 1]; with the length of their slope, where that counts, [F, N, 2]."""
        here = apply(samples.coordinates)
        if not self.eikonal:
            return here
        middles = samples.coordinates.clamp(_SLOPE_STEP - 1, 1 - _SLOPE_STEP)  # no step leaves the box
        steps = _SLOPE_STEP * torch.eye(3, dtype=middles.dtype, device=middles.device)
        around = torch.cat([middles + step for step in (*steps, *-steps)], dim=1)
        ahead, behind = apply(around).unflatten(1, (6, -1)).chunk(2, dim=1)  # [F, 3, N, 1] each
        slope = (ahead - behind) * (self.truncate / (2 * _SLOPE_STEP))
        # The root has no derivative at 0, where fields that are constant are: a millionth keeps it finite.
        return torch.cat([here, (slope.square().sum(dim=1) + 1e-12).sqrt()], dim=-1)

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Squared error of the distance in units of `truncate`, and of its slope times `eikonal`."""
        if not self.eikonal:
            return mean_squared_error(predicted, samples)
        values = alike(predicted, samples)
        first, second = (
            mean_squared_error(predicted[..., column], Samples(samples.coordinates, values[..., column], samples.mask))
            for column in ([0], [1])
        )
        return first + self.eikonal * second

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[Grid]:
        """[F, X * Y * Z, C] -> grids of how far below the surface a voxel is, in the coordinates of the fields."""
        return grids(-self.truncate * values[..., 0], shape)

    def original(self, content: Solid | np.ndarray) -> Mesh | Grid:
        """The surface of a solid; a voxel grid as if a field had said it."""
        if isinstance(content, Solid):
            return content.mesh
        values = torch.from_numpy(self._of_grid(content))[None]
        (grid,) = self.reconstruct(values, self.shape_of(self.measures(content)))
        return grid

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "sdf",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(x, y, z) = (point - centre) / scale, in [-1, 1]; centre, scale are in the row's metrics",
            "coordinate_range": [-1.0, 1.0],
            "output": {
                "scale": self.truncate,
                "shift": 0.0,
                "meaning": "signed distance in coordinates, less than 0 inside, cut off at the scale on either side; "
                "times the row's scale it is in the datum's own unit",
            },
            "quality": "iou is the intersection over union of {distance < 0} and the solid, in the box [-1, 1]^3 "
            "or in that of the voxel grid",
        }
