"""Drivers as processes: two on one folder at once, and one that is interrupted."""

import signal
import subprocess
import sys
import time

import yaml

from nfscale.store.run_folder import RunFolder
from nfscale.verify import verify
from tests.jobs import tiny_settings


def held_driver(tmp_path, until):
    """A driver that is held in its second shard until a file is there, and the command it was started with."""
    output = tmp_path / "run"
    arguments = {"count": 48, "first": 20, "until": str(until)}
    dataset = {"kind": "function", "target": "tests.strange_data:Held", "arguments": arguments}
    settings = tiny_settings(output, dataset=dataset) | {"track": {"enabled": False}, "optimizer": {"kind": "adam"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((output / "commits").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return running, command


def test_of_two_drivers_at_once_one_finishes_and_the_other_says_who_took_over(tmp_path):
    output = tmp_path / "run"
    older, command = held_driver(tmp_path, output / "_control" / "epoch-000002.json")
    newer = subprocess.run(command, capture_output=True, text=True, timeout=200)
    _, errors = older.communicate(timeout=100)
    assert newer.returncode == 0, newer.stderr
    assert older.returncode == 4, errors
    assert errors.startswith(f"error: another driver took over {output} (process ")
    assert len(errors.splitlines()) == 1
    folder = RunFolder(output)
    assert folder.is_complete
    assert folder.driver() is None
    assert [commit.rows for commit in folder.commits()] == [16, 16, 16]
    assert not verify(folder).mismatches
    assert folder.uncommitted() == []


def test_an_interruption_leaves_in_good_order(tmp_path):
    running, _ = held_driver(tmp_path, tmp_path / "never")
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=100)
    assert running.returncode == 130, errors
    assert errors == "interrupted; what is committed stays, and the same command continues\n"
    folder = RunFolder(tmp_path / "run")
    assert folder.driver() is None
    assert [commit.rows for commit in folder.commits()] == [16]
    assert folder.uncommitted() == []
