"""A real tracking server: what it misses while it is down is there afterwards, once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nfscale.store.run_folder import RunFolder
from tests.chaos.machines import TrackingServer
from tests.jobs import tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

mlflow = pytest.importorskip("mlflow")

COUNT = 120


@pytest.fixture
def server(tmp_path) -> Iterator[TrackingServer]:
    tracking = TrackingServer(tmp_path / "mlflow")
    try:
        tracking.wait()
        yield tracking
    finally:
        tracking.kill()


class Command:
    """A command of nfscale that uses the server."""

    def __init__(self, server: TrackingServer, log: Path, *arguments: str) -> None:
        environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._log = log
        with open(log, "w") as stream:
            command = [sys.executable, "-m", "nfscale", *arguments]
            self.running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stream)

    def errors(self) -> str:
        """What it said, once it has ended as it should."""
        try:
            code = self.running.wait(timeout=300)
        finally:
            self.running.kill()
        said = self._log.read_text()
        assert code == 0, said
        return said


def job_file(folder: Path) -> Path:
    """A job of six shards, of which the last three wait for the file `go`."""
    arguments = {"count": COUNT, "first": 60, "until": str(folder / "go")}
    dataset = {"kind": "function", "target": "tests.strange_data:Held", "arguments": arguments}
    settings = tiny_settings(
        folder / "run", dataset=dataset, optimizer={"kind": "adam"}, store={"shard_fields": 20}, name="held"
    )
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def points(server: TrackingServer, folder: RunFolder) -> dict[str, list[int]]:
    """Steps of the points that MLflow has of a run, by metric."""
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("nfscale")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`nfscale.run` = '{folder.plan().id}'")
    metrics = ("shard/fields", "shard/seconds", "datum/quality", "datum/steps")
    return {name: sorted(p.step for p in client.get_metric_history(run.info.run_id, name)) for name in metrics}


def whole(folder: RunFolder) -> dict[str, list[int]]:
    orders, indices = sorted(commit.order for commit in folder.commits()), list(range(COUNT))
    return {"shard/fields": orders, "shard/seconds": orders, "datum/quality": indices, "datum/steps": indices}


@pytest.mark.parametrize("when", ["from the start", "in the middle"])
def test_a_server_that_is_killed_is_brought_up_to_the_run_by_review(server, tmp_path, when):
    folder, job = RunFolder(tmp_path / "run"), job_file(tmp_path)
    if when == "from the start":
        assert server.kill()
        (tmp_path / "go").touch()
    encode = Command(server, tmp_path / "encode.log", "encode", str(job))
    if when == "in the middle":
        try:
            deadline = time.monotonic() + 200
            while not folder.tracking or len(folder.files.names("commits")) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            killed = server.kill()
            (tmp_path / "go").touch()
        assert killed
    assert encode.errors().count("does not have this run") == 1
    assert folder.is_complete
    assert not folder.is_tracked
    server.start()
    server.wait()
    for _ in range(2):
        assert Command(server, tmp_path / "review.log", "review", str(tmp_path / "run")).errors() == ""
        assert folder.is_tracked
        assert points(server, folder) == whole(folder)


def test_a_run_is_whole_in_a_server_that_is_up(server, tmp_path):
    folder, job = RunFolder(tmp_path / "run"), job_file(tmp_path)
    (tmp_path / "go").touch()
    assert Command(server, tmp_path / "encode.log", "encode", str(job)).errors() == ""
    assert folder.is_tracked, "with its decoder as a version of a registered model"
    assert points(server, folder) == whole(folder)
    assert len(mlflow.MlflowClient(server.uri).search_model_versions("name = 'nfscale-held'")) == 1
