"""The rows of `nfscale benchmark stream`: every way reads the whole table, and the stream holds little of it."""

import json
import tracemalloc

import pyarrow as pa
import pytest

from nfscale.benchmark import stream
from nfscale.benchmark.app import main
from nfscale.errors import NfscaleError
from nfscale.learn import WeightsStream
from nfscale.store import open_weights

KEYS = ["way", "rows_per_second", "mb_per_second", "wall_ratio", "cpu_seconds", "cpu_ratio", "peak_mb"]


def test_ways_are_timed_in_processes_of_their_own(tmp_path, monkeypatch):
    chosen = ["pyarrow file by file, one thread", "stream, first epoch"]
    monkeypatch.setattr(stream, "WAYS", {name: stream.WAYS[name] for name in chosen})
    monkeypatch.setattr(stream, "SCANS", {name: stream.SCANS[name] for name in chosen[:1]})
    arguments = ["--rows", "9000", "--weights", "12", "--rounds", "1", "--folder", str(tmp_path)]
    main(["stream", *arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["way"] for row in rows] == chosen
    assert all(list(row) == KEYS for row in rows)
    assert rows[0]["wall_ratio"] == rows[0]["cpu_ratio"] == 1
    assert all(row["peak_mb"] > 10 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "the table is removed"


def test_the_table_of_a_run_is_read_where_one_is_given(monkeypatch):
    read = []
    monkeypatch.setattr(stream, "_measured", lambda *asked: read.append(asked) or [])
    main(["stream", "runs/mine", "--rounds", "2", "--batch", "64"])
    assert read == [("runs/mine", 64, 2)]


@pytest.mark.parametrize("dtype", ["float32", "delta_float16"])
def test_the_table_is_one_that_readers_take(tmp_path, dtype):
    place = str(tmp_path / "run")
    stream._written(place, 5000, 7, dtype)
    table = open_weights(place)
    assert (len(table), len(table.commits), table.layout.size) == (5000, 2, 7)
    assert 0.005 < (table.weights() - table.theta0).std() < 0.02
    assert sorted(set(table.to_arrow(["label"])["label"].to_pylist())) == list(range(10))
    for read in stream.WAYS.values():
        assert read(table, 64)() == 5000


def test_a_way_that_comes_to_less_fails():
    stream._refuse_less("a scan", {"rows": 100}, 100)
    with pytest.raises(NfscaleError, match="a scan came to 100 rows of 101"):
        stream._refuse_less("a scan", {"rows": 100}, 101)


def test_a_stream_holds_its_window_and_not_the_table(tmp_path):
    """80,000 rows of 300 weights take 96 MB; a window of 2,000 of them 3 MB, a piece that is read 5 MB."""
    stream._written(str(tmp_path / "run"), 80_000, 300, "float32")
    batches = WeightsStream(open_weights(tmp_path / "run"), 256, window_rows=2000)
    _ = batches.labels
    arrow, before = 0, pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for _ in batches:
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        _, numpy = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert numpy < 10e6
    assert 4e6 < arrow < 60e6
