"""Data cut into blocks, each a datum of its own: `ID@2,1` is the third row of blocks and the second column.

How many blocks a datum has is known once it was read. That is done once, when a run is planned, and kept in its plan:
whoever resumes the run, or works for it, has the ids without reading anything. A datum that cannot be read is one
block, and so one row that says why; a header alone would not tell.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from nfscale.datasets.base import ComputedIds, Dataset, Datum
from nfscale.errors import CallerError
from nfscale.signals.tiles import MAX_BLOCKS, Cut, Gridded, Tile, block_id, box_of, place_metrics, whole_id

Runs = tuple[tuple[int, tuple[int, ...]], ...]
"""Counts of blocks by axis, of so many data that follow each other: what a plan keeps."""

PROBED_BLOCKS = 64
"""That decide what a signal leaves open, spread over the first data: the first blocks of a head are air."""
_PROBED_DATA = 8


class Tiled(Dataset):
    """The blocks of each datum, in row order of their places.

    Args:
        data: the data to be cut. Of those that are read, the last is kept: its blocks are read one after the other.
        signal: one of the run's kind and options; its channels do not matter.
        runs: the counts of blocks, as `counted` gave them.

    Raises:
        CallerError: if a datum has the id of another's block, or there are more data or less than were counted.
    """

    def __init__(self, data: Dataset, signal: Gridded, tile: Tile, runs: Runs) -> None:
        self.data, self._signal, self._tile = data, signal, tile
        self.is_thread_bound = data.is_thread_bound
        self._counts = np.array([counts for times, counts in runs for _ in range(times)]).reshape(-1, len(tile.size))
        if len(self._counts) != len(data.ids):
            raise CallerError(f"{len(data.ids)} data are there, blocks were counted of {len(self._counts)}")
        self._blocks = self._counts.prod(axis=1)
        self._firsts = np.concatenate([[0], np.cumsum(self._blocks)])
        self._most = int(self._blocks.max(initial=1))
        self._last: tuple[int, Datum] | None = None
        _refuse_block_ids(data.ids, len(tile.size))

    @cached_property
    def ids(self) -> Sequence[str]:
        def id_at(position: int) -> str:
            place, block = self._located(position)
            return block_id(self.data.ids[place], block)

        return ComputedIds(int(self._firsts[-1]), id_at)

    def read(self, position: int) -> Datum:
        place, block = self._located(position)
        last = self._last  # whatever another thread puts there meanwhile
        if last is None or last[0] != place:
            last = self._last = place, self.data.read(place)
        datum, content, metrics, error = last[1], None, {}, last[1].error
        if datum.content is not None:
            try:
                cuts = cuts_of(self._signal, self._tile, datum.content)
                planned, found = tuple(self._counts[place]), tuple(len(cut.starts) for cut in cuts)
                if found != planned:
                    raise ValueError(
                        f"the datum has {_by(found)} blocks, and {_by(planned)} when the run was planned: it has "
                        "changed since, or could not be read then; a new output plans anew"
                    )
                content = self._signal.cut(datum.content, box_of(cuts, block))
                metrics = place_metrics(self._signal.grid_axes, cuts, block)
            except ValueError as why:
                error = str(why)
        index = self.index_of(position)
        return Datum(self.ids[position], index, content, datum.label, datum.split, error, datum.repeat, metrics)

    def index_of(self, position: int) -> int:
        """That of the datum times the most blocks that any has, plus the rank of the block."""
        place = self._datum_at(position)
        return self.data.index_of(place) * self._most + position - int(self._firsts[place])

    def _datum_at(self, position: int) -> int:
        return int(np.searchsorted(self._firsts, position, side="right")) - 1

    def _located(self, position: int) -> tuple[int, tuple[int, ...]]:
        """Which datum, and which of its blocks by axis."""
        place = self._datum_at(position)
        block = np.unravel_index(position - int(self._firsts[place]), tuple(self._counts[place]))
        return place, tuple(map(int, block))

    def whole_of(self, position: int) -> Datum:
        """The datum that the block at a position is cut from."""
        return self.data.read(self._datum_at(position))

    def probe_positions(self) -> Iterator[int]:
        """Some blocks spread over each of the first data that are more than one block, else over the first ones."""
        several = np.flatnonzero(self._blocks > 1)[:_PROBED_DATA]
        chosen = several if len(several) else np.arange(min(_PROBED_DATA, len(self._blocks)))
        each = PROBED_BLOCKS // max(1, len(chosen))
        for place in chosen:
            count = int(self._blocks[place])
            yield from self._firsts[place] + np.unique(np.linspace(0, count - 1, min(each, count)).astype(int))


def cuts_of(signal: Gridded, tile: Tile, content: Any) -> tuple[Cut, ...]:
    """How a datum is cut.

    Raises:
        ValueError: if it is no datum of this signal, or would be more than `MAX_BLOCKS` blocks.
    """
    cuts = tile.cuts(signal.grid_of(content), signal.cells_per_unit(content))
    blocks = int(np.prod([len(cut.starts) for cut in cuts], dtype=object))
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{blocks:,} blocks, at most {MAX_BLOCKS:,} are made of a datum; use a larger signal.tile")
    return cuts


def counted(data: Dataset, signal: Gridded, tile: Tile) -> Runs:
    """How many blocks each datum has along each axis; every datum is read once. Those that cannot be cut are one."""

    def counts() -> Iterator[tuple[int, ...]]:
        for position in range(len(data.ids)):
            content = data.read(position).content
            try:
                if content is None:
                    raise ValueError
                yield tuple(len(cut.starts) for cut in cuts_of(signal, tile, content))
            except ValueError:
                yield (1,) * len(tile.size)

    return tuple((len(list(alike)), each) for each, alike in itertools.groupby(counts()))


def _by(counts: Sequence[int]) -> str:
    return " x ".join(map(str, counts))


def _refuse_block_ids(ids: Sequence[str], axes: int) -> None:
    suspects = {one for one in ids if "@" in one}
    named = {whole_id(one): one for one in suspects if _is_place(one.rpartition("@")[2], axes)}
    taken = next((one for one in ids if one in named), None) if named else None
    if taken is not None:
        raise CallerError(
            f"signal.tile gives a block of {taken!r} the id {named[taken]!r}, which the dataset has already; rename "
            "that datum"
        )


def _is_place(text: str, axes: int) -> bool:
    numbers = text.split(",")
    return len(numbers) == axes and all(one.isascii() and one.isdecimal() for one in numbers)
