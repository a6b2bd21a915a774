"""Blocks of data as data: ids, places, and what becomes of data that cannot be cut."""

import numpy as np
import pytest

from nfscale.datasets import tiled
from nfscale.datasets.base import Dataset, Datum, Repeated, Subset
from nfscale.datasets.tiled import Tiled, counted
from nfscale.errors import CallerError
from nfscale.signals import Image
from nfscale.signals.tiles import Tile

TILE, SIGNAL = Tile((4, 4), (1, 1)), Image(1)


class Pictures(Dataset):
    """Pictures of several sizes, one that is unreadable, one that is no picture; which were read."""

    def __init__(self, ids=("a", "small", "broken", "odd", "b")):
        self._ids, self.reads = list(ids), []
        draw = np.random.default_rng(0)
        self.contents = [draw.random(shape).astype(np.float32) for shape in ((9, 7), (2, 3), (1, 1), (5,), (4, 12))]

    @property
    def ids(self):
        return self._ids

    def read(self, position):
        self.reads.append(position)
        label = f"label-{position}"
        if position == 2:
            return Datum(self._ids[2], 2, None, label, "train", "broken file")
        return Datum(self._ids[position], position, self.contents[position], label, "test")


def blocks_of(data, tile=TILE):
    return Tiled(data, SIGNAL, tile, counted(data, SIGNAL, tile))


def test_every_datum_is_counted_once_and_what_cannot_be_cut_is_one_block():
    data = Pictures()
    assert counted(data, SIGNAL, TILE) == ((1, (3, 2)), (3, (1, 1)), (1, (1, 4)))
    assert data.reads == [0, 1, 2, 3, 4]


def test_blocks_have_ids_places_and_the_cells_of_their_datum():
    data = Pictures()
    dataset = blocks_of(data)
    ids = [*(f"a@{y},{x}" for y in range(3) for x in range(2)), "small@0,0", "broken@0,0", "odd@0,0"]
    assert list(dataset.ids) == [*ids, *(f"b@0,{x}" for x in range(4))]
    data.reads.clear()
    read = [dataset.read(position) for position in range(len(dataset.ids))]
    assert data.reads == [0, 1, 2, 3, 4], "a datum is read once for its blocks"
    assert [datum.id for datum in read] == list(dataset.ids)
    assert [datum.index for datum in read] == [*range(6), 6, 12, 18, 24, 25, 26, 27]
    assert [dataset.index_of(position) for position in range(13)] == [datum.index for datum in read]
    for datum in read:
        if datum.error is None:
            whole = data.contents[data.ids.index(datum.id.split("@")[0])]
            top, left = (int(datum.metrics[f"start_{name}"]) for name in ("height", "width"))
            height, width = datum.content.shape
            assert (whole[top : top + height, left : left + width] == datum.content).all()
            assert (datum.metrics["whole_height"], datum.metrics["whole_width"]) == whole.shape
            assert datum.content.base is None, "a view would keep the whole datum in memory"
    assert {read[position].content.shape for position in range(6)} == {(4, 4)}
    assert (read[7].error, read[7].content, read[7].metrics, read[7].split) == ("broken file", None, {}, "train")
    assert "an image is [height, width]" in read[8].error
    assert {datum.label for datum in read[9:]} == {"label-4"}


def test_parts_and_repeats_of_data_are_cut_like_others():
    dataset = blocks_of(Repeated(Subset(Pictures(), [1, 4]), 2))
    assert list(dataset.ids)[:3] == ["small@0,0", "small#1@0,0", "b@0,0"]
    read = [dataset.read(position) for position in range(len(dataset.ids))]
    assert len({datum.index for datum in read}) == len(read) == 10
    assert [datum.repeat for datum in read] == [0, 1, *[0] * 4, *[1] * 4]


def test_a_datum_that_changed_since_it_was_counted_is_rows_with_a_reason():
    data = Pictures()
    dataset = blocks_of(data)
    data.contents[0] = data.contents[0][:4]
    assert [dataset.read(position).error for position in (0, 5)] == [
        "the datum has 1 x 2 blocks, and 3 x 2 when the run was planned: it has changed since, or could not be read "
        "then; a new output plans anew"
    ] * 2
    assert dataset.read(6).error is None


def test_a_datum_of_too_many_blocks_is_one_row_that_says_so(monkeypatch):
    monkeypatch.setattr(tiled, "MAX_BLOCKS", 5)
    dataset = blocks_of(Pictures())
    assert list(dataset.ids)[0:2] == ["a@0,0", "small@0,0"]
    assert dataset.read(0).error == "6 blocks, at most 5 are made of a datum; use a larger signal.tile"


def test_ids_that_look_like_blocks_are_refused_where_they_would_collide():
    with pytest.raises(CallerError, match=r"gives a block of 'a' the id 'a@2,1', which the dataset has already"):
        blocks_of(Pictures(["a", "a@2,1", "c", "d", "e"]))
    dataset = blocks_of(Pictures(["a", "a@2", "b@1,1", "a@x,y", "@1,2,3"]))
    assert len(set(dataset.ids)) == len(dataset.ids)


def test_counts_of_other_data_are_refused():
    with pytest.raises(CallerError, match="2 data are there, blocks were counted of 5"):
        Tiled(Subset(Pictures(), [0, 1]), SIGNAL, TILE, counted(Pictures(), SIGNAL, TILE))


def test_what_decides_is_spread_over_the_first_data_that_are_cut(monkeypatch):
    dataset = blocks_of(Pictures())
    assert list(dataset.probe_positions()) == [*range(6), *range(9, 13)]
    monkeypatch.setattr(tiled, "PROBED_BLOCKS", 4)
    assert list(dataset.probe_positions()) == [0, 5, 9, 12]
