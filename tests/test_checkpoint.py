"""A shard that is killed after a checkpoint goes on from there: the same rows, bit for bit, with fewer steps."""

from types import SimpleNamespace

import pytest

from nfscale import checkpoint
from nfscale.driver import open_run, serve
from nfscale.encode import ShardReport, _Spent, encode_shard
from nfscale.pool import InProcessPool
from nfscale.run import OpenRun, calibrate_run
from nfscale.store import open_weights
from nfscale.store.run_folder import Shard
from nfscale.verify import verify
from tests.engine.fits import NEEDS_COMPILER
from tests.jobs import tiny_job

ALWAYS = "checkpoint_minutes=1e-9"


class Killed(BaseException):
    """What a worker does not survive."""


def count_steps(monkeypatch) -> list[int]:
    """Field steps from now on."""
    taken = []
    heard = _Spent.on_check

    def on_check(self, check):
        taken.append(check.steps)
        heard(self, check)

    monkeypatch.setattr(_Spent, "on_check", on_check)
    return taken


def kill_at_save(monkeypatch, number: int) -> None:
    """The worker dies right after it has written its nth checkpoint."""
    save, saved = checkpoint.save, []

    def then_die(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == number:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", then_die)


@pytest.mark.parametrize(
    ("step", "dtype"),
    [
        ("plain", "float32"),
        pytest.param("native", "float32", marks=NEEDS_COMPILER),
        pytest.param("native", "float16", marks=NEEDS_COMPILER),
    ],
)
def test_a_killed_shard_goes_on_from_its_checkpoint(tmp_path, monkeypatch, step, dtype):
    """Six slots for sixteen data: some have finished, some are under way, some have not begun."""
    keys = (f"fit.step={step}", "fit.batch=6", f"store.dtype={dtype}")
    steps = count_steps(monkeypatch)
    undisturbed, plan = open_run(tiny_job(tmp_path / "undisturbed", *keys))
    serve(undisturbed, plan, InProcessPool(undisturbed), [])
    whole = sum(steps)
    folder, plan = open_run(tiny_job(tmp_path / "run", *keys, ALWAYS))
    shard = plan.shards()[0]
    calibrate_run(OpenRun(folder))
    with monkeypatch.context() as patch:
        kill_at_save(patch, 5)
        with pytest.raises(Killed):
            list(encode_shard(OpenRun(folder), shard, attempt="first", order=0, worker="w"))
    assert folder.files.size(folder.checkpoint_file(shard))
    kept = checkpoint.load(folder, shard, plan.table_schema())
    assert 0 < len(kept.finished) < 16
    assert kept.under_way.slots
    steps.clear()
    serve(folder, plan, InProcessPool(folder), [])
    saved = 60 * len(kept.finished) + sum(slot.step for slot in kept.under_way.slots)
    assert sum(steps) == whole - saved
    assert (open_weights(folder.files.path).weights() == open_weights(undisturbed.files.path).weights()).all()
    columns = ["datum_id", "loss", "quality", "steps", "history_step", "history_quality", "metrics", "status", "label"]
    tables = [open_weights(f.files.path).to_arrow(columns) for f in (folder, undisturbed)]
    assert tables[0].to_pylist() == tables[1].to_pylist()
    assert not verify(folder).mismatches
    assert folder.files.names("checkpoints") == []
    assert "first" in open_weights(folder.files.path).to_arrow(["attempt"])["attempt"].to_pylist()


def test_the_parts_of_a_shard_that_was_cut_go_on_from_its_checkpoint(tmp_path, monkeypatch):
    folder, plan = open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam", "fit.batch=6", ALWAYS))
    shard = plan.shards()[0]
    with monkeypatch.context() as patch:
        kill_at_save(patch, 2)
        with pytest.raises(Killed):
            list(encode_shard(OpenRun(folder), shard, attempt="first", order=0, worker="w"))
    steps = count_steps(monkeypatch)
    *_, report = encode_shard(OpenRun(folder), shard.halves()[0], attempt="second", order=1, worker="w")
    assert isinstance(report, ShardReport)
    assert report.won
    assert sum(steps) == 8 * 60 - 6 * 40


def test_a_checkpoint_that_cannot_be_used_is_left_out_of_account(tmp_path):
    folder, plan = open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam", "fit.max_steps=20"))
    shard = plan.shards()[0]
    folder.files.replace(folder.checkpoint_file(shard), b"PK half a fi")
    assert checkpoint.load(folder, shard, plan.table_schema()) is None
    assert folder.uncommitted() == [], "the shard is not committed yet"
    *_, report = encode_shard(OpenRun(folder), shard, attempt="a", order=0, worker="w")
    assert report.won
    assert folder.uncommitted() == ["checkpoints/shard-00000.npz"]


def test_a_checkpoint_of_another_job_is_left_out_of_account(tmp_path, monkeypatch):
    folders = []
    for seed in (0, 1):
        folder, plan = open_run(tiny_job(tmp_path / f"{seed}", "optimizer.kind=adam", f"seed={seed}", ALWAYS))
        folders.append(folder)
        with monkeypatch.context() as patch:
            kill_at_save(patch, 1)
            with pytest.raises(Killed):
                list(encode_shard(OpenRun(folder), plan.shards()[0], attempt="a", order=0, worker="w"))
    shard = Shard(0, 0, 16)
    schemas = [folder.plan().table_schema() for folder in folders]
    assert checkpoint.load(folders[0], shard, schemas[0]) is not None
    assert checkpoint.load(folders[0], shard, schemas[1]) is None


def test_short_shards_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", SimpleNamespace)  # would raise
    folder, plan = open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam", "fit.max_steps=20"))
    serve(folder, plan, InProcessPool(folder), [])
    assert folder.files.names("checkpoints") == []
