"""Readers: every row once, in any order, by any process, and by other libraries from the files as they are."""

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch.utils.data import DataLoader

from nfscale.errors import CallerError
from nfscale.learn import Rows, WeightsMap, WeightsStream
from nfscale.learn.views import hf_arguments, hf_dataset
from nfscale.store import open_weights
from nfscale.store.ipc import write_ipc_copy
from tests.learn.tables import made_table

ROWS = 730


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """730 rows in 8 files; every 50th row diverged."""
    return made_table(tmp_path_factory.mktemp("made") / "run", ROWS)


def expected(table, keep):
    """Differences and labels of the rows of these indices, read the plain way."""
    rows = table.to_arrow(["weights", "label"])
    return table.matrix(rows["weights"])[keep] - table.theta0, rows["label"].to_numpy()[keep]


def ok(index):
    return index % 50 != 49


def sorted_rows(weights, labels):
    order = np.argsort(weights[:, 0], kind="stable")
    return weights[order], labels[order]


def gathered(batches):
    weights, labels = zip(*batches, strict=True)
    return torch.cat(weights).numpy(), torch.cat(labels).numpy()


@pytest.mark.parametrize("window_rows", [64, 300, None])
def test_a_stream_gives_every_row_once_in_another_order_each_epoch(table, window_rows):
    keep = np.flatnonzero(ok(np.arange(ROWS)))
    stream = WeightsStream(table, 64, window_rows=window_rows)
    first, second = gathered(stream), gathered(stream)
    assert not np.array_equal(first[0], second[0])
    for epoch in (first, second):
        for found, wanted in zip(sorted_rows(*epoch), sorted_rows(*expected(table, keep)), strict=True):
            assert np.array_equal(found, wanted)
    again = WeightsStream(table, 64, window_rows=window_rows)
    assert np.array_equal(gathered(again)[0], first[0]), "a seed is an order"


def test_without_a_seed_a_stream_keeps_the_order_and_fills_its_batches(table):
    batches = list(WeightsStream(table, 64, seed=None, window_rows=100))
    assert [len(labels) for _, labels in batches] == [64] * 11 + [ROWS - ROWS // 50 - 11 * 64]
    weights, labels = expected(table, np.flatnonzero(ok(np.arange(ROWS))))
    assert np.array_equal(gathered(batches)[0], weights)
    assert np.array_equal(gathered(batches)[1], labels)


@pytest.mark.parametrize(("dtype", "off"), [("float16", 0.0), ("delta_float16", 1e-6)])
def test_half_precision_is_read_as_float32(tmp_path, dtype, off):
    """Differences that are stored come as they are; those of restored weights are off by their rounding."""
    half = made_table(tmp_path / "run", 150, dtype=dtype)
    weights = expected(half, np.flatnonzero(ok(np.arange(150))))[0]
    (streamed, _), mapped = gathered(WeightsStream(half, 64, seed=None)), WeightsMap(half)
    assert streamed.dtype == np.float32
    assert np.abs(streamed - weights).max() <= off
    assert np.array_equal(torch.stack([row for row, _ in mapped]).numpy(), streamed)
    if dtype == "delta_float16":
        assert np.array_equal(streamed.astype(np.float16), streamed)


def test_a_stream_mixes_neighbours(table):
    """Labels of a sorted table come mixed: here position in the stream against index."""
    places = {row.tobytes(): at for at, row in enumerate(expected(table, np.arange(ROWS))[0])}
    found = [places[row.tobytes()] for row in gathered(WeightsStream(table, 64))[0]]
    assert abs(np.corrcoef(found, np.arange(len(found)))[0, 1]) < 0.15


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, where another test has loaded it
def test_processes_and_workers_share_a_stream_without_overlap(table):
    parts = [WeightsStream(table, 32, rank=rank, world=3) for rank in range(3)]
    weights = np.concatenate([gathered(part)[0] for part in parts])
    assert len(np.unique(weights[:, 0])) == len(weights) == ROWS - ROWS // 50
    loader = DataLoader(WeightsStream(table, 32), batch_size=None, num_workers=2)
    assert len(np.unique(gathered(loader)[0][:, 0])) == ROWS - ROWS // 50
    with pytest.raises(CallerError, match="rank 3 of 3"):
        WeightsStream(table, rank=3, world=3)


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        (Rows(), ok),
        (Rows(split="train"), lambda i: ok(i) & (i % 5 < 3)),
        (Rows(split=("validation", "test"), min_quality=400), lambda i: ok(i) & (i % 5 >= 3) & (i >= 400)),
        (Rows(status="diverged"), lambda i: ~ok(i)),
        (Rows(status=("max_steps", "diverged", "decode_error")), lambda i: i >= 0),
        (Rows(min_quality=ROWS), lambda i: i < 0),
    ],
)
def test_rows_are_chosen_by_split_status_and_quality_alike_by_all_readers(table, rows, passes):
    keep = np.flatnonzero(passes(np.arange(ROWS)))
    wanted = expected(table, keep)
    assert table.to_arrow(["index"], rows.expression)["index"].to_pylist() == keep.tolist()
    by_position = WeightsMap(table, rows)
    assert len(by_position) == len(keep)
    if len(keep):
        assert np.array_equal(gathered(WeightsStream(table, 50, rows=rows, seed=None))[0], wanted[0])
        found, labels = zip(*by_position.__getitems__(list(range(len(keep)))), strict=True)
        assert np.array_equal(torch.stack(found).numpy(), wanted[0])
        assert list(labels) == wanted[1].tolist()
    else:
        assert list(WeightsStream(table, 50, rows=rows)) == []


