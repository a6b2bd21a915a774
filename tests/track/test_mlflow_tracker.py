"""The MLflow run, read back with MlflowClient: it holds what the table holds, once, however often it is written."""

import dataclasses
import json
import os
import socket
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from nfscale.review import make_report
from nfscale.store import open_weights
from nfscale.track import TOO_MANY_FAILED, Tracker, tracking_uri
from nfscale.track.mlflow_tracker import _Projection
from tests.jobs import Recorder, encode_in_process, tiny_job

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def encode_tracked(job, *observers):
    """A run with its tracker, as the command line makes it, without the report."""
    from nfscale.driver import open_run, serve
    from nfscale.pool import InProcessPool

    folder, plan = open_run(job)
    warnings = []
    tracker = Tracker(folder, plan, warnings.append)
    state = "KILLED"
    try:
        for observer in (tracker, *observers):
            observer.on_start(folder, plan, folder.commits())
        if not folder.is_complete:
            serve(folder, plan, InProcessPool(folder), [tracker, *observers])
        state = "FINISHED"
    finally:
        tracker.close(state)
    return folder, tracker, warnings


def client_of(folder):
    return mlflow.MlflowClient(tracking_uri(folder))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder, tracker, warnings = encode_tracked(tiny_job(tmp_path_factory.mktemp("tracked") / "runs" / "tiny"))
    assert not warnings
    return folder, tracker.run_id


def test_the_store_is_beside_the_output(tracked):
    folder, _ = tracked
    assert (folder.files.path.parent / "mlruns.db").exists()


def test_per_datum_points_are_those_of_the_table(tracked):
    folder, run_id = tracked
    table = {row["index"]: row for row in open_weights(folder.files.path).to_arrow().to_pylist()}
    for name in ("quality", "steps", "steps_to_target"):
        expected = {index: row[name] for index, row in table.items() if row[name] is not None}
        points = {m.step: m.value for m in client_of(folder).get_metric_history(run_id, f"datum/{name}")}
        assert points == pytest.approx(expected)
    assert len(table) == 48


def test_params_tags_inputs_and_totals(tracked):
    folder, run_id = tracked
    run = client_of(folder).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["field.width"] == "16"
    assert run.data.params["optimizer.kind"] == "esgd"
    assert run.data.tags["nfscale.fingerprint"] == folder.plan().fingerprint
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"digits", "tiny weights"}
    assert sum(v for k, v in run.data.metrics.items() if k.startswith("count/")) == 48
    quality = open_weights(folder.files.path).to_arrow(["quality"])["quality"].to_numpy()
    assert run.data.metrics["quality/mean"] == pytest.approx(quality.mean())
    medians = client_of(folder).get_metric_history(run_id, "convergence/quality_p50")
    assert [m.step for m in medians] == [0, 20, 40, 60]


def test_totals_and_statuses_are_exactly_those_of_the_table(tracked):
    folder, run_id = tracked
    table = open_weights(folder.files.path).to_arrow(["quality", "status"])
    metrics = client_of(folder).get_run(run_id).data.metrics
    counts = {f"count/{name}": float(count) for name, count in Counter(table["status"].to_pylist()).items()}
    assert {name: value for name, value in metrics.items() if name.startswith("count/")} == counts
    quality = table["quality"].to_numpy()
    for name, percentile in (("p05", 5), ("p50", 50), ("p95", 95)):
        assert metrics[f"quality/{name}"] == float(np.percentile(quality, percentile))
    for commit in folder.commits():
        points = client_of(folder).get_metric_history(run_id, "shard/failed")
        assert {p.step: p.value for p in points}[commit.order] == commit.failed


def test_a_person_reads_what_came_out_and_where_to_look(tracked):
    folder, run_id = tracked
    run = client_of(folder).get_run(run_id)
    assert run.data.tags["nfscale.state"] == "complete"
    assert run.data.tags["nfscale.modality"] == "image"
    assert run.data.tags["nfscale.dataset"] == "digits"
    assert run.data.tags["nfscale.output"] == str(folder.files.path)
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("Complete: ")
    assert "`datum/*`" in note
    read, weights = (i.dataset for i in run.inputs.dataset_inputs)
    assert "mlflow_colspec" in json.loads(read.schema)
    columns = json.loads(weights.schema)["mlflow_colspec"]
    assert [column["name"] for column in columns] == folder.plan().table_schema().names


