"""How a single datum converged: its curve among those of the run, its row, and what it looks like."""

from typing import Any

import numpy as np
import pyarrow as pa

from nfscale.review.drawing import BLUE, INK, ORANGE, new, png
from nfscale.review.sections import unit_of
from nfscale.store.history import quality_quantiles, sampled_histories
from nfscale.store.run_folder import RunFolder
from nfscale.store.table import DatumKey, WeightsTable

_COLUMNS = ("datum_id", "index", "split", "label", "status", "reason", "loss", "quality", "quality_heldout")
_FITTED = ("steps", "steps_to_target", "history_step", "history_quality", "seed", "wall_seconds", "shard", "attempt")


def curve_of(folder: RunFolder, datum: str) -> tuple[dict[str, Any], bytes | None]:
    """The figures of a datum, by its id or index, and its curve as PNG; None where it has no history.

    Beside its row: `quality_name`, `target`, and `rank`, 1 for the worst of the `ranked` data that have a quality.

    Raises:
        CallerError: if no committed row has this id or index.
    """
    table = WeightsTable(folder)
    key: DatumKey = table.key_of(datum)
    (row,) = table.rows([key]).select([*_COLUMNS, *_FITTED]).to_pylist()
    quality = table.to_arrow(["quality"])["quality"].drop_null().to_numpy()
    figures: dict[str, Any] = dict(row) | {
        "quality_name": table.plan.quality_name,
        "target": table.plan.job["fit"]["target"],
        "rank": None if row["quality"] is None else int((quality < row["quality"]).sum()) + 1,
        "ranked": len(quality),
    }
    if not row["history_step"]:
        return figures, None
    return figures, _picture(figures, sampled_histories(table))


def _picture(figures: dict[str, Any], histories: pa.Table) -> bytes:
    unit, target = unit_of(figures["quality_name"]), figures["target"]
    figure, axes = new(7.0, 4.0)
    steps, p05, p50, p95 = quality_quantiles(histories, (5, 50, 95))
    axes.fill_between(steps, p05, p95, color=INK, alpha=0.18, linewidth=0, label="all data, 5 to 95 %")
    axes.plot(steps, p50, color=INK, linewidth=1.2, label="all data, median")
    own = np.asarray(figures["history_quality"], dtype=np.float32)
    axes.plot(figures["history_step"], own, color=BLUE, linewidth=1.8, marker="o", markersize=3, label="this datum")
    if target is not None:
        axes.axhline(target, color=ORANGE, linewidth=1.2, label=f"target {target:g}")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(f"quality [{unit}]")
    axes.set_title(
        f"{figures['datum_id']}: {figures['status']}, rank {figures['rank']:,} of {figures['ranked']:,} from below"
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return png(figure)
