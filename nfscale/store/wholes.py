"""Data that were cut into blocks, decoded whole, in memory for the datum and a few of its blocks."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nfscale.engine.step import predicted_at
from nfscale.errors import CallerError
from nfscale.signals.tiles import Cut, Gridded, Part, Points, Tile, blended, block_id

if TYPE_CHECKING:
    from nfscale.store.table import WeightsTable

_TOGETHER_VALUES = 16 << 20  # that blocks evaluated together say: 64 MiB
_MOST_TOGETHER = 64  # blocks: as many as a row group has


class Whole:
    """One datum and its blocks.

    Raises:
        CallerError: if no block says where it lies, or some are not committed.
    """

    def __init__(self, table: "WeightsTable", datum_id: str, block_ids: list[str]) -> None:
        self.id, self._table, self.blocks = datum_id, table, len(block_ids)
        signal, tile = table.signal, table.plan.job["signal"]["tile"]
        assert isinstance(signal, Gridded)
        self._signal = signal
        self._metrics = self._of_one_that_was_read(block_ids)
        self.fitted: tuple[Any, ...] = signal.whole_shape(self._metrics)
        """The shape of the datum, as its signal understands it."""
        cells = [int(self._metrics[f"whole_{name}"]) for name in signal.grid_axes]
        per_unit = 1.0 if signal.whole_cells else self._metrics["rate"]
        self._cuts: tuple[Cut, ...] = Tile(tuple(tile["size"]), tuple(tile["overlap"])).cuts(cells, per_unit)
        expected = math.prod(len(cut.starts) for cut in self._cuts)
        if expected != len(block_ids):
            raise CallerError(
                f"{len(block_ids)} of the {expected} blocks of {datum_id!r} are committed; it decodes when all are"
            )

    def _of_one_that_was_read(self, block_ids: list[str]) -> dict[str, float]:
        reason = ""
        for one in block_ids:
            row = self._table.rows([one])
            metrics, reason = dict(row["metrics"][0].as_py()), row["reason"][0].as_py()
            if f"whole_{self._signal.grid_axes[0]}" in metrics:
                return metrics
        raise CallerError(f"no weights for {self.id!r}: {reason}")

    def decoded(self, shape: tuple[Any, ...]) -> Any:
        """The datum at a shape, as its signal understands it.

        Raises:
            CallerError: if a block has no weights.
        """
        points = self._signal.points(shape, self.fitted)
        values = blended(self._cuts, points, self._signal.channels, self._evaluated, self._together(points))
        return self._signal.reconstruct(values[None], shape)[0]

    def _together(self, points: tuple[Points, ...]) -> int:
        """How many blocks are evaluated at once."""
        of_a_block = math.prod(cut.size / point.step + 1 for cut, point in zip(self._cuts, points, strict=True))
        return int(max(1, min(_MOST_TOGETHER, _TOGETHER_VALUES // (of_a_block * self._signal.channels))))

    def _evaluated(self, group: list[Part]) -> Iterator[Tensor]:
        table, signal = self._table, self._signal
        ids = [block_id(self.id, part.block) for part in group]
        rows = table.rows(ids)
        weights = table.matrix(rows["weights"])
        for one, row, reason in zip(ids, weights, rows["reason"].to_pylist(), strict=True):
            if not np.isfinite(row).all():
                raise CallerError(
                    f"no weights for the block {one!r}: {reason}; the others decode one by one, by their ids"
                )
        fitted = signal.shape_of(dict(rows["metrics"][0].as_py()))
        coordinates = signal.block_coordinates(group[0].places, fitted)
        yield from predicted_at(table.field, signal, torch.from_numpy(weights), coordinates)
