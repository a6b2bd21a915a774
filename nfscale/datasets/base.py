"""The contract of a dataset; ids that cost little; seeded samples and repeats of a dataset.

Ids of millions of data are the one thing about a dataset that every process holds. A list of strings costs
about 70 bytes each, so openers hand out `ComputedIds` where an id can be computed from its position.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, overload

import numpy as np

from nfscale.errors import CallerError
from nfscale.rng import datum_seed

Label = str | int | None

_CHUNK = 1 << 16  # ids hashed at a time: sorting them costs a megabyte, and a chunk of few would sort too often


@dataclass(frozen=True)
class Datum:
    """One datum as it was read, or the reason why it could not be."""

    id: str
    index: int
    """Position in the dataset; of a repeat, position times repeats plus repeat."""
    content: Any | None
    """What the signal takes samples of: an array, a sound, a mesh; None where it could not be read."""
    label: Label = None
    split: str | None = None
    error: str | None = None
    repeat: int = 0
    """Which of the fields of this datum, where `dataset.repeats` asks for several."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the table's `metrics` is to say of it beside what its signal measures."""


class Dataset(Protocol):
    """Data by position. `read` may be called for any position, by many workers, none of which reads the rest."""

    is_thread_bound: bool = False
    """`read` is to be called in the thread that opened the dataset, and data are not read ahead: what lies behind it is
    not made for threads, or is not known."""

    @property
    def ids(self) -> Sequence[str]:
        """Stable and unique: the same datum has the same id in every run."""
        ...

    def read(self, position: int) -> Datum:
        """The datum at a position; an unreadable one comes back with `error`, never as an exception."""
        ...

    def index_of(self, position: int) -> int:
        """The `index` of the datum at a position, without reading it."""
        return position


class Opener(Protocol):
    """The contract of every entry of `DATASETS`."""

    def open(self) -> Dataset: ...


# --- ids


class ComputedIds(Sequence[str]):
    """Ids that are made when they are asked for; a slice is a list."""

    def __init__(self, count: int, id_at: Callable[[int], str]) -> None:
        self._count, self._id_at = count, id_at

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._id_at(position) for position in range(*place.indices(self._count))]
        position = place + self._count if place < 0 else place
        if not 0 <= position < self._count:
            raise IndexError(f"no datum {place} among {self._count}")
        return self._id_at(position)

    def __iter__(self) -> Iterator[str]:
        return map(self._id_at, range(self._count))


def row_id(position: int, split: str | None = None) -> str:
    """The id of a datum that has none of its own: `row-0000017`, or `train/0000017`."""
    return f"{split}/{position:07d}" if split else f"row-{position:07d}"


def refuse_duplicates(ids: Sequence[str], where: str) -> None:
    """Check that ids are unique, at 24 bytes for each while it lasts.

    Raises:
        CallerError: naming an id and two of its positions.
    """
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for first, second in zip(order[equal], order[equal + 1], strict=True):
        if ids[int(first)] == ids[int(second)]:
            raise CallerError(
                f"{where}: the id {ids[int(first)]!r} stands at positions {first} and {second}; "
                "ids tell data apart, so each may occur once"
            )


