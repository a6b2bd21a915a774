"""The contract of a dataset, and seeded samples of one."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from nfscale.errors import CallerError
from nfscale.rng import datum_seed

Label = str | int | None


@dataclass(frozen=True)
class Datum:
    """One datum as it was read, or the reason why it could not be."""

    id: str
    index: int
    """Position in the dataset."""
    array: np.ndarray | None
    label: Label = None
    split: str | None = None
    error: str | None = None


class Dataset(Protocol):
    """Data by position. `read` may be called for any position, by many workers, none of which reads the rest."""

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


@dataclass(frozen=True)
class Subset(Dataset):
    """Some positions of a dataset, in order. Data keep the ids and the indices they have in the whole."""

    whole: Dataset
    positions: Sequence[int]

    @cached_property
    def ids(self) -> Sequence[str]:
        whole = self.whole.ids
        return [whole[position] for position in self.positions]

    def read(self, position: int) -> Datum:
        return self.whole.read(self.positions[position])

    def index_of(self, position: int) -> int:
        return self.whole.index_of(self.positions[position])


def open_limited(opener: Opener, limit: int | None, seed: int) -> Dataset:
    """The dataset, or a seeded sample of `limit` data spread over it."""
    dataset = opener.open()
    if limit is None or limit >= len(dataset.ids):
        return dataset
    return Subset(dataset, sorted(seeded_sample(dataset.ids, limit, seed, "limit")))


def seeded_sample(ids: Sequence[str], count: int, seed: int, purpose: str) -> list[int]:
    """Positions of `count` data in random order: those whose hashes are least, so that order and size do not matter."""
    return heapq.nsmallest(count, range(len(ids)), key=lambda position: datum_seed(seed, f"{purpose}\0{ids[position]}"))


def ids_digest(ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order: whether two openings saw the same data."""
    digest = hashlib.sha256()
    for datum_id in ids:
        digest.update(datum_id.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


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
