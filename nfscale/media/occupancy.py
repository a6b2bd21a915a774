"""Files and pages of occupancies: meshes and voxel grids of truths, see `nfscale.media.solids`."""

import numpy as np

from nfscale.media.solids import SolidMedium
from nfscale.signals.solids import Grid


class OccupancyMedium(SolidMedium):
    """Content: a `Solid`, or a voxel grid [X, Y, Z] of truths, as `signals.Occupancy` takes them."""

    def voxels(self, grid: Grid) -> np.ndarray:
        """Which voxels have a probability above 1/2."""
        return grid.levels > 0