def ids_digest(ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order: whether two openings saw the same data."""
    digest = hashlib.sha256()
    for datum_id in ids:
        digest.update(datum_id.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


# --- parts and repeats of a dataset


@dataclass(frozen=True)
class Subset(Dataset):
    """Some positions of a dataset, in order. Data keep the ids and the indices they have in the whole."""

    whole: Dataset
    positions: Sequence[int] | np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_thread_bound", self.whole.is_thread_bound)

    @cached_property
    def ids(self) -> Sequence[str]:
        whole = self.whole.ids
        return ComputedIds(len(self.positions), lambda position: whole[int(self.positions[position])])

    def read(self, position: int) -> Datum:
        return self.whole.read(int(self.positions[position]))

    def index_of(self, position: int) -> int:
        return self.whole.index_of(int(self.positions[position]))


class Repeated(Dataset):
    """Each datum `count` times in a row, for as many fields from seeds of their own.

    The first keeps the id of the datum, the others are `ID#1`, `ID#2`, ...

    Raises:
        CallerError: if the dataset has such ids already.
    """

    def __init__(self, whole: Dataset, count: int) -> None:
        self.whole, self.count = whole, count
        self.is_thread_bound = whole.is_thread_bound
        self._last: tuple[int, Datum] | None = None  # repeats are read one after the other
        _refuse_repeat_ids(whole.ids, count)

    @cached_property
    def ids(self) -> Sequence[str]:
        whole, count = self.whole.ids, self.count
        return ComputedIds(len(whole) * count, lambda position: _repeat_id(whole[position // count], position % count))

    def read(self, position: int) -> Datum:
        place, repeat = divmod(position, self.count)
        if self._last is None or self._last[0] != place:
            self._last = (place, self.whole.read(place))
        datum = self._last[1]
        return Datum(
            _repeat_id(datum.id, repeat),
            datum.index * self.count + repeat,
            datum.content,
            datum.label,
            datum.split,
            datum.error,
            repeat,
        )

    def index_of(self, position: int) -> int:
        place, repeat = divmod(position, self.count)
        return self.whole.index_of(place) * self.count + repeat


def _repeat_id(datum_id: str, repeat: int) -> str:
    return f"{datum_id}#{repeat}" if repeat else datum_id


def _refuse_repeat_ids(ids: Sequence[str], count: int) -> None:
    named = {}
    for datum_id in ids:
        if "#" in datum_id and (found := re.fullmatch(r"(.*)#([1-9]\d*)", datum_id, re.DOTALL)):
            named |= {found[1]: datum_id} if int(found[2]) < count else {}
    taken = next((datum_id for datum_id in ids if datum_id in named), None) if named else None
    if taken is not None:
        raise CallerError(
            f"dataset.repeats={count} gives a repeat of {taken!r} the id {named[taken]!r}, which the dataset has "
            "already; rename that datum, or use dataset.repeats=1"
        )


def open_limited(opener: Opener, limit: int | None, seed: int) -> Dataset:
    """The dataset, or a seeded sample of `limit` data spread over it."""
    dataset = opener.open()
    if limit is None or limit >= len(dataset.ids):
        return dataset
    return Subset(dataset, np.sort(_sample(dataset.ids, limit, seed, "limit")))


def seeded_sample(ids: Sequence[str], count: int, seed: int, purpose: str) -> list[int]:
    """Positions of `count` data in random order: those whose hashes are least, so that order and size do not matter."""
    return _sample(ids, count, seed, purpose).tolist()


def _sample(ids: Sequence[str], count: int, seed: int, purpose: str) -> np.ndarray:
    """`seeded_sample` as int64 [min(count, N)], reading the ids once and keeping the least hashes seen so far."""
    hashes, positions = np.empty(0, np.uint64), np.empty(0, np.int64)
    remaining, start = iter(ids), 0
    while chunk := [datum_seed(seed, f"{purpose}\0{one}") for one in islice(remaining, max(_CHUNK, count))]:
        hashes = np.concatenate([hashes, np.array(chunk, np.uint64)])
        positions = np.concatenate([positions, np.arange(start, start + len(chunk), dtype=np.int64)])
        least = np.argsort(hashes, kind="stable")[:count]
        hashes, positions = hashes[least], positions[least]
        start += len(chunk)
    return positions


def read_range(dataset: Dataset, start: int, stop: int) -> Iterator[Datum]:
    """The data at positions start .. stop - 1."""
    for position in range(start, stop):
        yield dataset.read(position)


def require(condition: bool, message: str) -> None:
    """Refuse an opener's keys.

    Raises:
        CallerError: with the message, if the condition does not hold.
    """
    if not condition:
        raise CallerError(message)
