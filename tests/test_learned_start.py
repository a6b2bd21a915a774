"""A run whose fields start from what was learned: planned once, stored, decoded, resumed; and what is refused."""

import numpy as np
import pytest
import torch

from nfscale import planner
from nfscale.driver import open_run
from nfscale.engine import LEARNERS
from nfscale.errors import CallerError
from nfscale.fields import theta0_of
from nfscale.job import EncodeJob
from nfscale.optim import Scaled
from nfscale.planner import make_plan
from nfscale.run import OpenRun
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job

LEARNED = ("field.init=learned", "learning.data=24", "learning.rounds=6", "learning.tasks=4", "learning.inner_steps=10")


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_learned_start_batches_is_stored_and_decodes(tmp_path, kind):
    rate = 0.5 if kind == "reptile" else 3e-3
    overrides = [f"learning.kind={kind}", f"learning.outer_rate={rate}", *LEARNED, "store.dtype=delta_float16"]
    if kind == "metasgd":
        overrides += ["optimizer.kind=adam", "fit.first_steps=20", "optimizer.beta2=0.9"]
    folder, summary = encode_in_process(tiny_job(tmp_path / "one", *overrides))
    assert summary.fields == 48
    assert folder.has_calibration == (kind != "metasgd"), "which fields that start from one theta0 share"
    plan, table = folder.plan(), open_weights(folder.files.path)
    drawn = theta0_of(EncodeJob.model_validate(plan.job).build_field(2, 1), 0)
    assert table.theta0 is not None
    assert not np.array_equal(table.theta0, drawn.numpy())
    by_gradients = kind in ("maml", "metasgd")  # of 3, 8, 10, 10, 10 and 10 steps, and a look before and after
    assert plan.learned["field_steps"] == 4 * (51 + 2 * 10 if by_gradients else 7 * 10)
    assert (plan.factors is None) == (kind != "metasgd")
    assert plan.learned["loss_after"] < plan.learned["loss_before"]
    assert not verify(folder).mismatches
    assert table.decode(table.to_arrow()["datum_id"].to_pylist()[:2]).shape == (2, 8, 8, 1)
    other, _ = encode_in_process(tiny_job(tmp_path / "other", *overrides, "fit.batch=3", "store.shard_fields=7"))
    assert (open_weights(other.files.path).weights() == table.weights()).all()


def test_rates_that_were_learned_are_those_of_the_run(tmp_path):
    how = ("learning.kind=metasgd", "optimizer.kind=adam", "optimizer.beta1=0.3", "optimizer.learning_rate=0.005")
    job = tiny_job(tmp_path, *LEARNED, *how)
    folder, plan = open_run(job)
    assert plan.factors.shape == plan.theta0.shape
    assert plan.factors.min() < 1 < plan.factors.max()
    optimizer = OpenRun(folder).optimizer
    assert isinstance(optimizer, Scaled)
    assert np.array_equal(optimizer.factors.numpy(), folder.plan().factors)
    assert np.array_equal(folder.plan().factors, plan.factors)
    assert (optimizer.inner.beta1, optimizer.learning_rate) == (0.3, 0.005)
    other = make_plan(tiny_job(tmp_path, *LEARNED, *how[:-1], "optimizer.learning_rate=0.01"))
    assert not np.array_equal(other.factors, plan.factors), "of the rate that they multiply"


def test_gradients_go_through_the_adam_that_the_job_has(tmp_path):
    def keys(learner: str, *overrides: str) -> dict:
        return tiny_job(tmp_path, f"learning.kind={learner}", *overrides).learning_rate_and_betas(64)

    own = ("optimizer.kind=adam", "optimizer.learning_rate=0.005", "optimizer.beta1=0.3")
    assert keys("maml", *own) == keys("metasgd", *own) == {"learning_rate": 0.005, "betas": (0.3, 0.999)}
    assert keys("maml") == keys("reptile", *own) == {"learning_rate": 0.002}


