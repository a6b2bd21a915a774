"""`cluster/local.sh` and `nfscale submit`, from an environment with nothing set; also after the head was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nfscale.store import open_weights
from nfscale.store.run_folder import RunFolder
from nfscale.verify import verify
from tests.jobs import tiny_settings
from tests.processes import command_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
DIGITS = ["pipelines/digits.yaml", "dataset.limit=600"]
LONGER = ["dataset.repeats=3", "store.shard_fields=60", "fit.step=plain"]  # so that there is a middle


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Local:
    """A cluster of `local.sh`, in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = tempfile.mkdtemp(prefix="nf", dir="/tmp")  # short: Ray's sockets are in it
        self.environment = {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.settings = {
            "CLUSTER_DIR": self.folder,
            "PORT": str(free_port()),
            "DASHBOARD_PORT": str(free_port()),
        }
        self.address = f"http://127.0.0.1:{self.settings['DASHBOARD_PORT']}"

    def script(self, what: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(ROOT / "cluster" / "local.sh"), what],
            env=self.environment | self.settings,
            capture_output=True,
            text=True,
            timeout=150,
        )

    def start(self) -> None:
        done = self.script("start")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == self.address

    def processes(self) -> list[int]:
        """Those of this cluster, by the folder that their commands name."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return [pid for pid in pids if f"{self.folder}/" in command_of(pid)]

    def command(self, *arguments: str) -> list[str]:
        return ["python", "-m", "nfscale", *arguments, "--address", self.address]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments), env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=400
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Iterator[Local]:
    cluster = Local(tmp_path_factory.mktemp("home"))
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.script("stop")
        assert cluster.processes() == [], "stop ends all that start began"


def test_a_job_is_submitted_from_a_clean_environment(local, tmp_path):
    output = tmp_path / "runs" / "digits"
    done = local.run("submit", *DIGITS, f"output={output}", "--wait", "--json", str(tmp_path / "submit.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digits: 600 data" in done.stdout, "the log of the encode is streamed"
    assert "of 2 workers" in done.stdout
    figures = json.loads((tmp_path / "submit.json").read_text())
    assert (figures["attempts"], figures["exit_code"], figures["status"]) == (["digits-a0"], 0, "SUCCEEDED")
    assert not verify(RunFolder(output)).mismatches
    again = local.run("submit", *DIGITS, f"output={output}")
    assert again.returncode == 0
    assert "is complete; nothing to do" in again.stdout
    assert "submitted digits-a1" in again.stderr
    assert local.run("jobs", "--json", str(tmp_path / "jobs.json")).returncode == 0
    jobs = json.loads((tmp_path / "jobs.json").read_text())["jobs"]
    assert {(job["id"], job["status"], job["exit_code"]) for job in jobs} == {
        ("digits-a0", "SUCCEEDED", 0),
        ("digits-a1", "SUCCEEDED", 0),
    }
    assert "is complete; nothing to do" in local.run("logs", "digits-a1").stdout
    nowhere = local.run("logs", "digits-a7")
    assert nowhere.returncode == 2
    assert "digits-a7 does not exist" in nowhere.stderr


def test_the_exit_code_is_that_of_the_encode(local, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "notes.txt").touch()
    done = local.run("submit", *DIGITS, f"output={tmp_path / 'held'}", "--retries", "2")
    assert done.returncode == 2, "and a mistake is not repeated"
    assert "not empty and not a run folder" in done.stdout


def test_stop_lets_the_encode_leave_in_good_order(local, tmp_path):
    output = tmp_path / "stopped"
    arguments = {"count": 120, "first": 60, "until": str(tmp_path / "never")}
    dataset = {"kind": "function", "target": "tests.strange_data:Held", "arguments": arguments}
    settings = tiny_settings(output, dataset=dataset, optimizer={"kind": "adam"}, store={"shard_fields": 20})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings | {"name": "held", "workers": 2}))
    sent = local.run("submit", str(tmp_path / "job.yaml"), "--no-wait")
    assert sent.stdout.startswith(f"submitted held-a0, into {output};"), sent.stderr
    wait_for(lambda: list((output / "commits").glob("*.json")), "the first commit")
    other = local.run("submit", str(tmp_path / "job.yaml"))
    assert other.returncode == 2
    assert f"held-a0 writes to {output} and is running" in other.stderr
    assert local.run("stop", "held-a0").returncode == 0
    followed = local.run("logs", "held-a0")
    assert "interrupted; what is committed stays" in followed.stdout
    assert not (output / "_SUCCESS").exists()
    assert not (output / "driver.json").exists(), "it left, it was not killed"
    assert local.run("stop", "held-a0").stdout == "held-a0 had ended before\n"


def test_a_head_killed_in_the_middle_and_the_same_submit_again(local, tmp_path):
    output = tmp_path / "runs" / "killed"
    command = local.command("submit", *DIGITS, *LONGER, f"output={output}", "--wait")
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(command, env=local.environment, cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_for(lambda: len(list((output / "commits").glob("*.json"))) >= 3, "three commits")
            for pid in local.processes():
                if f"{local.folder}/head" in command_of(pid):
                    os.kill(pid, signal.SIGKILL)
            assert first.wait(timeout=120) == 1, (tmp_path / "first.log").read_text()
        finally:
            first.kill()
    assert "the same submit continues" in (tmp_path / "first.log").read_text()
    before = len(list((output / "commits").glob("*.json")))
    assert 3 <= before < 30
    local.script("stop")
    local.start()
    again = local.run(*command[3:-2])
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = int(again.stdout.split("resuming: ")[1].split(" of 1,800")[0].replace(",", ""))
    assert resumed >= 60 * before
    assert not verify(RunFolder(output)).mismatches
    assert len(open_weights(str(output))) == 1800


def wait_for(reached, what: str) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)
