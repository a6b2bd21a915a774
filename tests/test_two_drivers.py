"""Two drivers on one folder at once, as processes: the newer one finishes, the older one says who took over."""

import subprocess
import sys
import time

import yaml

from nfscale.store.run_folder import RunFolder
from nfscale.verify import verify
from tests.jobs import tiny_settings


def test_of_two_drivers_at_once_one_finishes_and_the_other_says_who_took_over(tmp_path):
    """The older one is held in its second shard until the newer one is there."""
    output = tmp_path / "run"
    arguments = {"count": 48, "first": 20, "until": str(output / "_control" / "epoch-000002.json")}
    dataset = {"kind": "function", "target": "tests.strange_data:Held", "arguments": arguments}
    settings = tiny_settings(output, dataset=dataset) | {"track": {"enabled": False}, "optimizer": {"kind": "adam"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml")]
    older = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((output / "commits").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
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
