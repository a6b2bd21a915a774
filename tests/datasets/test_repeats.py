"""Several fields of one datum, and samples of datasets that are too large to list."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from nfscale.datasets import DATASETS
from nfscale.datasets.base import (
    ComputedIds,
    Dataset,
    Datum,
    Repeated,
    Subset,
    ids_digest,
    open_limited,
    refuse_duplicates,
    row_id,
    seeded_sample,
)
from nfscale.errors import CallerError
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job


class Counted(Dataset):
    """Four data; how often each was read."""

    def __init__(self, ids=("a", "b", "c", "d")):
        self._ids, self.reads = list(ids), []

    @property
    def ids(self):
        return self._ids

    def read(self, position):
        self.reads.append(position)
        if position == 2:
            return Datum(self._ids[2], 2, None, "label-2", "train", "broken")
        return Datum(self._ids[position], position, np.full((2, 2), position, np.uint8), f"label-{position}", "train")


def test_repeats_lie_together_and_keep_label_and_split():
    whole = Counted()
    repeated = Repeated(Subset(whole, [1, 2, 3]), 3)
    assert list(repeated.ids) == ["b", "b#1", "b#2", "c", "c#1", "c#2", "d", "d#1", "d#2"]
    data = [repeated.read(position) for position in range(9)]
    assert [datum.id for datum in data] == list(repeated.ids)
    assert [datum.index for datum in data] == [repeated.index_of(p) for p in range(9)] == list(range(3, 12))
    assert [datum.repeat for datum in data] == [0, 1, 2] * 3
    assert {datum.split for datum in data} == {"train"}
    assert [datum.label for datum in data] == [f"label-{i}" for i in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    assert [datum.error for datum in data[3:6]] == ["broken"] * 3
    assert (data[8].content == 3).all()
    assert whole.reads == [1, 2, 3], "a datum is read once for its repeats"


def test_ids_that_look_like_repeats_are_refused_where_they_would_collide():
    whole = Counted(["a", "a#1", "b#7", "#1"])
    with pytest.raises(CallerError, match="gives a repeat of 'a' the id 'a#1', which the dataset has already"):
        Repeated(whole, 2)
    assert len(set(Repeated(Counted(["a", "a#2", "b#1", "a#01"]), 2).ids)) == 8


def test_a_job_fits_each_repeat_from_its_own_seed(tmp_path):
    dataset = {"kind": "digits", "limit": 3, "repeats": 2}
    job = tiny_job(tmp_path / "run", "optimizer.kind=adam", "field.init=per_datum", "fit.max_steps=20", dataset=dataset)
    folder, _ = encode_in_process(job)
    table = open_weights(folder.files.path)
    rows = table.to_arrow(columns=["datum_id", "index", "label", "seed"]).to_pylist()
    assert len(rows) == 6
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert second["datum_id"] == first["datum_id"] + "#1"
        assert second["index"] == first["index"] + 1
        assert first["index"] % 2 == 0
        assert second["label"] == first["label"]
        assert second["seed"] != first["seed"]
    weights = table.weights()
    assert (weights[0] != weights[1]).any()


def test_repeats_apply_after_the_limit_and_are_part_of_the_fingerprint(tmp_path):
    once, twice = (tiny_job(tmp_path, dataset={"kind": "digits", "limit": 5, "repeats": k}) for k in (1, 2))
    assert list(twice.open_dataset().ids)[::2] == list(once.open_dataset().ids)
    assert once.fingerprint("ids") != twice.fingerprint("ids")
    with pytest.raises(CallerError, match=r"dataset.repeats"):
        tiny_job(tmp_path, dataset={"kind": "digits", "repeats": 0})


@dataclass(frozen=True)
class Many:
    def open(self):
        whole = Counted()
        whole._ids = ComputedIds(400_000, row_id)
        return whole


def test_many_ids_are_sampled_and_limited_without_listing_them():
    dataset = Many().open()
    tracemalloc.start()
    drawn = seeded_sample(dataset.ids, 1000, 0, "x")
    limited = open_limited(Many(), 40_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(drawn)) == 1000
    assert peak < 14e6, "bytes; a list of the ids alone would take 27 MB"
    assert len(limited.ids) == 40_000
    assert limited.ids[0] == row_id(limited.index_of(0))


def test_a_sample_is_the_least_hashes_whatever_the_chunks(monkeypatch):
    ids = [row_id(i) for i in range(1000)]
    whole = seeded_sample(ids, 37, 5, "x")
    monkeypatch.setattr("nfscale.datasets.base._CHUNK", 10)
    assert seeded_sample(ids, 37, 5, "x") == whole
    assert sorted(seeded_sample(ids, 5000, 5, "x")) == list(range(1000))
    assert seeded_sample(ids, 0, 5, "x") == []


def test_duplicates_are_named_with_their_positions():
    refuse_duplicates([], "here")
    refuse_duplicates(["a", "b"], "here")
    with pytest.raises(CallerError, match="here: the id 'b' stands at positions 1 and 3"):
        refuse_duplicates(["a", "b", "c", "b"], "here")


def test_the_digest_of_computed_ids_is_that_of_the_list():
    assert ids_digest(ComputedIds(50, row_id)) == ids_digest([row_id(i) for i in range(50)])
    assert list(DATASETS["digits"]().open().ids)[:1] == ["digit-0000"]
