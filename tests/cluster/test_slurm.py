"""The batch files, run by bash with a made-up Slurm: what comes of an exit code, and of the signal before the end."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "cluster" / "slurm"

STUBS = {
    # runs what comes after its own options
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
    "ray": '[ "$1" = symmetric-run ] || exit 0\necho "ray $*" >>"$HOME/calls"\n'
    'while [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n',
    "scontrol": 'echo "scontrol $*" >>"$HOME/calls"\n[ "$1" = show ] && printf "node1\\nnode2\\n"\ntrue\n',
    "scancel": 'echo "scancel $*" >>"$HOME/calls"\nkill -TERM "$(cat "$HOME/pid")"\n',
    # an encode: leaves in good order when it is told to, or ends as the test wants
    "nfscale": 'echo "nfscale $*" >>"$HOME/calls"\ntrap "sleep 0.2; exit 143" TERM\necho $$ >"$HOME/pid"\n'
    '[ -n "$CODE" ] && exit "$CODE"\nfor _ in $(seq 600); do sleep 0.05; done\n',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch job: of the first of two nodes, and the fourth task of an array."""
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "16"}
    variables |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "CODE": ""} | variables


def started(slurm, name: str, **variables: str) -> subprocess.Popen:
    command = ["bash", str(CLUSTER / name), "job.yaml", "output=/shared/run"]
    return subprocess.Popen(command, env=slurm | variables, cwd=slurm["HOME"])


def calls(slurm) -> list[str]:
    return Path(slurm["HOME"], "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["encode.sbatch", "array.sbatch"])
def test_a_batch_job_ends_with_the_code_of_the_encode(slurm, name, code):
    assert started(slurm, name, CODE=str(code)).wait(timeout=60) == code
    assert not any("requeue" in call for call in calls(slurm))


def test_what_is_run_on_the_nodes(slurm):
    started(slurm, "encode.sbatch", CODE="0").wait(timeout=60)
    options = "--address node1:20077 --num-cpus 16 --disable-usage-stats"
    assert f"ray symmetric-run {options} -- nfscale encode job.yaml output=/shared/run" in calls(slurm)
    assert "nfscale encode job.yaml output=/shared/run" in calls(slurm)


def test_what_a_task_of_the_array_runs(slurm):
    started(slurm, "array.sbatch", CODE="0").wait(timeout=60)
    assert calls(slurm) == ["nfscale encode job.yaml output=/shared/run workers=0 --shards 3/16"]


@pytest.mark.parametrize(("name", "job"), [("encode.sbatch", "77"), ("array.sbatch", "70_3")])
def test_the_signal_before_the_end_lets_the_encode_leave_and_puts_the_job_back(slurm, name, job):
    running = started(slurm, name)
    try:
        deadline = time.monotonic() + 60
        while not Path(slurm["HOME"], "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGTERM)  # as B: has it, the batch shell alone
        assert running.wait(timeout=60) == 0
    finally:
        running.kill()
    assert calls(slurm)[-1] == f"scontrol requeue {job}"
