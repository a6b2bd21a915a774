"""What the histories of many fields say together."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.store.table import WeightsTable

SAMPLED_FIELDS = 20_000
"""Fields whose histories are read for quantile curves: enough for the 5th percentile to stand to 0.2 %."""


def sampled_histories(table: WeightsTable) -> pa.Table:
    """`history_step` and `history_quality` of all fields, or of about `SAMPLED_FIELDS` spread over the run."""
    stride = -(-len(table) // SAMPLED_FIELDS) or 1
    columns = ["history_step", "history_quality"]
    parts = [table.schema.empty_table().select(columns)]
    for commit in table.commits:
        part = pq.read_table(table.file_of(commit), columns=columns)
        parts.append(part.take(np.arange(-commit.start % stride, len(part), stride)).cast(parts[0].schema))
    return pa.concat_tables(parts)


def quality_quantiles(histories: pa.Table, percentiles: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Percentiles of quality over the fields at each check: (steps [K], one [K] per percentile).

    A field counts with the best quality it has had up to a step, and keeps it after it has stopped: that
    is what is stored.
    """
    columns = (histories[name].to_pylist() for name in ("history_step", "history_quality"))
    lists = [(steps, quality) for steps, quality in zip(*columns, strict=True) if steps]
    if not lists:
        return (np.empty(0, dtype=np.int64), *(np.empty(0) for _ in percentiles))
    grid = np.unique(np.concatenate([np.asarray(steps) for steps, _ in lists]))
    at = np.empty((len(lists), len(grid)), dtype=np.float32)
    for row, (steps, quality) in enumerate(lists):
        best = np.fmax.accumulate(np.asarray(quality, dtype=np.float32))
        place = np.searchsorted(steps, grid, side="right") - 1
        at[row] = best[place.clip(min=0)]
    return (grid, *np.nanpercentile(at, percentiles, axis=0))
