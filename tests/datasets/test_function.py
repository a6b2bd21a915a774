"""Data from the user's code: whatever it raises, the caller or the datum is told."""

import sys
import textwrap

import numpy as np
import pytest

from nfscale.datasets.function import Function
from nfscale.errors import CallerError
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job

MODULE = "nfscale_test_data"
CODE = """
import numpy as np

NUMBER = 3

def waves(count=4, size=6):
    y, x = np.indices((size, size)) / size
    return [(0.5 + 0.5 * np.sin(3 * i * x + y)).astype(np.float32) for i in range(count)]

class Labelled:
    ids = ["first", "second", "third", "fourth", "fifth"]
    def __init__(self, bad=True):
        self.bad = bad
    def __len__(self):
        return 5
    def __getitem__(self, index):
        if index == 2 and self.bad:
            raise RuntimeError("the disk is\\n on fire")
        label = "text" if index == 3 and self.bad else np.int64(index)
        split = "train" if index < 4 else None
        return {"array": np.full((2, 2), index, np.uint8), "label": label, "split": split}

class Named:
    def __init__(self, names):
        self.names = names
    def __len__(self):
        return len(self.names)
    def __getitem__(self, index):
        if self.names[index] is None:
            raise KeyError("gone")
        return {"array": np.zeros((2, 2), np.uint8), "id": self.names[index]}

class FewIds(Named):
    ids = ["one"]

def items(**given):
    return [{"array": "a string"}, {"label": 1}, {"array": np.array(["x"])}, {"array": np.ones(2), "label": 0.5}, None]

def stored():
    import sqlite3

    database = sqlite3.connect(":memory:")  # refuses to be used in another thread
    database.execute("create table images (number integer)")
    database.executemany("insert into images values (?)", [(n,) for n in range(6)])

    class Rows:
        def __len__(self):
            return 6
        def __getitem__(self, index):
            (number,) = database.execute("select number from images where number = ?", (index,)).fetchone()
            return np.full((3, 3), 40 * number, np.uint8)

    return Rows()

def nothing():
    return None

def fails(reason="why"):
    raise OSError(reason)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder, as a user has it."""
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "nfscale_test_broken.py").write_text("import nowhere_to_be_found")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield MODULE
    for name in (MODULE, "nfscale_test_broken"):
        sys.modules.pop(name, None)


def test_a_function_that_returns_a_list_of_arrays(module):
    dataset = Function(f"{module}:waves", {"count": 3}).open()
    assert list(dataset.ids) == ["row-0000000", "row-0000001", "row-0000002"]
    datum = dataset.read(2)
    assert datum.content.shape == (6, 6)
    assert (datum.id, datum.index, datum.label, datum.split, datum.error) == (dataset.ids[2], 2, None, None, None)


def test_a_class_with_ids_labels_and_splits(module):
    dataset = Function(f"{module}:Labelled", {"bad": False}).open()
    assert list(dataset.ids)[:2] == ["first", "second"]
    data = [dataset.read(position) for position in range(5)]
    assert [d.label for d in data] == [0, 1, 2, 3, 4]
    assert {type(d.label) for d in data} == {int}
    assert [d.split for d in data] == ["train"] * 4 + [None]


def test_what_an_item_raises_is_its_error(module):
    dataset = Function(f"{module}:Labelled").open()
    assert dataset.read(2).error == "RuntimeError: the disk is on fire"
    assert dataset.read(3).error == "the label 'text' is no int, as the first label is"
    assert dataset.read(4).error is None
    errors = [Function(f"{module}:items").open().read(position).error for position in range(5)]
    assert errors[0] == "the item is a str of length 8; expected an array, or a mapping with `array`"
    assert errors[1].startswith("the item is nothing (None)")
    assert errors[2].startswith("the item is an array of <U1")
    assert errors[3].startswith("the label is a float")
    assert errors[4].startswith("the item is nothing (None)")


def test_ids_may_come_from_the_items(module):
    dataset = Function(f"{module}:Named", {"names": ["x", None, 3]}).open()
    assert list(dataset.ids) == ["x", "row-0000001", "3"]
    assert dataset.read(1).error == "KeyError: 'gone'"
    with pytest.raises(CallerError, match="the id 'x' stands at positions 0 and 1"):
        Function(f"{module}:Named", {"names": ["x", "x"]}).open()
    with pytest.raises(CallerError, match=r"`ids` .* is a list of length 1; expected 2 ids, one per item"):
        Function(f"{module}:FewIds", {"names": ["x", "y"]}).open()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("waves", r"dataset.target is module:name, such as my_data:make, got 'waves'"),
        ("../evil:f", r"dataset.target is module:name"),
        ("no_such_module_here:f", r"No module named 'no_such_module_here'; modules are looked up"),
        ("nfscale_test_broken:f", r"importing 'nfscale_test_broken': ModuleNotFoundError: .*nowhere_to_be_found"),
        (f"{MODULE}:wave", r"has no 'wave'; it has: FewIds, Labelled, Named, fails, items, nothing, stored, waves"),
        (f"{MODULE}:NUMBER", r"is a int; expected a function or a class"),
        (f"{MODULE}:nothing", r"returned a NoneType without __len__"),
        (f"{MODULE}:fails", r"calling .*: OSError: why"),
        (f"{MODULE}:Named", r"calling .* with the arguments \[\]: TypeError: .*names"),
    ],
)
def test_what_cannot_be_imported_or_called_is_the_callers_mistake(module, target, message):
    with pytest.raises(CallerError, match=message):
        Function(target).open()


def test_a_job_takes_its_data_from_a_function(module, tmp_path):
    dataset = {"kind": "function", "target": f"{module}:Labelled", "arguments": {"bad": True}}
    job = tiny_job(tmp_path / "run", "optimizer.kind=adam", "fit.max_steps=20", dataset=dataset)
    folder, summary = encode_in_process(job)
    rows = open_weights(folder.files.path).to_arrow(columns=["datum_id", "label", "status", "reason"]).to_pylist()
    assert summary.failed == 2
    assert [row["label"] for row in rows] == [0, 1, None, None, 4]
    assert rows[2]["reason"] == "RuntimeError: the disk is on fire"
    assert np.isfinite(open_weights(folder.files.path).weights()[0]).all()


@pytest.mark.parametrize("settings", [{}, {"limit": 4}, {"repeats": 2}], ids=["all", "some", "repeated"])
def test_what_is_bound_to_its_thread_is_read_there(module, tmp_path, settings):
    dataset = {"kind": "function", "target": f"{module}:stored", **settings}
    folder, summary = encode_in_process(tiny_job(tmp_path / "run", "optimizer.kind=adam", dataset=dataset))
    assert summary.failed == 0
    assert len(open_weights(folder.files.path)) == {"limit": 4, "repeats": 12}.get(next(iter(settings), ""), 6)