@pytest.mark.parametrize("kind", ["reptile", "metasgd"])
def test_a_resume_does_not_learn_again(tmp_path, monkeypatch, kind):
    how = (f"learning.kind={kind}", *LEARNED, *(["optimizer.kind=adam"] if kind == "metasgd" else []))
    job = tiny_job(tmp_path / "run", *how)
    _, plan = open_run(job)

    def again(*arguments, **options):
        raise AssertionError("a resume learned again")

    monkeypatch.setattr(planner, "learn_start", again)
    folder, summary = encode_in_process(job)
    assert summary.fields == 48
    assert np.array_equal(folder.plan().theta0, plan.theta0)


def test_the_plan_depends_on_the_seed_and_the_sample_alone(tmp_path):
    first, second, other = (
        make_plan(tiny_job(tmp_path, *LEARNED, *more)).theta0 for more in ((), ("fit.batch=2",), ("seed=1",))
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.isfinite(torch.from_numpy(first)).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("learning.data=49",), "from learning.data=49 data, and the dataset has 48; use learning.data=48, a"),
        (
            ("learning.kind=fomaml", "learning.outer_rate=100"),
            "init=learned: .*use a smaller learning.outer_rate",
        ),
    ],
)
def test_what_cannot_be_learned_is_the_callers_mistake(tmp_path, overrides, message):
    small = [text for text in LEARNED if text.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    with pytest.raises(CallerError, match=message):
        make_plan(tiny_job(tmp_path, *small, *overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning.kind=leap", "unknown learning 'leap'; known kinds of learning: fomaml, maml, metasgd, reptile"),
        (
            "learning.steps=3",
            "unknown key learning.steps; accepted: kind, data, rounds, tasks, inner_steps, outer_rate",
        ),
        (
            "field.init=learned learning.kind=metasgd",
            "learning.kind=metasgd learns rates of optimizer.kind=adam, and it is esgd; use that or learning.kind=maml",
        ),
        ("learning.rounds=0", "learning.rounds is at least 1, got 0"),
        ("field.init=learnt", "should be 'shared', 'learned' or 'per_datum', got 'learnt'"),
        ("fit.first_steps=30", "first_steps=30 is not a multiple of check_every=20; a budget ends at a check"),
        ("fit.first_steps=20 fit.plateau_checks=2", "which plateau_checks take for a plateau"),
        (
            "fit.first_steps=20 optimizer.kind=lbfgs",
            "the length of a schedule, and optimizer.kind=lbfgs follows none",
        ),
    ],
)
def test_the_job_says_what_it_takes(tmp_path, override, message):
    with pytest.raises(CallerError, match=message):
        tiny_job(tmp_path, *override.split())


def test_how_a_start_is_learned_is_in_the_fingerprint_of_those_who_learn_it(tmp_path):
    def fingerprint(*overrides: str) -> str:
        return tiny_job(tmp_path, *overrides).fingerprint("ids")

    assert fingerprint() == fingerprint("learning.rounds=7") != fingerprint("field.init=learned")
    assert fingerprint("field.init=learned") != fingerprint("field.init=learned", "learning.rounds=7")
    assert fingerprint() != fingerprint("fit.first_steps=20")


def test_a_job_on_a_ladder_is_encoded(tmp_path):
    job = tiny_job(tmp_path / "run", "optimizer.kind=adam", "fit.first_steps=20", "fit.target=30")
    assert job.build_optimizer(64).schedule.budgets == (20, 60)
    folder, _ = encode_in_process(job)
    rows = open_weights(folder.files.path).to_arrow()
    steps, status = rows["steps"].to_numpy(), rows["status"].to_pylist()
    assert set(steps.tolist()) == {20, 40, 60} or len(set(steps.tolist())) > 1
    assert all((s == "converged") == (q >= 30) for s, q in zip(status, rows["quality"].to_pylist(), strict=True))
