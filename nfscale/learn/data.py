"""Rows of a weights table as torch datasets: by position, and as a shuffled stream of more rows than memory holds.

Both give (weights - theta0, label) of the rows that a filter lets through, and read the weights late: what they hold of
all rows is a few bytes each.

A stream is shuffled twice. The table is cut into pieces of neighbouring rows, which are read in an order drawn anew for
each epoch; and the rows of several pieces are mixed in a window of `window_rows`. Where neighbours are alike (a dataset
sorted by label), the pieces of one window come from all over the table, so that batches are mixed all the same.

Weights are copied twice on their way, out of Arrow's memory less theta0 into the window and from there into a batch,
and the window is one array for a whole epoch: memory that is asked for anew costs more than what is done with it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from nfscale.errors import CallerError
from nfscale.store.run_folder import Commit
from nfscale.store.schema import OK_STATUSES, ROW_GROUP_ROWS, STATUS
from nfscale.store.table import WeightsTable, as_matrix, matrices

Transform = Callable[[Tensor], Tensor]
"""Of rows of weights - theta0: float32 [B, P] -> whatever a model takes."""

_PIECE_ROWS = 4096
"""Read at a time: a shard file of the usual size, since parsing the footer of a file costs as much as 1,000 rows."""
_READ_AHEAD = 3  # pieces that are being read while one is handed out; pyarrow decodes without Python's lock
_WITHOUT_WEIGHTS = {"decode_error", "crashed"}
_WINDOW_ROWS, _WINDOW_BYTES = 1 << 16, 256 << 20  # what is mixed at a time, whichever is less


@dataclass(frozen=True)
class Rows:
    """Which rows of a table: those that are ok, unless told otherwise."""

    split: str | tuple[str, ...] | None = None
    """One or several of the table's splits; None: all rows, those without a split among them."""
    status: str | tuple[str, ...] = OK_STATUSES
    """`diverged` has weights too; rows that have none never pass."""
    min_quality: float | None = None
    """In the unit of the run's quality."""

    @property
    def expression(self) -> pc.Expression:
        """The filter, as `WeightsTable.to_arrow` and `dataset` take it."""
        wanted = STATUS.isin([name for name in _several(self.status) if name not in _WITHOUT_WEIGHTS])
        if self.split is not None:
            wanted = wanted & pc.field("split").cast(pa.string()).isin(_several(self.split))
        if self.min_quality is not None:
            wanted = wanted & (pc.field("quality") >= self.min_quality)
        return wanted

    def columns(self, commit: Commit) -> list[str]:
        """What has to be read of a file beside the weights; nothing where all of its rows pass by their status."""
        asked = {"split": self.split is not None, "quality": self.min_quality is not None}
        asked["status"] = any(asked.values()) or not set(commit.counts) <= set(_several(self.status)) - _WITHOUT_WEIGHTS
        return [name for name, is_asked in asked.items() if is_asked]


