"""What the histories of many fields say together."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def quality_quantiles(
    steps: pa.ChunkedArray, qualities: pa.ChunkedArray, percentiles: Sequence[float]
) -> tuple[np.ndarray, ...]:
    """Percentiles of quality over the fields at each check: (steps [K], one [K] per percentile).

    A field that has stopped keeps the best quality it had, since that is what is stored. Fields count at
    a step as they are there: best so far, not the value of the check alone.
    """
    lists = [(s, q) for s, q in zip(steps.to_pylist(), qualities.to_pylist(), strict=True) if s]
    if not lists:
        return (np.empty(0, dtype=np.int64), *(np.empty(0) for _ in percentiles))
    grid = np.unique(np.concatenate([np.asarray(s) for s, _ in lists]))
    at = np.empty((len(lists), len(grid)), dtype=np.float32)
    for row, (own_steps, own_quality) in enumerate(lists):
        best = np.fmax.accumulate(np.asarray(own_quality, dtype=np.float32))
        place = np.searchsorted(own_steps, grid, side="right") - 1
        at[row] = best[place.clip(min=0)]
    return (grid, *np.nanpercentile(at, percentiles, axis=0))
