"""What the histories of many fields say together."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.store.table import WeightsTable

SAMPLED_FIELDS = 20_000
"""Fields whose histories are read for quantile curves: enough for the 5th percentile to stand to 0.2 %."""

_POINTS = 400  # of a curve: more than a plot can show; every check has one where there are fewer
_COLUMNS = ["history_step", "history_quality", "steps", "wall_seconds"]

Curves = tuple[np.ndarray, ...]
"""Where along the way [K], and one [K] per percentile."""


def sampled_histories(table: WeightsTable) -> pa.Table:
    """Histories, `steps` and `wall_seconds` of all fields, or of about `SAMPLED_FIELDS` spread over the run."""
    stride = -(-len(table) // SAMPLED_FIELDS) or 1
    parts = [table.schema.empty_table().select(_COLUMNS)]
    for commit in table.commits:
        part = pq.read_table(table.file_of(commit), columns=_COLUMNS)
        parts.append(part.take(np.arange(-commit.start % stride, len(part), stride)).cast(parts[0].schema))
    return pa.concat_tables(parts)


def quality_quantiles(histories: pa.Table, percentiles: Sequence[float]) -> Curves:
    """Percentiles of quality over the fields at each check: (steps [K], one [K] per percentile).

    A field counts with the best quality it has had up to a step, and keeps it after it has stopped: that
    is what is stored.
    """
    lists = _lists(histories)
    if not lists:
        return (np.empty(0, dtype=np.int64), *(np.empty(0) for _ in percentiles))
    grid = np.unique(np.concatenate([steps for steps, _, _ in lists]))
    if len(grid) > _POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, _POINTS).round().astype(int)]
    return _quantiles([(steps, quality) for steps, quality, _ in lists], grid, percentiles)


def quality_over_seconds(histories: pa.Table, percentiles: Sequence[float]) -> Curves:
    """The same over a field's share of wall time: (seconds [K], one [K] per percentile).

    The seconds of a field are those of the steps it took part in, divided among the fields of its batch, and
    are taken to be the same for each of its steps.
    """
    lists = [
        (steps * seconds_per_step, quality)
        for steps, quality, seconds_per_step in _lists(histories)
        if seconds_per_step
    ]
    if not lists:
        return (np.empty(0), *(np.empty(0) for _ in percentiles))
    grid = np.linspace(0, np.percentile([seconds[-1] for seconds, _ in lists], 99), _POINTS // 2)
    return _quantiles(lists, grid, percentiles)


def _lists(histories: pa.Table) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Of each field that has any: steps [K] and best quality so far [K] at its checks; seconds per step, or 0."""
    columns = (histories[name].to_pylist() for name in _COLUMNS)
    return [
        (np.asarray(at), np.fmax.accumulate(np.asarray(quality, dtype=np.float32)), (seconds or 0.0) / (steps or 1))
        for at, quality, steps, seconds in zip(*columns, strict=True)
        if at
    ]


def _quantiles(curves: list[tuple[np.ndarray, np.ndarray]], grid: np.ndarray, percentiles: Sequence[float]) -> Curves:
    at = np.empty((len(curves), len(grid)), dtype=np.float32)
    for row, (places, best) in enumerate(curves):
        at[row] = best[(np.searchsorted(places, grid, side="right") - 1).clip(min=0)]
    return (grid, *np.nanpercentile(at, percentiles, axis=0))
