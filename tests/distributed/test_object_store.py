"""A run whose output is in an object store: the same promises as for one on a disk."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pytest
import yaml

from nfscale.driver import open_run, serve, totals
from nfscale.encode import ShardReport, encode_shard
from nfscale.pool import InProcessPool
from nfscale.run import OpenRun
from nfscale.store import RunFolder, open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job, tiny_settings
from tests.object_store import BUCKET, s3_environment
from tests.processes import killed_after

LONGER = {
    "dataset": {"kind": "digits", "limit": 300},
    "fit": {"max_steps": 400, "samples": "full", "check_every": 20, "target": None, "step": "plain"},  # for kills
    "store": {"shard_fields": 20},
}


@pytest.fixture(scope="module")
def s3():
    with s3_environment() as settings:
        yield settings


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_a_killed_run_is_resumed_and_verified_like_one_on_a_disk(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("NFSCALE_DATA", str(tmp_path / "data"))
    output = f"s3://{BUCKET}/runs/killed"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_settings(output, **LONGER) | {"workers": 2}))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml")]
    folder = RunFolder(output)
    killed_after(command, lambda: len(folder.files.names("commits")) >= 3, tmp_path / "first.log")
    before = {c.shard: c.attempt for c in folder.commits()}
    assert 3 <= len(before) < 15, (tmp_path / "first.log").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"resuming: {20 * len(before)} of 300 fields are committed" in again.stdout
    assert f"{output}/review/report.html" in again.stdout
    assert (tmp_path / "data" / "mlruns.db").exists(), "SQLite does not live in a bucket"
    assert before.items() <= {c.shard: c.attempt for c in folder.commits()}.items(), "what was committed stays"
    assert not verify(folder).mismatches
    on_disk, _ = encode_in_process(tiny_job(tmp_path / "disk", **LONGER))
    assert (open_weights(output).weights() == open_weights(str(on_disk)).weights()).all()
    for options in (["status"], ["verify"], ["gc"]):
        done = subprocess.run(
            [sys.executable, "-m", "nfscale", *options, output, "--json", str(tmp_path / "figures.json")],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
    assert folder.uncommitted() == []
    assert json.loads((tmp_path / "figures.json").read_text())["removed"]


@pytest.fixture(scope="module")
def run(s3):
    """A small complete run."""
    folder, _ = encode_in_process(tiny_job(f"s3://{BUCKET}/runs/tiny"))
    return folder


def test_two_racing_commits_of_a_shard_leave_one(s3):
    folder, plan = open_run(tiny_job(f"s3://{BUCKET}/runs/raced", optimizer={"kind": "adam"}))
    shard = plan.shards()[0]
    attempts = [
        encode_shard(OpenRun(RunFolder(str(folder))), shard, attempt=name, order=order, worker=name)
        for order, name in enumerate(("one", "other"))
    ]
    reports = [event for attempt in attempts for event in attempt if isinstance(event, ShardReport)]
    assert [report.won for report in reports] == [True, False]
    assert [commit.attempt for commit in folder.commits()] == ["one"]
    assert folder.files.names("data") == [reports[0].commit.file], "the loser has removed its file"
    serve(folder, plan, InProcessPool(folder), [])
    assert not verify(folder).mismatches


def test_the_table_is_read_from_the_store(run):
    table = open_weights(str(run))
    rows = table.to_arrow(["datum_id", "quality"])
    assert len(rows) == len(table) == 48
    best = table.to_arrow(["datum_id"], filter=pc.field("quality") >= pc.scalar(float(pc.max(rows["quality"]).as_py())))
    assert len(best) == 1
    images = table.decode(rows["datum_id"].to_pylist()[:2], (5, 7))
    assert images.shape == (2, 5, 7, 1)
    assert np.isfinite(images).all()


def test_a_finished_run_is_left_alone_and_another_job_refused(run):
    from nfscale.errors import CallerError

    before = run.files.names()
    folder, summary = encode_in_process(tiny_job(f"s3://{BUCKET}/runs/tiny"))
    assert totals(folder, summary).fitted_here == 0
    with pytest.raises(CallerError, match=r"belongs to another job: .*seed"):
        open_run(tiny_job(f"s3://{BUCKET}/runs/tiny", "seed=1"))
    assert folder.files.names() == before


def test_an_output_that_holds_something_else_is_refused(s3):
    from nfscale.errors import CallerError

    RunFolder(f"s3://{BUCKET}/mine").files.replace("notes.txt", b"")
    with pytest.raises(CallerError, match=r"not empty and not a run folder \(it holds notes.txt\)"):
        open_run(tiny_job(f"s3://{BUCKET}/mine"))
    with pytest.raises(CallerError, match="no such bucket"):
        open_run(tiny_job("s3://no-such-bucket/run"))
