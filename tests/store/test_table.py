"""The weights table: what is written reads back bit for bit, and the columns are those of the design."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from nfscale.errors import CallerError
from nfscale.fields import MLP
from nfscale.layout import Layout
from nfscale.store import open_weights
from nfscale.store.schema import Row, layout_of, table_schema, to_table, write_parquet
from tests.jobs import encode_in_process, tiny_job

COLUMNS = [
    *("datum_id", "index", "split", "label", "weights", "status", "reason", "loss", "quality", "quality_heldout"),
    *("metrics", "steps", "steps_to_target", "history_step", "history_quality", "seed", "wall_seconds"),
    *("shard", "attempt"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, _ = encode_in_process(tiny_job(tmp_path_factory.mktemp("run") / "tiny"))
    return folder


def test_a_file_written_today_reads_back_bit_for_bit(tmp_path):
    layout = MLP(2, 3, 16, 2).layout
    schema = table_schema(layout, "string", "psnr_db", "f" * 64, 1)
    noise = np.random.default_rng(0).integers(0, 2**32, (130, layout.size), dtype=np.uint32)
    weights = noise.view(np.float32)  # every bit pattern there is: subnormals, infinities, NaN payloads
    rows = [
        Row(
            f"d{i}",
            i,
            "max_steps",
            3,
            "a",
            2**64 - 1 - i,
            label="cat",
            weights=w,
            history_step=[0],
            history_quality=[1],
        )
        for i, w in enumerate(weights)
    ]
    rows.append(Row("bad", 130, "decode_error", 3, "a", 7, reason="not an image"))
    path = tmp_path / "t.parquet"
    write_parquet(to_table(rows, schema), path)
    table = pq.read_table(path)
    assert table.schema.equals(schema, check_metadata=False)
    assert table.schema.names == COLUMNS
    read = table["weights"].combine_chunks().flatten().to_numpy().reshape(131, -1)
    assert (read[:130].view(np.uint32) == noise).all()
    assert np.isnan(read[130]).all()
    assert table["seed"].to_pylist()[0] == 2**64 - 1
    assert layout_of(table.schema) == layout
    assert table.schema.metadata[b"nfscale.fingerprint"] == b"f" * 64


def test_weights_are_split_by_byte_compressed_and_without_statistics(run):
    column = pq.ParquetFile(run.files.path / run.commits()[0].file).metadata.row_group(0).column(4)
    assert column.path_in_schema.startswith("weights")
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert column.compression == "ZSTD"
    assert not column.is_stats_set


def test_a_field_in_the_table_is_not_nullable(run):
    kind = open_weights(run.files.path).schema.field("weights")
    assert not kind.nullable
    assert not kind.type.value_field.nullable


def test_rows_come_in_the_order_asked_for(run):
    table = open_weights(run.files.path)
    ids = table.to_arrow(["datum_id"])["datum_id"].to_pylist()
    wanted = [ids[40], ids[3], ids[3], ids[17]]
    assert table.rows(wanted)["datum_id"].to_pylist() == wanted


def test_data_are_found_by_id_and_by_index(run):
    table = open_weights(run.files.path)
    row = table.to_arrow(["datum_id", "index"]).slice(5, 1).to_pylist()[0]
    assert (table.decode([row["datum_id"]]) == table.decode([row["index"]])).all()


def test_a_stranger_decodes_by_what_job_json_says(run):
    """Layout, forward and output affine, by numpy alone."""
    job = json.loads((run.files.path / "job.json").read_text())
    keys, output = job["forward"]["field"]["keys"], job["forward"]["signal"]["output"]
    axis = (2 * np.arange(8) + 1) / 8 - 1
    coordinates = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(64, 2)
    images = load_digits().images / 16
    root = run.files.path
    table = pq.read_table(root / json.loads((root / "commits" / "shard-00000.json").read_text())["file"])
    for row in table.slice(0, 5).to_pylist():
        weights = np.array(row["weights"])
        tensors = {
            entry["name"]: weights[entry["offset"] :][: np.prod(entry["shape"])].reshape(entry["shape"])
            for entry in job["layout"]
        }
        hidden = coordinates
        for layer in range(keys["depth"]):
            omega = keys["omega_hidden"] if layer else keys["omega_0"]
            hidden = np.sin(omega * (hidden @ tensors[f"layers.{layer}.weight"].T + tensors[f"layers.{layer}.bias"]))
        y = hidden @ tensors[f"layers.{keys['depth']}.weight"].T + tensors[f"layers.{keys['depth']}.bias"]
        error = np.mean((output["scale"] * y[:, 0] + output["shift"] - images[row["index"]].ravel()) ** 2)
        assert 10 * np.log10(1 / error) == pytest.approx(row["quality"], abs=1e-3)


def test_a_field_decodes_at_any_shape(run):
    table = open_weights(run.files.path)
    some = table.to_arrow(["index"])["index"].to_pylist()[:3]
    assert table.decode(some, (5, 11)).shape == (3, 5, 11, 1)
    alone = table.decode(some[:1], (5, 11))
    assert (alone == table.decode(some, (5, 11))[:1]).all(), "the same alone and among others"
    assert (table.decode(some, "5x11") == table.decode(some, (5, 11))).all()
    assert table.shapes(some, "5x11") == [(5, 11)] * 3
    with pytest.raises(CallerError, match=r"shape: .*'5-11'"):
        table.decode(some, "5-11")


def test_unknown_data_and_columns_are_the_callers_mistake(run):
    table = open_weights(run.files.path)
    with pytest.raises(CallerError, match=r"no committed row for \['nobody'\]"):
        table.decode(["nobody"])
    with pytest.raises(CallerError, match="unknown columns"):
        table.to_arrow(["wights"])


def test_a_folder_without_a_run_is_the_callers_mistake(tmp_path):
    with pytest.raises(CallerError, match="is not a run folder"):
        open_weights(tmp_path)


def test_the_torch_dataset_is_standardised_differences_from_theta0(run):
    table = open_weights(run.files.path)
    raw, labels = table.torch_dataset(standardize=None).tensors
    assert np.allclose(raw.numpy() + table.theta0, table.weights(), atol=1e-6)
    assert set(labels.tolist()) <= set(range(10))
    standard, _ = table.torch_dataset(standardize="all").tensors
    assert standard.mean(dim=0).abs().max() < 1e-4
    assert (standard.std(dim=0) - 1).abs().median() < 1e-3


def test_the_layout_in_the_plan_is_the_layout_in_the_files(run):
    schema = pq.read_schema(run.files.path / run.commits()[0].file)
    assert layout_of(schema) == run.plan().layout == Layout.from_json(run.plan().layout.to_json())
    assert pa.types.is_fixed_size_list(schema.field("weights").type)