def _several(names: str | tuple[str, ...]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


class Labels:
    """Labels as class numbers: ranks of the distinct labels of a table in sorted order; -1 where there is none."""

    def __init__(self, known: Sequence[Any]) -> None:
        self.names = sorted({label for label in known if label is not None})
        self._set = pa.array(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def ranks(self, labels: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """Labels [B] -> int64 [B]."""
        if not self.names:
            return np.full(len(labels), -1, dtype=np.int64)
        found = pc.index_in(labels, value_set=self._set)  # type: ignore[attr-defined]
        return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def labels_of(table: WeightsTable) -> Labels:
    """The classes of a table. Reads the column of labels alone."""

    def labels(commit: Commit) -> pa.Array:
        with pq.ParquetFile(table.file_of(commit)) as opened:  # a scanner takes twice as long over small row groups
            return opened.read(columns=["label"], use_threads=False)["label"].unique()

    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        found = list(pool.map(labels, table.commits))
    return Labels(pa.chunked_array(found).unique().to_pylist() if found else [])


ALL_OK = Rows()


class WeightsMap(Dataset):
    """Rows by position, each read when it is asked for: (weights - theta0 [P], label).

    With the run's copy for training (`store.ipc_copy`) a row costs microseconds; without one a Parquet row group is
    read for it, and a loader's whole batch is fetched at once.
    """

    def __init__(self, table: WeightsTable, rows: Rows = ALL_OK, transform: Transform | None = None) -> None:
        from nfscale.store.ipc import ipc_copy

        self.table, self.transform = table, transform
        self._mapped = ipc_copy(table)
        passed = self._passed(rows)
        self.ids: list[str] = passed["datum_id"].to_pylist()
        self.labels = labels_of(table)
        self._ranks = self.labels.ranks(passed["label"])
        self._places = passed["place"].to_numpy()

    def _passed(self, rows: Rows) -> pa.Table:
        columns = ["datum_id", "index", "split", "label", "status", "quality"]
        table = self.table.to_arrow(columns) if self._mapped is None else self._mapped.select(columns)
        # In the copy a row is found by its position, in the Parquet files by its index.
        place = table["index"] if self._mapped is None else pa.array(np.arange(len(table)))
        return pds.dataset(table.append_column("place", place)).to_table(filter=rows.expression)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, int]]:
        places = self._places[positions]
        if self._mapped is None:
            column = self.table.rows(places.tolist())["weights"]
        else:
            column = self._mapped["weights"].take(pa.array(places))
        rows = torch.from_numpy(_differences(self.table, as_matrix(column)))
        rows = rows if self.transform is None else self.transform(rows)
        return list(zip(rows, self._ranks[positions].tolist(), strict=True))


@dataclass(frozen=True)
class _Piece:
    """Neighbouring row groups of one committed file."""

    commit: int
    first: int
    last: int


@dataclass(frozen=True)
class _Read:
    """Rows of a piece that the filter lets through: class numbers int64 [n], and weights as they are stored."""

    parts: list[np.ndarray]
    """float32 or float16 [?, P], together [n, P]."""
    ranks: np.ndarray

    def __len__(self) -> int:
        return len(self.ranks)


class _Window:
    """Rows as models take them, in one array that is filled again and again: differences, class numbers."""

    def __init__(self, table: WeightsTable, rows: int) -> None:
        self._table = table
        self.weights = np.empty((rows, table.layout.size), dtype=np.float32)
        self.ranks = np.empty(rows, dtype=np.int64)
        self.held = 0

    def add(self, read: _Read) -> None:
        self.ranks[self.held : self.held + len(read)] = read.ranks
        for part in read.parts:
            _differences(self._table, part, out=self.weights[self.held : self.held + len(part)])
            self.held += len(part)

    def keep(self, places: np.ndarray) -> None:
        """These rows, and room for others."""
        self.held = len(places)
        self.weights[: self.held], self.ranks[: self.held] = self.weights[places], self.ranks[places]


class WeightsStream(IterableDataset):
    """Rows in batches, shuffled anew each epoch, in bounded memory: (weights - theta0 [B, P], labels [B]).

    Each process of a job and each worker of a loader reads a part of its own (give a loader `batch_size=None`). An
    epoch is the whole table; iterating again takes the next epoch's order, and `epoch` can be set.

    Args:
        seed: None leaves the rows in the order of the table.
        window_rows: rows that are mixed with each other, whose weights are held; None: 65,536, or as many as take
            256 MiB.
        rank, world: this process among those that share the stream.
    """

    def __init__(
        self,
        table: WeightsTable,
        batch_size: int = 256,
        *,
        rows: Rows = ALL_OK,
        transform: Transform | None = None,
        seed: int | None = 0,
        window_rows: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise CallerError(f"rank {rank} of {world} processes; ranks count from 0")
        self.table, self.batch_size, self.transform, self.seed = table, batch_size, transform, seed
        self.rows = rows
        fitting = max(batch_size, _WINDOW_BYTES // (4 * table.layout.size))
        self.window_rows = min(_WINDOW_ROWS, fitting) if window_rows is None else window_rows
        self.rank, self.world, self.epoch = rank, world, 0

    @cached_property
    def labels(self) -> Labels:
        return labels_of(self.table)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        part, parts = self.rank * workers + mine, self.world * workers
        draw = None if self.seed is None else np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        pieces = self._pieces()
        if draw is not None:
            pieces = [pieces[place] for place in draw.permutation(len(pieces))]
        for window, order in self._windows(pieces[part::parts], draw):
            for start in range(0, len(order), self.batch_size):
                taken = order[start : start + self.batch_size]
                rows = torch.from_numpy(window.weights.take(taken, axis=0))
                yield rows if self.transform is None else self.transform(rows), torch.from_numpy(window.ranks[taken])

    def _pieces(self) -> list[_Piece]:
        at_once = _PIECE_ROWS // ROW_GROUP_ROWS
        order = sorted(range(len(self.table.commits)), key=lambda place: self.table.commits[place].start)
        pieces = []
        for commit in order:
            groups = -(-self.table.commits[commit].rows // ROW_GROUP_ROWS)
            pieces += [_Piece(commit, at, min(at + at_once, groups)) for at in range(0, groups, at_once)]
        return pieces

    def _windows(self, pieces: list[_Piece], draw: np.random.Generator | None) -> Iterator[tuple[_Window, np.ndarray]]:
        """Rows of several pieces and the order in which to take them; what does not fill a batch begins the next."""
        room = max(self.window_rows, self.batch_size) + _PIECE_ROWS
        window = _Window(self.table, min(room, len(self.table)))
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            for number, read in enumerate(_ahead(pool, self._read, pieces), 1):
                window.add(read)
                is_last = number == len(pieces)
                if window.held < self.window_rows and not is_last:
                    continue
                held = window.held
                order = np.arange(held) if draw is None else draw.permutation(held)
                whole = held if is_last else held - held % self.batch_size
                yield window, order[:whole]
                window.keep(order[whole:])

    def _read(self, piece: _Piece) -> _Read:
        commit = self.table.commits[piece.commit]
        asked = self.rows.columns(commit)
        with pq.ParquetFile(self.table.file_of(commit)) as opened:
            groups = list(range(piece.first, piece.last))
            read = opened.read_row_groups(groups, columns=["weights", "label", *asked], use_threads=False)
        ranks = self.labels.ranks(read["label"])
        if not asked:
            return _Read(matrices(read["weights"]), ranks)
        # in one chunk: a filter costs much for each of a file's small ones
        keys = read.select(asked).append_column("place", pa.array(np.arange(len(read)))).combine_chunks()
        places = keys.filter(self.rows.expression)["place"].to_numpy()
        return _Read([as_matrix(read["weights"])[places]], ranks[places])


def _differences(table: WeightsTable, stored: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Weights - theta0 of weights as they are stored: [B, P] -> float32 [B, P], into `out` if there is one.

    The weights themselves where fields share no start; and what `store.dtype=delta_float16` stores, as it is.
    """
    theta0 = None if table.plan.dtype == "delta_float16" else table.theta0
    return np.subtract(stored, np.float32(0) if theta0 is None else theta0, out=out, dtype=np.float32)


def _ahead(pool: ThreadPoolExecutor, read: Callable[[_Piece], _Read], pieces: list[_Piece]) -> Iterator[_Read]:
    """The pieces in their order, a few of them in the making."""
    waiting = deque(pool.submit(read, piece) for piece in pieces[:_READ_AHEAD])
    for piece in pieces[_READ_AHEAD:]:
        yield waiting.popleft().result()
        waiting.append(pool.submit(read, piece))
    while waiting:
        yield waiting.popleft().result()
