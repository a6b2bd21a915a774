"""Every export reads back, with the real package, as the weights that decode; few bits cost what is said."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from nfscale.cli.app import app
from nfscale.errors import CallerError
from nfscale.learn.exports import EXPORTS, export
from nfscale.learn.quantize import measured_loss, quantized
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job
from tests.learn.tables import made_table


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return made_table(tmp_path_factory.mktemp("made") / "run", 130, shard_rows=50)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """48 digits at a quality of about 30 dB, stored in half precision of the differences."""
    job = tiny_job(tmp_path_factory.mktemp("run") / "digits", "store.dtype=delta_float16", "fit.max_steps=100")
    encode_in_process(job)
    return open_weights(job.output)


def test_hugging_face_loads_the_folder_without_arguments(table, tmp_path):
    from datasets import load_dataset

    export(table, "hf", tmp_path / "hf")
    found = load_dataset(str(tmp_path / "hf"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in found.items()} == {"train": 78, "validation": 26, "test": 26}
    row = found["test"][0]
    assert np.array_equal(np.float32(row["weights"]), table.weights()[row["index"]])
    assert {"name": "height", "value": 8.0} in row["metrics"]


def test_lance_reads_the_rows(table, tmp_path):
    import lance

    export(table, "lance", tmp_path / "lance")
    read = lance.dataset(str(tmp_path / "lance" / "weights.lance")).to_table(columns=["index", "weights"])
    assert read["index"].to_pylist() == list(range(130))
    assert np.array_equal(table.matrix(read["weights"]), table.weights())


def test_numpy_reads_the_arrays_without_pickle(table, tmp_path):
    export(table, "npz", tmp_path / "npz")
    with np.load(tmp_path / "npz" / "weights.npz", allow_pickle=False) as read:
        assert np.array_equal(read["weights"], table.weights())
        assert np.array_equal(read["theta0"], table.theta0)
        assert read["label"].tolist() == [i % 3 for i in range(130)]
        assert read["split"][4] == "test"


def test_safetensors_hold_the_tensors_by_name(table, tmp_path):
    from safetensors.numpy import load_file

    export(table, "safetensors", tmp_path / "st")
    files = sorted((tmp_path / "st").glob("*.safetensors"))
    assert len(files) == 3
    params = table.layout.unravel(torch.from_numpy(table.weights()[50:100]))
    for name, tensor in load_file(files[1]).items():
        assert np.array_equal(tensor, params[name].numpy())
    assert pq.read_table(tmp_path / "st" / "rows.parquet")["datum_id"].to_pylist()[50] == "made-0000050"


def test_a_folder_of_pth_files_is_what_weight_space_networks_read(table, tmp_path):
    """As DWSNets' loader does it: every path of a split, keys in the order of the layers, weights [out, in]."""
    export(table, "pth", tmp_path / "pth")
    splits = json.loads((tmp_path / "pth" / "splits.json").read_text())
    assert {name: len(part["path"]) for name, part in splits.items()} == {"train": 78, "val": 26, "test": 26}
    state = torch.load(tmp_path / "pth" / splits["val"]["path"][0], weights_only=True)
    assert list(state) == [f"seq.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    assert np.array_equal(flat.numpy(), table.weights()[3])
    assert splits["val"]["label"][0] == 0


@pytest.mark.parametrize("to", EXPORTS)
def test_an_export_has_a_card_of_the_runs_facts_and_the_job(table, tmp_path, to):
    place = export(table, to, tmp_path / to)
    text = (place / "README.md").read_text()
    for fact in ("130 data", f"{table.layout.size:,} weights", "layers.1.weight", "psnr_db", "train 78", "omega_0: 30"):
        assert fact in text
    assert json.loads((place / "job.json").read_text())["theta0"]["dtype"] == "float32"
    with pytest.raises(CallerError, match="is not empty"):
        export(table, to, place)


def test_what_is_no_export_is_the_callers_mistake(table, tmp_path):
    with pytest.raises(CallerError, match="unknown form 'csv'"):
        export(table, "csv", tmp_path / "x")
    with pytest.raises(CallerError, match="goes with --to npz alone"):
        export(table, "hf", tmp_path / "x", "int8")


# --- few bits


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_rounding_is_within_half_a_step(table, kind):
    rows = torch.from_numpy(table.weights() - table.theta0)
    coarse = quantized(rows, table.layout, kind).restored(table.layout)
    for entry in table.layout.entries:
        part = slice(entry.offset, entry.offset + entry.size)
        largest = rows[:, part].abs().amax(dim=1, keepdim=True)
        step = largest / 127 if kind == "int8" else largest / 1024
        assert ((coarse - rows)[:, part].abs() <= step * 0.5001).all()
    assert (coarse != rows).any()


def test_the_loss_is_that_of_every_datum_and_decides(fitted):
    fine, coarse = (measured_loss(fitted, kind) for kind in ("float16", "int8"))
    assert len(fine.losses) == len(fitted) == 48
    assert fine.median <= 0.1
    fine.refuse()
    assert coarse.median > 10 * abs(fine.median)
    recorded = np.array(fitted.to_arrow(["quality"])["quality"].to_pylist())
    start = np.float32(0) + fitted.theta0
    zero = quantized(torch.from_numpy(fitted.weights() - start), fitted.layout, "int8")
    assert zero.codes.dtype == np.int8
    assert np.isfinite(recorded - coarse.losses).all()


def test_int8_is_refused_where_it_costs_too_much(fitted, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("nfscale.learn.quantize", fromlist=["x"]).LIMITS_DB, "int8", -100.0)
    arguments = ["export", fitted.folder.files.root, "--to", "npz", "--dtype", "int8", "-o", str(tmp_path / "out")]
    said = CliRunner().invoke(app, arguments)
    assert isinstance(said.exception, CallerError)
    assert "int8 costs" in str(said.exception)
    assert not (tmp_path / "out").exists()


def test_a_half_precision_export_decodes_to_the_same_data(fitted, tmp_path):
    arguments = ["export", fitted.folder.files.root, "--to", "npz", "--dtype", "float16", "-o", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "j.json")])
    assert said.exit_code == 0, said.output
    with np.load(tmp_path / "out" / "weights.npz", allow_pickle=False) as read:
        assert np.abs(read["differences"].astype(np.float32) + read["theta0"] - fitted.weights()).max() < 1e-3
    assert json.loads((tmp_path / "j.json").read_text())["median_loss"] <= 0.1
    assert len((tmp_path / "out" / "loss.csv").read_text().splitlines()) == 49
