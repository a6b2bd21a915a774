"""The copy for training is the table, memory-mapped; one of other commits is not used."""

import json

import numpy as np
import pytest

from nfscale.store import open_weights
from nfscale.store.ipc import COLUMNS, ipc_copy, write_ipc_copy
from tests.jobs import encode_in_process, tiny_job


@pytest.fixture
def folder(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run", "store.dtype=delta_float16", "fit.max_steps=20"))
    return folder


def test_the_copy_holds_the_rows_of_the_table(folder):
    table = open_weights(str(folder))
    without = table.training_table()
    assert ipc_copy(table) is None
    pairs = list(table.torch_dataset())
    write_ipc_copy(folder)
    mapped = table.training_table()
    assert mapped.column_names == without.column_names == list(COLUMNS)
    assert mapped.to_pylist() == without.to_pylist()
    assert (table.weights() == table.matrix(without["weights"])).all()
    for (weights, label), (before, label_before) in zip(table.torch_dataset(), pairs, strict=True):
        assert (weights == before).all()
        assert label == label_before


def test_the_copy_is_a_view_into_its_file(folder):
    write_ipc_copy(folder)
    column = ipc_copy(open_weights(str(folder)))["weights"].chunk(0)
    assert not column.flatten().to_numpy(zero_copy_only=True).flags.writeable


def test_a_copy_of_other_commits_is_not_used_and_is_made_anew(folder):
    write_ipc_copy(folder)
    made = folder.files.path / "weights.arrow"
    stamp = made.stat().st_mtime_ns
    write_ipc_copy(folder)
    assert made.stat().st_mtime_ns == stamp, "it is up to date"
    record = folder.files.path / "commits" / "shard-00001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "0" * 64}))
    assert ipc_copy(open_weights(str(folder))) is None
    write_ipc_copy(folder)
    assert made.stat().st_mtime_ns != stamp
    assert np.isfinite(open_weights(str(folder)).weights()).all()
