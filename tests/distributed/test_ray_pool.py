"""Real Ray in this machine: the same rows as without it, whatever is killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from nfscale.driver import open_run, serve
from nfscale.store import open_weights
from nfscale.store.run_folder import RunFolder
from nfscale.verify import verify
from tests.jobs import Recorder, encode_in_process, tiny_job, tiny_settings
from tests.processes import ancestors, command_of, descendants, killed_after

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

LONGER = {
    "dataset": {"kind": "digits", "limit": 300},
    "fit": {"max_steps": 400, "samples": "full", "check_every": 20, "target": None, "step": "plain"},  # for kills
    "store": {"shard_fields": 20},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights that every run of `LONGER` must give."""
    folder, _ = encode_in_process(tiny_job(tmp_path_factory.mktemp("undisturbed") / "run", **LONGER))
    return open_weights(folder.files.path)


def assert_equal_to(undisturbed, folder: RunFolder) -> None:
    table = open_weights(folder.files.path)
    assert sorted(table.to_arrow(["datum_id"])["datum_id"].to_pylist()) == sorted(
        undisturbed.to_arrow(["datum_id"])["datum_id"].to_pylist()
    )
    assert (table.weights() == undisturbed.weights()).all()


def test_a_worker_that_is_killed_is_replaced(tmp_path, undisturbed):
    from nfscale.distributed import RayPool

    class Kills(Recorder):
        killed = 0

        def on_commit(self, commit):
            super().on_commit(commit)
            if not self.killed and len(self.commits) == 3:
                self.killed = _kill_one_worker()

    folder, plan = open_run(tiny_job(tmp_path / "run", "workers=2", **LONGER))
    pool = RayPool(folder, workers=2)
    seen = Kills()
    try:
        serve(folder, plan, pool, [seen])
    finally:
        pool.close()
    assert seen.killed
    assert "worker-2" in {c.worker for c in seen.commits}, "the two first ones are worker-0 and worker-1"
    assert_equal_to(undisturbed, folder)


def test_a_datum_that_kills_its_worker_costs_its_own_row_and_nothing_else(tmp_path):
    from nfscale.distributed import RayPool

    arguments = {"count": 24, "deadly": 13, "log": str(tmp_path / "log")}
    dataset = {"kind": "function", "target": "tests.strange_data:Deadly", "arguments": arguments}
    keys = ("optimizer.kind=adam", "fit.max_steps=20", "store.shard_fields=8")
    folder, plan = open_run(tiny_job(tmp_path / "run", *keys, dataset=dataset))
    pool = RayPool(folder, workers=2)
    try:
        serve(folder, plan, pool, [])
    finally:
        pool.close()
    rows = open_weights(folder.files.path).to_arrow(["index", "status", "reason"]).to_pylist()
    assert sorted(row["index"] for row in rows) == list(range(24))
    assert [row["index"] for row in rows if row["status"] != "max_steps"] == [13]
    (row,) = [row for row in rows if row["index"] == 13]
    assert row["status"] == "crashed"
    assert "the worker process died (SYSTEM_ERROR)" in row["reason"]
    assert len((tmp_path / "log").read_text().splitlines()) <= math.log2(8) + 2
    assert not verify(folder).mismatches
    assert folder.uncommitted() == []


def _kill_one_worker() -> int:
    """SIGKILL the newest actor process below this one; its id."""
    found = subprocess.run(["pgrep", "-f", "ray::_FitWorker"], capture_output=True, text=True).stdout.split()
    ours = [int(pid) for pid in found if os.getpid() in ancestors(int(pid))]
    os.kill(ours[-1], signal.SIGKILL)
    return ours[-1]


def test_the_driver_killed_with_its_workers_costs_the_shards_in_flight(tmp_path, undisturbed):
    settings = tiny_settings(tmp_path / "run", **LONGER) | {"workers": 2, "track": {"enabled": False}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml")]
    commits = tmp_path / "run" / "commits"
    killed_after(command, lambda: len(list(commits.glob("*.json"))) >= 3, tmp_path / "first.log")
    before = {p.name: json.loads(p.read_text())["attempt"] for p in commits.glob("*.json")}
    assert 3 <= len(before) < 15, (tmp_path / "first.log").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"resuming: {20 * len(before)} of 300 fields are committed" in again.stdout
    after = {p.name: json.loads(p.read_text())["attempt"] for p in commits.glob("*.json")}
    assert before.items() <= after.items(), "what was committed stays"
    folder = RunFolder(tmp_path / "run")
    assert not verify(folder).mismatches
    assert_equal_to(undisturbed, folder)


def test_termination_leaves_in_good_order(tmp_path):
    settings = tiny_settings(tmp_path / "run", **LONGER) | {"workers": 1, "track": {"enabled": False}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "commits").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [pid for pid in descendants(running.pid) if "ray::" in command_of(pid)]
    running.terminate()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert workers
    deadline = time.monotonic() + 20
    while any("ray::" in command_of(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if "ray::" in command_of(pid)], "no worker outlives its driver"


@pytest.mark.parametrize("seconds", [3.0, 5.0])
def test_termination_while_ray_starts_leaves_in_good_order_too(tmp_path, seconds):
    """Ray is busy in C code then, from which an exception comes out as another."""
    settings = tiny_settings(tmp_path / "run", **LONGER) | {"workers": 1, "track": {"enabled": False}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "job.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    running.terminate()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 143, errors
    assert "Traceback" not in errors
