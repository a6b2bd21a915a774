"""What the histories of many fields say together."""

from collections.abc import Iterator, Sequence

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
    curves = [curve for curve in _curves(histories) if curve is not None]
    if not curves:
        return (np.empty(0, dtype=np.int64), *(np.empty(0) for _ in percentiles))
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    if len(grid) > _POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, _POINTS).round().astype(int)]
    return _quantiles(curves, grid, percentiles)


def quality_over_seconds(histories: pa.Table, percentiles: Sequence[float]) -> Curves:
    """The same over a field's share of wall time: (seconds [K], one [K] per percentile).

    The seconds of a field are those of the steps it took part in, divided among the fields of its batch, and
    are taken to be the same for each of its steps.
    """
    costs = zip(_curves(histories), histories["steps"].to_pylist(), histories["wall_seconds"].to_pylist(), strict=True)
    curves = [
        (curve[0] * (seconds / steps), curve[1])
        for curve, steps, seconds in costs
        if curve is not None and steps and seconds
    ]
    if not curves:
        return (np.empty(0), *(np.empty(0) for _ in percentiles))
    grid = np.linspace(0, np.percentile([seconds[-1] for seconds, _ in curves], 99), _POINTS // 2)
    return _quantiles(curves, grid, percentiles)


def _curves(histories: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """Of each field: steps [K] and best quality so far [K] at its checks; None where it has none."""
    columns = (histories[name].to_pylist() for name in ("history_step", "history_quality"))
    for steps, quality in zip(*columns, strict=True):
        yield (np.asarray(steps), np.fmax.accumulate(np.asarray(quality, dtype=np.float32))) if steps else None


def _quantiles(curves: list[tuple[np.ndarray, np.ndarray]], grid: np.ndarray, percentiles: Sequence[float]) -> Curves:
    at = np.empty((len(curves), len(grid)), dtype=np.float32)
    for row, (places, best) in enumerate(curves):
        at[row] = best[(np.searchsorted(places, grid, side="right") - 1).clip(min=0)]
    return (grid, *np.nanpercentile(at, percentiles, axis=0))
