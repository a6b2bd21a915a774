"""The rows of `esgd`, `fit` and `gpu` follow from what was measured."""

import json
from pathlib import Path

import pytest
import torch

from nfscale.benchmark import fit as fit_benchmark
from nfscale.benchmark.app import main
from nfscale.benchmark.fit import photographs
from nfscale.benchmark.gpu import per_second
from nfscale.benchmark.step import Machine
from nfscale.datasets import photos
from nfscale.engine import Stop
from nfscale.errors import CallerError, NfscaleError

ONE = ["--threads", "1", "--rounds", "1"]


def rows_of(path, *arguments):
    main([*arguments, *ONE, "--json", str(path)])
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("step", ["auto", "plain"])
def test_the_cost_of_curvature_is_over_adam_in_the_same_family(step, tmp_path):
    arguments = ["esgd", "--workloads", "A", "--fields", "2", "--update-every", "2,3", "--step", step]
    rows = rows_of(tmp_path / "rows.json", *arguments)
    assert [(row["curvature"], row["update_every"]) for row in rows] == [
        ("shared", 2),
        ("per_field", 2),
        ("shared", 3),
        ("per_field", 3),
    ]
    for row in rows:
        assert list(row)[:4] == ["workload", "curvature", "update_every", "cost_over_adam"]
        assert row["cost_over_adam"] == pytest.approx(row["ms_min"] / row["adam_ms_min"] - 1)
        assert step in ("auto", row["step"])


@pytest.mark.parametrize("cadence", ["0", "ten", "10,"])
def test_a_cadence_that_is_no_number_is_refused(cadence):
    with pytest.raises(CallerError, match="--update-every is a list of numbers of steps"):
        main(["esgd", "--update-every", cadence, *ONE])


def test_refill_and_lockstep_take_the_same_steps(tmp_path):
    arguments = ["--tiles", "7", "--batch", "3", "--target", "20", "--max-steps", "60", "--step", "plain"]
    (row,) = rows_of(tmp_path / "rows.json", "fit", *arguments)
    assert row["time_ratio"] == pytest.approx(row["refill_s"] / row["lockstep_s"])
    assert (row["fields"], row["slots"]) == (7, 3)
    assert 0 < row["steps_mean"] / row["steps_longest"] <= row["steps_ratio"] <= 1


def test_an_encode_is_taken_apart(tmp_path):
    job = Path(__file__).parents[2] / "pipelines" / "digits.yaml"
    small = ["dataset.limit=40", "fit.max_steps=100", "fit.target=10", "workers=0"]
    path = tmp_path / "rows.json"
    main(["encode", str(job), *small, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    parts = {row["part"]: row for row in rows}
    assert {"calibration", "reading", "steps", "checks", "writing", "waiting", "starting", "finishing"} <= set(parts)
    assert sum(row["share"] for row in rows if row["share"] is not None) == pytest.approx(1)
    assert all(row["seconds"] > 0 for row in rows)


def test_an_encode_without_a_job_is_the_callers_mistake():
    with pytest.raises(CallerError, match=r"no job file 'none.yaml'"):
        main(["encode", "none.yaml"])


def test_fits_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(fit_benchmark, "_refilled", lambda data, *others: {data[0][0]: 1})
    with pytest.raises(NfscaleError, match="different steps"):
        fit_benchmark.measured(photographs(2), Stop(2, 99.0, 2), 2, "plain", Machine("cpu", 1), rounds=1)


def test_photographs_that_are_not_installed_are_the_callers_mistake(monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda package: None)
    with pytest.raises(CallerError, match=r"which come with scikit-image.*needs the package skimage"):
        main(["fit", *ONE])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure():
    with pytest.raises(CallerError, match="torch sees no CUDA device on this machine") as refused:
        main(["gpu"])
    assert refused.value.exit_code == 2


def test_fields_per_second_are_of_a_thousand_steps(tmp_path):
    arguments = ["--device", "cpu", "--workloads", "mnist", "--fields", "2", "--methods", "loop,nfscale"]
    arguments += ["--fitted", "2"]
    rows = {row["method"]: row for row in rows_of(tmp_path / "rows.json", "gpu", *arguments)}
    for row in rows.values():
        assert row["fields_per_second"] == pytest.approx(per_second(2, row["ms_min"]))
        assert row["fraction_of_limit"] is None
    assert rows["loop"]["psnr_difference_db"] is None
    assert rows["nfscale"]["psnr_db"] > 20
    assert abs(rows["nfscale"]["psnr_difference_db"]) < 0.5
    assert per_second(500, 2.0) == 250


def test_a_precision_that_the_device_has_not_is_refused_before_anything_is_measured():
    with pytest.raises(CallerError, match="precision='tf32' cannot be taken: it is for an NVIDIA GPU, not for cpu"):
        main(["gpu", "--device", "cpu", "--precision", "tf32"])


def test_of_few_fields_the_step_of_torch_is_timed_with_and_without_graphs(tmp_path):
    arguments = ["--device", "cpu", "--workloads", "few", "--fields", "2", "--fitted", "0", "--rounds", "1"]
    rows = rows_of(tmp_path / "rows.json", "gpu", *arguments, "--methods", "replayed,launched")
    assert [(row["method"], row["step"]) for row in rows] == [("replayed", "torch"), ("launched", "torch")]
