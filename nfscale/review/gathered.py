"""What a report knows of every datum: numbers alone, some 30 bytes each, read file by file.

Ids are text, and a million of them is what memory goes into: they are looked up for the few data that are shown.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nfscale.store.schema import FAILED_STATUSES, STATUS
from nfscale.store.table import WeightsTable

_NUMBERS = ("quality", "quality_heldout", "steps", "steps_to_target", "wall_seconds")
_NAMED = ("status", "label", "split")
_MOST_NAMES = 10_000  # of labels that are told apart, and of reasons: where each datum has one of its own, none matters
_EXAMPLES = 3  # ids of each reason

OTHERS = "(others)"


@dataclass
class Coded:
    """A column of names: codes [rows] into names; -1 where there is none."""

    codes: np.ndarray
    names: list[str]

    def counts(self) -> dict[str, int]:
        """Rows by name, the commonest first; without those that have none."""
        found = np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))
        return {self.names[place]: int(found[place]) for place in np.argsort(-found, kind="stable") if found[place]}


@dataclass
class Failure:
    """Data that failed alike."""

    status: str
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Gathered:
    """Columns of a run in the order of its dataset; float32 [rows], NaN where a datum has none."""

    quality: np.ndarray
    quality_heldout: np.ndarray
    steps: np.ndarray
    steps_to_target: np.ndarray
    wall_seconds: np.ndarray
    status: Coded
    label: Coded
    split: Coded
    failures: list[Failure]
    """The commonest first."""
    _table: WeightsTable

    def __len__(self) -> int:
        return len(self.quality)

    @property
    def fitted(self) -> np.ndarray:
        """Positions of the rows that have a quality, from the worst on."""
        order = np.argsort(self.quality, kind="stable")  # NaN comes last
        return order[: int(np.isfinite(self.quality).sum())]

    def rows_at(self, positions: Sequence[int] | np.ndarray, columns: Sequence[str]) -> list[dict]:
        """Rows at some positions, in the order asked for."""
        wanted = np.asarray(positions, dtype=np.int64)
        found: dict[int, dict] = {}
        start = 0
        for commit in _in_order(self._table):
            inside = np.unique(wanted[(wanted >= start) & (wanted < start + commit.rows)])
            if len(inside):
                rows = pq.read_table(self._table.file_of(commit), columns=list(columns)).take(inside - start)
                found |= dict(zip(inside.tolist(), rows.to_pylist(), strict=True))
            start += commit.rows
        return [found[position] for position in wanted.tolist()]

    def dataset_positions(self, positions: Sequence[int] | np.ndarray) -> list[int]:
        """Where these data are in the dataset that was encoded: a run that is under way has gaps."""
        commits = _in_order(self._table)
        firsts = np.cumsum([0] + [commit.rows for commit in commits])
        wanted = np.asarray(positions, dtype=np.int64)
        files = np.searchsorted(firsts, wanted, side="right") - 1
        starts = np.array([commit.start for commit in commits], dtype=np.int64)
        return (starts[files] + wanted - firsts[files]).tolist()

    def ids_at(self, positions: Sequence[int] | np.ndarray) -> list[str]:
        """Ids of the data at some positions, in the order asked for."""
        return [row["datum_id"] for row in self.rows_at(positions, ["datum_id"])]


def gathered(table: WeightsTable) -> Gathered:
    """Read what a report needs of all committed rows."""
    numbers: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] for name in _NUMBERS}
    named = {name: _Names() for name in _NAMED}
    failures = _Failures()
    for commit in _in_order(table):
        part = pq.read_table(table.file_of(commit), columns=[*_NUMBERS, *_NAMED])
        for name in _NUMBERS:
            column = part[name].cast(pa.float32()).to_numpy()
            numbers[name].append(np.where(np.isfinite(column), column, np.nan).astype(np.float32))
        for name, names in named.items():
            names.add(part[name].cast(pa.string()))
        if commit.failed:
            rows = pq.read_table(table.file_of(commit), columns=["datum_id", "status", "reason"])
            failures.add(rows.filter(STATUS.isin(FAILED_STATUSES)))
    columns: dict[str, Any] = {name: np.concatenate(parts) for name, parts in numbers.items()}
    columns |= {name: names.coded() for name, names in named.items()}
    return Gathered(**columns, failures=failures.ranked(), _table=table)


def _in_order(table: WeightsTable) -> list:
    return sorted(table.commits, key=lambda commit: commit.start)


class _Names:
    """Codes of names that come in parts."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._parts: list[np.ndarray] = [np.empty(0, np.int32)]

    def add(self, column: pa.ChunkedArray) -> None:
        encoded = column.combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.chunk(0)
        codes = np.array([self._code(name) for name in encoded.dictionary.to_pylist()] or [-1], dtype=np.int32)
        places = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
        self._parts.append(np.where(places >= 0, codes[places], -1).astype(np.int32))

    def _code(self, name: str) -> int:
        if name not in self._known and len(self._known) >= _MOST_NAMES:
            name = OTHERS
        return self._known.setdefault(name, len(self._known))

    def coded(self) -> Coded:
        return Coded(np.concatenate(self._parts), list(self._known))


class _Failures:
    """Failed rows by status and reason."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Failure] = {}

    def add(self, rows: pa.Table) -> None:
        keys = zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True)
        named = [(status, reason or "") for status, reason in keys]
        for key, count in Counter(named).items():
            known = key if key in self._found or len(self._found) < _MOST_NAMES else (key[0], OTHERS)
            self._found.setdefault(known, Failure(*known)).count += count
        for key, datum_id in zip(named, rows["datum_id"].to_pylist(), strict=True):
            failure = self._found.get(key)
            if failure is not None and len(failure.examples) < _EXAMPLES:
                failure.examples.append(datum_id)

    def ranked(self) -> list[Failure]:
        return sorted(self._found.values(), key=lambda failure: -failure.count)
