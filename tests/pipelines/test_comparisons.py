"""The comparisons that back a rule or a claim run from end to end; their figures are in RESULTS.md, not here."""

from dataclasses import replace

import pytest
import torch

from nfscale.fields import theta0_of
from nfscale.job import load_job
from nfscale.optim import Adam, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals.transforms import VALUES
from pipelines import learned_start, optimizer_rule, step_plan, transformations, weight_scaling

pytest.importorskip("skimage", reason="the photographs are scikit-image's")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_transformations_have_a_row_each_and_samplings_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlruns.db")
    monkeypatch.setattr(transformations, "RATES", (2.0**-9,))
    monkeypatch.setattr(transformations, "SCALES", (1.5,))
    output = tmp_path / "out"
    transformations.main(["--photographs", "1", "--tiles", "2", "--steps", "10", "--output", str(output)])
    rows = [cells(line) for line in (output / "tables.md").read_text().splitlines() if line.startswith("| ")]
    assert {*VALUES, "none", "permutation", "zigzag", "standardization"} < {row[0] for row in rows}
    assert [row[:2] for row in rows if row[0] in ("stratified", "uniform", "error")] == [
        [kind, count] for count in ("256", "1024") for kind in ("stratified", "uniform", "error")
    ]
    decibels = [float(row[2]) for row in rows if row[0] in ("stratified", "error")]
    assert all(5 < value < 60 for value in decibels)


def small_task() -> optimizer_rule.Task:
    task = optimizer_rule.task_of("photos", 2)
    field = replace(task.field, width=16, depth=2)
    return replace(task, field=field, calibration=task.calibration[:2], budgets=(20,), samples=64, levels=(20.0, 90.0))


def test_optimisers_are_compared_by_the_steps_and_seconds_to_levels():
    task = small_task()
    found = [optimizer_rule.fitted(task, Adam(rate, Schedule("cosine", 20)), 20, 64, rate) for rate in (1e-9, 4e-3)]
    best = optimizer_rule.best(found, 0)
    assert best is found[1]
    assert best.steps[1] == float("inf")
    assert best.seconds[0] > 0
    row = cells(optimizer_rule.rows_of(task, "adam", found))
    assert row[0] == "adam"
    assert row[1].endswith(" ms")
    assert row[2] == "-"


@pytest.mark.parametrize("recast", [optimizer_rule.in_kronecker_basis, optimizer_rule.in_equilibrated_coordinates])
def test_a_field_in_other_coordinates_is_the_field(recast):
    task = small_task()
    field, row = recast(task)
    coordinates = task.data[0][1].coordinates[None, :50]
    own = task.field.apply(task.field.layout.unravel(theta0_of(task.field, 0)[None]), coordinates)
    torch.testing.assert_close(field.apply(field.layout.unravel(row[None]), coordinates), own, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(row, theta0_of(task.field, 0))


@pytest.mark.parametrize("lead", optimizer_rule.LEADS)
def test_leads_are_fitted(lead):
    (found, *_) = optimizer_rule.LEADS[lead](small_task(), 0.002 if "adam" in lead else 0.3)
    assert 5 < found.quality < 60


def test_weight_scaling_and_siren_start_alike_but_for_the_scale_and_all_methods_have_fields():
    task = weight_scaling.photographs(1, 16)
    seeds = as_tensor([datum_seed(0, "a")])
    for method in weight_scaling.METHODS:
        field = task.field(method)
        values = field.apply(field.init(seeds), task.data[0][1].coordinates[None])
        assert values.shape == (1, 256, 1), method
        assert values.isfinite().all(), method
    scaled, siren = (task.field(name).init(seeds) for name in ("weight_scaling", "siren"))
    torch.testing.assert_close(scaled["layers.1.weight"], 2.5 * siren["layers.1.weight"])
    fits = list(weight_scaling.fits(task, "weight_scaling", 1e-3, "cosine", 20, None))
    assert fits[0].steps == 20
    assert fits[0].to_level.count(";") == 3


def small_starts(monkeypatch) -> learned_start.Task:
    lengths = {"drawn": (30, 40), "learned": (20,)}
    keys = {"data": 6, "rounds": 4, "tasks": 3, "inner_steps": 20}
    monkeypatch.setattr(learned_start, "TASKS", {"photos": (lengths, keys, keys | {"inner_steps": 10})})
    monkeypatch.setattr(learned_start, "CALIBRATION", 2)
    task = learned_start.task_of("photos", 6, 2)
    job = task.job.model_copy(update={"fit": task.job.fit.model_copy(update={"target": 12.0})})
    field = replace(task.field, width=16, depth=2)
    return replace(task, job=job, field=field)


def test_starts_are_compared_by_the_steps_to_the_target_and_learning_is_paid_for(monkeypatch):
    task = small_starts(monkeypatch)
    ids = [datum_id for part in (task.known, task.calibration, task.unseen) for datum_id, _ in part]
    assert len(set(ids)) == 10, "what is learned from is not what is fitted"
    kinds = ["reptile", "metasgd", "maml"]
    _, _, drawn, learned, through, alone = (
        cells(row) for row in learned_start.compared_starts(task, kinds, small=True)
    )
    assert drawn[0] == "weight-scaled draw"
    steps, own = float(drawn[1]), float(learned[1])
    assert float(learned[2]) == pytest.approx(own / steps, abs=0.005)
    assert learned[5] == "180"  # half of the rounds, and one to see what they came to
    assert (through[0], alone[0]) == ("metasgd", "maml")
    assert through[5] == str(3 * (3 + 10) + 2 * 3 * 10), "two rounds, of which the first is shorter, and two looks"
    assert "(0.3, 0.7)" in through[4]
    if own < steps:
        assert float(learned[6].replace(",", "")) == pytest.approx(180 / (steps - own), abs=0.5)


def test_ladders_are_compared_by_share_and_steps(monkeypatch):
    task = small_starts(monkeypatch)
    _, _, one, ladder = (cells(row) for row in learned_start.compared_budgets(task, (40,), [(10, 40)]))
    assert [one[0], ladder[0]] == ["one of 40", "ladder of 10, 20, 40"]
    for row in (one, ladder):
        assert 0 <= float(row[1]) <= 1
        assert 5 <= float(row[2]) <= 40
        assert float(row[3]) > 0


@pytest.mark.parametrize("method", ["esgd", "adam"])
def test_plans_are_compared_with_one_length_by_share_and_steps(monkeypatch, method):
    small = ["fit.max_steps=40", "fit.check_every=10", "fit.target=20", "field.width=16", "field.depth=2"]
    monkeypatch.setattr(step_plan, "JOB", load_job(step_plan.JOBS / "photos.yaml", small))
    monkeypatch.setattr(step_plan, "CALIBRATION", 2)
    monkeypatch.setattr(step_plan, "LADDERS", ((20, 40),))
    rows = [cells(row) for row in step_plan.compared(method, step_plan.data_of(4, 3), (40,))][2:]
    assert [row[0] for row in rows][:3] == ["ladder of 20, 40", "one of 40", "- plan for its steps"]
    assert all(0 <= float(row[1]) <= 1 and 10 <= float(row[2]) <= 160 for row in rows)
    assert float(rows[2][4]) == pytest.approx(float(rows[2][2]) / float(rows[1][2]), abs=0.02)
