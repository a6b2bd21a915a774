"""A job with a step plan: followed, copied into the run, in its fingerprint; and what is refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfscale.driver import open_run
from nfscale.errors import CallerError
from nfscale.job import EncodeJob
from nfscale.store import RunFolder, open_weights, step_plan
from tests.jobs import encode_in_process, tiny_job


def planned_job(folder: Path, steps: dict[str, int], *overrides: str, name: str = "run") -> EncodeJob:
    step_plan.write(str(folder / "plan.parquet"), steps, {})
    return tiny_job(folder / name, f"fit.step_plan={folder / 'plan.parquet'}", *overrides)


@pytest.fixture
def steps(tmp_path) -> dict[str, int]:
    """20, 40, 60 and 80 steps in turn, and none for the last eight data."""
    return {
        datum_id: 20 * (1 + number % 4) for number, datum_id in enumerate(tiny_job(tmp_path).open_dataset().ids[:40])
    }


def test_a_run_follows_its_plan_whatever_the_batches_and_wherever_the_file_is_by_then(tmp_path, steps):
    job = planned_job(tmp_path, steps)
    folder, plan = open_run(job)
    assert folder.steps() == steps
    (tmp_path / "plan.parquet").rename(tmp_path / "moved.parquet")
    moved = tiny_job(tmp_path / "run", f"fit.step_plan={tmp_path / 'moved.parquet'}")
    assert open_run(moved)[1].id == plan.id, "the steps count, not where they are written"
    encode_in_process(moved)
    table = open_weights(folder.files.path)
    rows = table.to_arrow(["datum_id", "steps"]).to_pydict()
    assert dict(zip(rows["datum_id"], rows["steps"], strict=True)) == {
        datum_id: steps.get(datum_id, 60) for datum_id in rows["datum_id"]
    }
    other, _ = encode_in_process(planned_job(tmp_path, steps, "fit.batch=3", "store.shard_fields=7", name="other"))
    assert (open_weights(other.files.path).weights() == table.weights()).all()


def test_a_start_that_ended_before_the_copy_is_completed(tmp_path, steps):
    job = planned_job(tmp_path, steps)
    folder, _ = open_run(job)
    folder.files.remove("steps.parquet")
    open_run(job)
    assert RunFolder(tmp_path / "run").steps() == steps


def test_a_plan_is_in_the_fingerprint_by_what_it_says(tmp_path, steps):
    plain = tiny_job(tmp_path / "run")
    job = planned_job(tmp_path, steps)
    first = job.fingerprint("ids")
    assert first != plain.fingerprint("ids")
    planned_job(tmp_path, dict(reversed(steps.items())))
    assert job.fingerprint("ids") == first
    open_run(job)
    planned_job(tmp_path, steps | {next(iter(steps)): 100})
    assert job.fingerprint("ids") != first
    with pytest.raises(
        CallerError, match=r"belongs to another job: its dataset .*, or its step plan other steps; choose"
    ):
        open_run(job)
    with pytest.raises(CallerError, match=r"they differ in fit\.step_plan"):
        open_run(plain)


def written(path: Path, columns: dict) -> None:
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"datum_id": ["a"], "step": [20]}, "no column steps, but .'datum_id', 'step'."),
        ({"datum_id": [1], "steps": [20]}, "datum_id is a string and steps an integer, got int64 and int64"),
        ({"datum_id": ["a"], "steps": [20.5]}, "datum_id is a string and steps an integer, got string and double"),
        ({"datum_id": ["a", "a"], "steps": [20, 40]}, "it names a datum twice"),
        ({"datum_id": ["a", None], "steps": [20, 40]}, "some of its ids or steps are null"),
        ({"datum_id": ["a"], "steps": [30]}, "gives 'a' 30 steps, which is no multiple of fit.check_every=20; use the"),
        ({"datum_id": ["a"], "steps": [0]}, "gives 'a' 0 steps"),
        ({"datum_id": ["a"], "steps": [20]}, "names none of the 48 data of this dataset"),
    ],
)
def test_a_file_that_is_no_plan_for_the_job_is_refused(tmp_path, columns, message):
    written(tmp_path / "plan.parquet", columns)
    with pytest.raises(CallerError, match=message):
        open_run(tiny_job(tmp_path / "run", f"fit.step_plan={tmp_path / 'plan.parquet'}"))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_or_not_parquet_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("20 steps each")
    for name, message in (
        ("gone.parquet", "no file .*gone.parquet'; `nfscale estimate"),
        ("notes.txt", "no step plan"),
    ):
        with pytest.raises(CallerError, match=message):
            open_run(tiny_job(tmp_path / "run", f"fit.step_plan={tmp_path / name}"))


def test_a_plan_and_a_ladder_do_not_go_together(tmp_path, steps):
    with pytest.raises(CallerError, match="gives all of them several; use one of the two"):
        planned_job(tmp_path, steps, "fit.first_steps=20")