@pytest.mark.parametrize(
    ("status", "state", "expected"),
    [
        ("FINISHED", None, ("FINISHED", "complete")),
        ("FAILED", TOO_MANY_FAILED, ("FAILED", "too_many_failed")),
        ("KILLED", None, ("KILLED", "killed")),
        ("FAILED", None, ("FAILED", "failed")),
        ("RUNNING", None, ("RUNNING", "running")),
        (None, None, ("KILLED", "killed")),
    ],
)
def test_the_status_is_right_in_every_ending(tracked, status, state, expected):
    """In this order: the last one finds a run that claims to be running, and nobody works on it."""
    folder, run_id = tracked
    tracker = Tracker(folder, folder.plan(), pytest.fail, drives=False)
    tracker.on_start(folder, folder.plan(), folder.commits())
    tracker.close(status, state=state)
    run = client_of(folder).get_run(run_id)
    assert (run.info.status, run.data.tags["nfscale.state"]) == expected
    assert folder.is_tracked


def test_a_run_has_ended_also_where_its_report_could_not_be_stored(tracked, monkeypatch):
    folder, run_id = tracked
    warnings = []
    tracker = Tracker(folder, folder.plan(), warnings.append)
    tracker.on_start(folder, folder.plan(), folder.commits())
    monkeypatch.setattr("mlflow.MlflowClient.log_artifact", lambda *_: 1 / 0)
    make_report(folder)
    tracker.log_review()
    tracker.close("FINISHED")
    assert "ZeroDivisionError" in warnings[0]
    assert client_of(folder).get_run(run_id).info.status == "FINISHED"


def test_nodes_are_looked_at(tracked):
    folder, run_id = tracked
    tracker = Tracker(folder, folder.plan(), pytest.fail, nodes=lambda: {"a node": {"cpu_utilization_percentage": 7.0}})
    tracker.on_start(folder, folder.plan(), folder.commits())
    for _ in range(3):
        tracker.on_tick()
    tracker.close("FINISHED")
    points = client_of(folder).get_metric_history(run_id, "system/a-node/cpu_utilization_percentage")
    assert [point.value for point in points] == [7.0], "one look in ten seconds"


def test_a_huge_run_has_points_of_some_shards(tracked):
    folder, _ = tracked
    plan = dataclasses.replace(folder.plan(), data_count=10_000_000, shard_fields=500)
    projection = _Projection.__new__(_Projection)
    projection.plan, projection.per_datum = plan, False
    assert projection._every == 10


def test_every_shard_has_its_aggregates(tracked):
    folder, run_id = tracked
    points = client_of(folder).get_metric_history(run_id, "shard/quality_p50")
    assert {p.step: p.value for p in points} == {c.order: pytest.approx(c.quality["p50"]) for c in folder.commits()}


def test_writing_it_again_doubles_nothing(tracked):
    folder, run_id = tracked
    before = {
        name: len(client_of(folder).get_metric_history(run_id, name))
        for name in client_of(folder).get_run(run_id).data.metrics
    }
    tracker = Tracker(folder, folder.plan(), print)
    tracker.on_start(folder, folder.plan(), folder.commits())
    tracker.close("FINISHED")
    assert tracker.run_id == run_id
    after = {name: len(client_of(folder).get_metric_history(run_id, name)) for name in before}
    assert after == before
    (experiment,) = [e for e in client_of(folder).search_experiments() if e.name == "nfscale"]
    assert len(client_of(folder).search_runs([experiment.experiment_id])) == 1


