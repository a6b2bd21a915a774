"""Data read in a process apart: the same data, and one that kills its reader is an error."""

import subprocess
import sys

import numpy as np
import pytest

from nfscale import apart
from nfscale.datasets.base import Dataset, Datum
from nfscale.driver import open_run
from nfscale.errors import CallerError
from tests.jobs import tiny_job
from tests.strange_data import Deadly

NEEDS_FORK = pytest.mark.skipif(not apart._may_fork(), reason="this process has threads, or a system without fork")


class Data(Dataset):
    def __init__(self, images):
        self.images = images

    @property
    def ids(self):
        return [f"id-{n}" for n in range(len(self.images))]

    def read(self, position):
        item = self.images[position]
        return Datum(self.ids[position], position, item["array"], item["label"])


@NEEDS_FORK
def test_a_deadly_datum_is_an_error_and_the_others_are_read(tmp_path):
    data = Data(Deadly(6, 2, str(tmp_path / "log")))
    found = list(apart.read_apart(data, range(6)))
    assert [datum.index for datum in found] == list(range(6))
    assert found[2].content is None
    assert found[2].error == "reading it ended the process (exit code -11)"
    for position in (0, 1, 3, 4, 5):
        assert np.array_equal(found[position].content, data.read(position).content)
        assert found[position].label == position % 3
    assert (tmp_path / "log").read_text() == "killed\n"


@NEEDS_FORK
def test_content_that_cannot_be_sent_is_read_here():
    data = Data([{"array": lambda: 7, "label": None}])
    (datum,) = apart.read_apart(data, [0])
    assert datum.content() == 7


@pytest.mark.skipif(apart._may_fork(), reason="these tests run in this process")
def test_a_process_without_threads_passes_these_tests():
    """Where another test has loaded what has threads, as in a run of all tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "5 passed, 1 skipped" in done.stdout


def test_where_no_fork_may_be_data_are_read_here(monkeypatch):
    monkeypatch.setattr(apart, "_may_fork", lambda: False)
    content = object()
    (datum,) = apart.read_apart(Data([{"array": content, "label": None}]), [0])
    assert datum.content is content


@NEEDS_FORK
def test_a_plan_survives_a_datum_that_kills_its_reader(tmp_path):
    arguments = {"count": 30, "deadly": 5, "log": str(tmp_path / "log")}
    dataset = {"kind": "function", "target": "tests.strange_data:Deadly", "arguments": arguments}
    _, plan = open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam", dataset=dataset))
    assert plan.data_count == 30
    assert plan.label_type == "int64"


@NEEDS_FORK
def test_data_that_all_kill_their_reader_are_no_dataset(tmp_path):
    arguments = {"count": 1, "deadly": 0, "log": str(tmp_path / "log")}
    dataset = {"kind": "function", "target": "tests.strange_data:Deadly", "arguments": arguments}
    with pytest.raises(CallerError, match=r"none of 1 data .* ended the process \(exit code -11\)"):
        open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam", dataset=dataset))
