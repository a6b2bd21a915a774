"""`nfscale tune` on real Ray: trials go where leases go, and a node that is lost costs what it was trying."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from nfscale.cli.app import app
from nfscale.coordinator import Failure
from nfscale.datasets import seeded_sample
from nfscale.distributed import RayPool
from nfscale.errors import EncodeError, ExitCode
from nfscale.job import load_job
from nfscale.plan.trials import Trials
from nfscale.plan.tune import tune
from nfscale.pool import Failed, InProcessPool
from tests.jobs import tiny_job, tiny_settings

pytestmark = pytest.mark.filterwarnings("default")


class Watched(RayPool):
    """A pool that remembers its calls and what became of them."""

    def __init__(self, *arguments):
        self.calls, self.heard = [], []
        super().__init__(*arguments)

    def start(self, lease):
        self.calls.append(lease)
        super().start(lease)

    def poll(self, seconds):
        events = super().poll(seconds)
        self.heard += events
        return events


def few_and_small(monkeypatch):
    monkeypatch.setattr("nfscale.plan.tune.CANDIDATES", 6)
    monkeypatch.setattr("nfscale.plan.tune._RUNG_DATA", (4, 8))


@pytest.mark.ray
def test_the_command_tries_settings_on_the_jobs_workers(tmp_path):
    """In a process of its own, as a user has it: a Ray that starts in one that has had others may not."""
    settings = tiny_settings(tmp_path / "run") | {"workers": 2, "track": {"enabled": False}}
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "nfscale",
        "tune",
        tmp_path / "job.yaml",
        "--seconds",
        "1",
        "-o",
        tmp_path / "tuned",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    said = subprocess.run([str(one) for one in command], capture_output=True, text=True, env=environment, timeout=300)
    assert said.returncode == 0, said.stderr
    figures = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert figures["tried"] >= 8
    positions = seeded_sample(load_job(tmp_path / "job.yaml").open_dataset().ids, 64, 0, "tune")
    here = Trials(settings, positions, InProcessPool(None))
    (own,) = here.tried([()], figures["compared_on"], first=len(positions) - figures["compared_on"])
    assert figures["own_quality"] == own.quality
    assert load_job(tmp_path / "tuned" / "tuned.yaml").workers == 2


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("nfscale.distributed.ray_pool._HEAD_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "job.yaml").write_text(json.dumps(tiny_settings(tmp_path / "run") | {"workers": "auto"}))
    said = CliRunner().invoke(app, ["tune", str(tmp_path / "job.yaml"), "-o", str(tmp_path / "tuned")])
    assert isinstance(said.exception, EncodeError)
    assert f"nothing listens at RAY_ADDRESS={address}" in str(said.exception)
    assert said.exception.exit_code == ExitCode.FAILED
    assert not (tmp_path / "tuned").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_lost_while_it_tries_settings_costs_no_more_than_these(cluster, tmp_path, monkeypatch):
    few_and_small(monkeypatch)
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    leaving, _ = cluster.add_node(**small), cluster.add_node(**small)
    job = tiny_job(tmp_path / "run", "fit.max_steps=2000", workers="auto")
    pool = Watched(None, "auto", None, "auto", 6)

    def lose() -> None:
        """The node, once something is tried on it."""
        while not any(worker.node == leaving.node_id and worker.lease for worker in list(pool._workers.values())):
            time.sleep(0.01)
        cluster.remove_node(leaving, allow_graceful=False)

    loses = threading.Thread(target=lose, daemon=True)
    loses.start()
    try:
        trials = Trials(job.model_dump(mode="json", exclude_none=True), list(range(48)), pool)
        found = tune(job, trials, seconds=1, seed=0)
    finally:
        pool.close()
    assert not loses.is_alive()
    failures = [event for event in pool.heard if isinstance(event, Failed)]
    assert [event.failure for event in failures] in ([Failure.INFRA], [Failure.CRASH])  # by which of both dies first
    assert len(pool.calls) == len(pool.heard), "each call has an end, that of the lost worker and its repetition too"
    assert all(math.isfinite(one.quality) or one.why_not for one in found.trials.values())
    assert not any("died" in one.why_not for one in found.trials.values())
    assert found.best.data == 32
