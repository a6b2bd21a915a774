"""Machines that are too small, too full or closed: one message, and a repeat elsewhere completes the run."""

import os
import subprocess
import sys

import pytest
import yaml

from nfscale.store import RunFolder
from nfscale.verify import verify
from tests.jobs import tiny_settings

MIB = 1 << 20


def encode(job, *overrides, limit=None):
    """`nfscale encode` in a process that may take `limit` bytes of addresses.

    The shell sets the limit: a preexec_fn would fork this process, which may have threads.
    """
    command = [sys.executable, "-m", "nfscale", "encode", str(job), *overrides]
    if limit is not None:
        command = ["sh", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def job_in(folder, **sections):
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(folder / "run", **sections) | {"track": {"enabled": False}}))
    return path


@pytest.mark.parametrize("mebibytes", [150, 200])  # with 400 to 500, torch aborts in C++ as it is loaded
def test_memory_too_small_to_load_is_one_line(tmp_path, mebibytes):
    done = encode(job_in(tmp_path), limit=mebibytes * MIB)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the memory that this process may take is too small" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_memory_stopped_is_completed_where_there_is_more(tmp_path):
    """Ray does not start under this limit; the plan is frozen by then, and is used by the repeat."""
    job = job_in(tmp_path)
    done = encode(job, "workers=1", limit=3072 * MIB)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Ray needs 4 GiB of addresses" in done.stderr
    assert encode(job).returncode == 0
    assert not verify(RunFolder(tmp_path / "run")).mismatches


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_an_output_without_permission_is_exit_2(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(tiny_settings(closed / "run") | {"track": {"enabled": False}}))
    done = encode(job)
    assert done.returncode == 2
    assert "cannot write the output" in done.stderr
