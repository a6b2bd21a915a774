"""A step plan: each field has a schedule of its own length, and depends on that and its datum alone."""

from dataclasses import replace

import pytest
import torch

from nfscale.engine import Result, Stop, fit
from nfscale.optim import ESGD, METHODS, Adam, Schedule
from nfscale.optim.schedules import SCHEDULES
from tests.engine.fits import (
    FIELD,
    SEED,
    SIGNAL,
    STEPS,
    assert_as_alone,
    assert_same_bits,
    calibration_of,
    data_of,
    fitted,
)
from tests.jobs import tiny_job

SCHEDULE = Schedule("cosine", total_steps=40, warmup=5)
STOP = Stop(max_steps=40, check_every=10)
DATA = data_of(6)
LENGTHS = (20, 60, 10, 40, 30)
PLAN = {datum_id: steps for (datum_id, _), steps in zip(DATA, LENGTHS, strict=False)}
ADAM = Adam(0.01, SCHEDULE)
ESGD_SHARED = ESGD(0.5, SCHEDULE)
ESGD_OWN = ESGD(0.05, SCHEDULE, curvature="per_field")
CASES = [(ADAM, "full"), (ADAM, 16), (ESGD_SHARED, 16), (ESGD_OWN, 16)]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_each_field_follows_a_schedule_of_its_own_length(kind, warmup):
    lengths = torch.tensor([20, 5, 60])
    steps = torch.arange(70).expand(3, -1)
    found = Schedule(kind, 40, warmup).factor(steps, lengths[:, None])
    for row, length in zip(found, lengths.tolist(), strict=True):
        assert torch.equal(row, Schedule(kind, length, warmup).factor(torch.arange(70)))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("optimizer", "samples"), CASES)
def test_a_planned_field_has_the_bits_it_has_alone(optimizer, samples, step):
    """In a batch where slots are refilled, and where batches are compacted at the end."""
    how = {"optimizer": optimizer, "samples": samples, "stop": STOP, "step": step, "step_plan": PLAN}
    together = fitted(DATA, **how, batch=3)
    steps = {datum_id: PLAN.get(datum_id, STOP.max_steps) for datum_id, _ in DATA}
    assert {datum_id: one.steps for datum_id, one in together.items()} == steps
    assert all(one.result is Result.MAX_STEPS for one in together.values())
    assert_as_alone(together, DATA, **how)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("optimizer", "samples"), CASES)
def test_a_planned_field_is_what_a_job_of_that_length_makes_of_it(optimizer, samples, step):
    how = {"samples": samples, "step": step}
    if optimizer is ESGD_SHARED:  # one calibration for all, as in a job
        how["calibration"] = calibration_of(optimizer, samples)
    planned = fitted(DATA, optimizer, stop=STOP, step_plan=PLAN, **how)
    for (datum_id, samples_of), steps in zip(DATA, LENGTHS, strict=False):
        stop = replace(STOP, max_steps=steps)
        other = replace(optimizer, schedule=replace(SCHEDULE, total_steps=steps))
        assert_same_bits(planned[datum_id], fitted([(datum_id, samples_of)], other, stop=stop, **how)[datum_id])


@pytest.mark.parametrize("kind", METHODS)
def test_every_optimiser_follows_the_plan(tmp_path, kind):
    lengths = {"max_steps": 40, "samples": "full", "check_every": 10}
    job = tiny_job(tmp_path, optimizer={"kind": kind}, fit=lengths)
    optimizer, stop, data = job.build_optimizer(63), STOP, data_of(2)
    options = {"calibration": calibration_of(optimizer, "full", STOP)} if "diagonal" in optimizer.needs else {}
    planned = fitted(data, optimizer, stop=stop, step_plan={data[0][0]: 20}, **options)
    assert [planned[datum_id].steps for datum_id, _ in data] == [20, 40]
    job = tiny_job(tmp_path, optimizer={"kind": kind}, fit=lengths | {"max_steps": 20})
    other = job.build_optimizer(63)
    short = fitted(data, other, stop=replace(stop, max_steps=20), **options)
    assert_same_bits(planned[data[0][0]], short[data[0][0]])


def test_a_planned_fit_goes_on_from_any_check():
    taken = []
    how = {"optimizer": ESGD_OWN, "samples": 16, "stop": STOP, "step_plan": PLAN}
    done = fitted(DATA, batch=3, observe=lambda check: taken.append(check.snapshot()), **how)
    for snapshot in taken:
        again = fitted(DATA, batch=4, resume=snapshot, **how)
        for datum_id, one in done.items():
            assert_same_bits(one, again[datum_id])


def test_a_field_that_starts_again_keeps_its_length():
    wild = Adam(30.0, Schedule("constant", total_steps=40))
    for datum_id, one in fitted(DATA[:3], wild, stop=STOP, step_plan=PLAN).items():
        assert one.restarts
        assert one.steps <= PLAN[datum_id]


def test_a_field_leaves_at_its_target_before_its_plan_ends():
    target = 24.0
    for datum_id, one in fitted(DATA, stop=replace(STOP, target=target), step_plan=PLAN).items():
        assert (one.result is Result.CONVERGED) == (one.quality >= target)
        assert one.steps <= PLAN.get(datum_id, STOP.max_steps)


def test_what_a_plan_cannot_be_is_refused_with_the_reason():
    def run(step_plan, optimizer=ADAM, stop=STOP):
        fit(FIELD, SIGNAL, DATA, optimizer=optimizer, stop=stop, seed=SEED, step_plan=step_plan)

    with pytest.raises(ValueError, match="the step plan gives 'b' 25 steps, which is no multiple of check_every=10"):
        run({"a": 20, "b": 25})
    with pytest.raises(ValueError, match="the step plan gives 'a' 0 steps"):
        run({"a": 0})
    with pytest.raises(ValueError, match="gives all of them several; use one of the two"):
        run({"a": 20}, Adam(0.01, replace(SCHEDULE, first_steps=20)))
    with pytest.raises(ValueError, match="check_every=5 is not a multiple of the optimiser's update_every=10"):
        run({"a": 20}, ESGD_OWN, Stop(max_steps=5, check_every=5))