@pytest.mark.filterwarnings("ignore:.*type hints:UserWarning")
def test_the_review_and_a_model_that_decodes_are_artifacts_of_the_run(tracked, monkeypatch):
    folder, run_id = tracked
    make_report(folder)
    for _ in range(2):
        tracker = Tracker(folder, folder.plan(), print)
        tracker.on_start(folder, folder.plan(), folder.commits())
        tracker.log_review()
        tracker.close("FINISHED")
        assert tracker.problem is None
    names = {artifact.path for artifact in client_of(folder).list_artifacts(run_id, "review")}
    assert {"review/report.html", "review/convergence.parquet", "review/worst.csv", "review/worst.json"} <= names
    tags = client_of(folder).get_run(run_id).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "review/worst.json", "type": "table"}]
    worst = open_weights(folder.files.path).to_arrow(["quality"])["quality"].to_numpy().min()
    shown = mlflow.MlflowClient(tracking_uri(folder)).download_artifacts(run_id, "review/worst.json")
    with open(shown) as file:
        table = json.load(file)
    assert table["data"][0][table["columns"].index("quality")] == pytest.approx(worst, abs=1e-4)
    assert f"worst **{worst:.2f}**" in tags["mlflow.note.content"]
    assert "review/worst-median-best.png" in names
    (version,) = client_of(folder).search_model_versions("name='nfscale-tiny'")
    assert "MLFLOW_TRACKING_URI" not in os.environ, "the store of one run must not become that of the next"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(folder))
    model = mlflow.pyfunc.load_model(f"models:/nfscale-tiny/{version.version}")
    table = open_weights(folder.files.path)
    ids = table.to_arrow(["datum_id"])["datum_id"].to_pylist()[:2]
    assert (np.stack(model.predict(pd.DataFrame({"datum_id": ids}))) == table.decode(ids)).all()
    (large,) = model.predict(pd.DataFrame({"datum_id": ids[:1], "shape": ["20x30"]}))
    assert large.shape == (20, 30, 1)


def test_a_run_that_was_killed_is_continued(tmp_path, tracked):
    import shutil

    home = tmp_path / "runs"
    home.mkdir()
    shutil.copy(tracked[0].files.path.parent / "mlruns.db", home / "mlruns.db")  # migrated already: saves seconds

    class Dies(Recorder):
        def on_commit(self, commit):
            raise KeyboardInterrupt

    job = tiny_job(home / "other", "seed=1")
    with pytest.raises(KeyboardInterrupt):
        encode_tracked(job, Dies())
    folder, tracker, warnings = encode_tracked(job)
    assert not warnings
    run = client_of(folder).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    points = client_of(folder).get_metric_history(tracker.run_id, "datum/quality")
    assert len(points) == len({p.step for p in points}) == 48
    assert folder.is_tracked


def test_a_driver_killed_while_it_opened_the_run_leaves_no_second_one(tracked):
    folder, run_id = tracked
    record = folder.files.path / "mlflow.json"
    before = record.read_bytes()
    record.unlink()  # as if the driver had died between creating the run and writing down which it is
    try:
        tracker = Tracker(folder, folder.plan(), print)
        tracker.on_start(folder, folder.plan(), folder.commits())
        tracker.close("FINISHED")
        assert tracker.run_id == run_id
        run = client_of(folder).get_run(run_id)
        assert len(run.inputs.dataset_inputs) == 2
    finally:
        record.write_bytes(before)


def test_a_server_that_is_down_is_a_warning_and_is_made_up_for_later(tmp_path, monkeypatch, tracked):
    import shutil

    home = tmp_path / "runs"
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, _, warnings = encode_tracked(tiny_job(home / "run"))
    assert folder.is_complete
    assert not folder.is_tracked
    assert len(warnings) == 1
    assert "does not have this run" in warnings[0]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copy(tracked[0].files.path.parent / "mlruns.db", home / "mlruns.db")
    folder, tracker, warnings = encode_tracked(tiny_job(home / "run"))
    assert not warnings
    assert len(client_of(folder).get_metric_history(tracker.run_id, "datum/quality")) == 48


def test_a_large_job_has_no_points_per_datum(tmp_path, tracked):
    import shutil

    (tmp_path / "runs").mkdir()
    shutil.copy(tracked[0].files.path.parent / "mlruns.db", tmp_path / "runs" / "mlruns.db")
    job = tiny_job(tmp_path / "runs" / "large", track={"per_datum_limit": 47})
    folder, tracker, _ = encode_tracked(job)
    assert client_of(folder).get_metric_history(tracker.run_id, "datum/quality") == []
    assert len(client_of(folder).get_metric_history(tracker.run_id, "shard/fields")) == 3


def test_encode_in_process_needs_no_tracker(tmp_path):
    encode_in_process(tiny_job(tmp_path / "run", "fit.max_steps=20"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