def test_a_map_reads_the_same_from_the_copy_and_goes_into_a_loader(tmp_path):
    table = made_table(tmp_path / "run", 150)
    from_parquet = WeightsMap(table, Rows(split="train"))
    write_ipc_copy(table.folder)
    from_copy = WeightsMap(open_weights(tmp_path / "run"), Rows(split="train"), transform=lambda rows: rows * 2)
    assert from_copy._mapped is not None
    assert from_copy.ids == from_parquet.ids
    for position in (0, 7, len(from_copy) - 1):
        assert torch.equal(from_copy[position][0], 2 * from_parquet[position][0])
        assert from_copy[position][1] == from_parquet[position][1]
    batches = list(DataLoader(from_copy, batch_size=20, shuffle=True))
    assert sum(len(labels) for _, labels in batches) == len(from_copy)


def test_a_stream_holds_a_window_and_no_more(table, monkeypatch):
    """What is read ahead is bounded: no more pieces are in memory than a window and a few in the making."""
    read, handed = [], []
    stream = WeightsStream(table, 10, window_rows=100)
    inner = stream._read
    monkeypatch.setattr(stream, "_read", lambda piece: read.append(piece) or inner(piece))
    for weights, _ in stream:
        handed.append(len(weights))
        assert 100 * len(read) - sum(handed) <= 100 * 6


# --- other libraries read the files as they are


def test_duckdb_reads_the_files(table):
    import duckdb

    asked = "select count(*), sum(len(weights)), avg(quality) from read_parquet($files) where split = 'train'"
    count, numbers, quality = duckdb.execute(asked, {"files": table.files()}).fetchall()[0]
    train = [i for i in range(ROWS) if i % 5 < 3]
    assert count == len(train)
    assert numbers == len(train) * table.layout.size
    assert quality == pytest.approx(np.mean(train))


def test_polars_reads_the_files(table):
    import polars

    read = polars.scan_parquet(table.files()).filter(polars.col("index") >= 700).sort("index").collect()
    assert read.columns == table.schema.names
    assert np.array_equal(read["weights"].to_numpy(), table.weights()[700:])


def test_hugging_face_reads_the_files(table, tmp_path):
    from datasets import load_dataset

    arguments = hf_arguments(table)
    whole = load_dataset("parquet", split="train", cache_dir=str(tmp_path), **arguments)
    assert len(whole) == ROWS
    assert np.array_equal(np.array(whole[17]["weights"], dtype=np.float32), table.weights()[17])
    streamed = next(iter(load_dataset("parquet", split="train", streaming=True, **arguments)))
    assert streamed["datum_id"] == "made-0000000"
    view = hf_dataset(table, Rows(split="test"))
    assert set(view["split"]) == {"test"}
    assert view.with_format("numpy")[:5]["weights"].dtype == np.float32
    with pytest.raises(CallerError, match="metrics is a map"):
        hf_arguments(table, ["metrics"])


@pytest.mark.ray
@pytest.mark.slow
def test_ray_data_reads_the_files(table):
    import ray
    from ray.data.expressions import col

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        read = ray.data.read_parquet(table.files()).select_columns(["index", "weights"])
        assert read.count() == ROWS
        assert read.filter(expr=col("index") == 3).take_all()[0]["weights"] == table.weights()[3].tolist()
    finally:
        ray.shutdown()


def test_a_table_of_many_files_opens_and_filters(tmp_path):
    table = made_table(tmp_path / "run", 200, shard_rows=1)
    assert len(table.to_arrow(["index"], pc.field("index") >= 190)) == 10
    assert sum(len(labels) for _, labels in WeightsStream(table, 64)) == 196
