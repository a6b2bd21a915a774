"""Whole data of a run whose data are cut into blocks: originals beside what their fields say together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nfscale.datasets.tiled import Tiled
from nfscale.errors import CallerError
from nfscale.review.gathered import Gathered
from nfscale.run import OpenRun
from nfscale.signals.tiles import by_whole
from nfscale.store.table import WeightsTable

MOST_CELLS = 24 << 20
"""Of all wholes of a report: half a minute of decoding."""


@dataclass
class WholeShown:
    """One whole datum, and how good its blocks are."""

    id: str
    quality: float
    """Of the whole, as it is decoded."""
    original: Any
    rebuilt: Any
    blocks: int
    blocks_median: float
    """Of their qualities."""


def wholes(run: OpenRun, table: WeightsTable, rows: Gathered, most: int) -> Iterator[WholeShown]:
    """The first data all of whose blocks are fitted, in the order of the dataset, as far as `MOST_CELLS` reaches."""
    if not isinstance(run.dataset, Tiled):
        return
    left, shown = MOST_CELLS, 0
    ids, qualities = rows.ids_at(rows.fitted), rows.quality[rows.fitted]
    places = by_whole(ids)
    grouped = {name: [ids[place] for place in of_one] for name, of_one in places.items()}
    first = {name: table.dataset_positions(blocks[:1])[0] for name, blocks in grouped.items()}
    for name in sorted(grouped, key=first.__getitem__):
        if shown == most:
            return
        try:
            whole = table.whole(name)
            assert whole is not None
            cells = math.prod(int(size) for size in whole.fitted[: len(run.signal.grid_axes)])  # type: ignore
            if len(grouped[name]) < whole.blocks or cells > left:
                continue
            content = run.dataset.whole_of(first[name]).content
            if content is None:
                continue
            original, rebuilt = run.signal.original(content), whole.decoded(whole.fitted)
            quality = run.signal.whole_quality(original, rebuilt)  # type: ignore[attr-defined]
        except (CallerError, ValueError):  # blocks are missing, or it is more than a signal takes at once
            continue
        left, shown = left - cells, shown + 1
        median = float(np.median(qualities[places[name]]))
        yield WholeShown(name, quality, original, rebuilt, whole.blocks, median)
