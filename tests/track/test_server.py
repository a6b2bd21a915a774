"""A real tracking server: what it misses while it is down is there afterwards, once."""

import os
import subprocess
import sys
import time

import pytest
import yaml

from nfscale.store.run_folder import RunFolder
from tests.chaos.machines import TrackingServer
from tests.jobs import tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

mlflow = pytest.importorskip("mlflow")

LONGER = {
    "dataset": {"kind": "digits", "limit": 300},
    "fit": {"max_steps": 800, "samples": "full", "check_every": 20, "target": None, "step": "plain"},  # has a middle
    "store": {"shard_fields": 20},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tracking = TrackingServer(tmp_path_factory.mktemp("server") / "mlflow")
    try:
        tracking.wait()
        yield tracking
    finally:
        tracking.kill()


def nfscale(server: TrackingServer, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "nfscale", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def points(server: TrackingServer, folder: RunFolder) -> dict[str, list[int]]:
    """Steps of the points that MLflow has of a run, by metric."""
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("nfscale")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`nfscale.run` = '{folder.plan().id}'")
    metrics = ("shard/fields", "shard/seconds", "datum/quality", "datum/steps")
    return {name: sorted(p.step for p in client.get_metric_history(run.info.run_id, name)) for name in metrics}


def whole(folder: RunFolder) -> dict[str, list[int]]:
    orders, indices = sorted(commit.order for commit in folder.commits()), list(range(300))
    return {"shard/fields": orders, "shard/seconds": orders, "datum/quality": indices, "datum/steps": indices}


@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_a_server_that_is_killed_is_brought_up_to_the_run_by_review(server, tmp_path, when):
    folder = RunFolder(tmp_path / "run")
    settings = tiny_settings(tmp_path / "run", **LONGER)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    if when == "from the start":
        assert server.kill()
    encode = nfscale(server, "encode", str(tmp_path / "job.yaml"))
    if when == "in the middle":
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (folder.tracking and len(folder.files.names("commits")) >= 3):
            time.sleep(0.02)
        assert server.kill()
        assert len(folder.files.names("commits")) < 15
    _, errors = encode.communicate(timeout=300)
    assert encode.returncode == 0, errors
    assert errors.count("does not have this run") == 1
    assert folder.is_complete
    assert not folder.is_tracked
    server.start()
    server.wait()
    for _ in range(2):
        review = nfscale(server, "review", str(tmp_path / "run"))
        _, errors = review.communicate(timeout=300)
        assert (review.returncode, errors) == (0, "")
        assert folder.is_tracked
        assert points(server, folder) == whole(folder)


def test_a_run_is_whole_in_a_server_that_is_up(server, tmp_path):
    settings = tiny_settings(tmp_path / "run", **LONGER)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    encode = nfscale(server, "encode", str(tmp_path / "job.yaml"))
    _, errors = encode.communicate(timeout=300)
    assert encode.returncode == 0, errors
    assert "does not have this run" not in errors
    folder = RunFolder(tmp_path / "run")
    assert folder.is_tracked, "with its decoder as a version of a registered model"
    assert points(server, folder) == whole(folder)
    versions = mlflow.MlflowClient(server.uri).search_model_versions("name = 'nfscale-tiny'")
    assert len(versions) >= 1
