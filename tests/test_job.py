"""Job files: what is accepted, what is refused and in which words, and what changes the fingerprint."""

from pathlib import Path

import pytest
import yaml

from nfscale.datasets import DATASETS
from nfscale.errors import CallerError
from nfscale.job import load_job
from nfscale.optim import ESGD, Adam
from nfscale.signals import SIGNALS
from tests.jobs import tiny_job, tiny_settings

PIPELINES = Path(__file__).parents[1] / "pipelines"


JOBS = sorted(PIPELINES.glob("*.yaml"))
AT_A_PAPERS_PROTOCOL = {"photos_grey64"}
"""Weight scaling was published with Adam."""


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_that_ships_is_valid(path):
    job = load_job(path)
    assert job.output == f"runs/{job.name}"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_jobs_that_ship_use_weight_scaling_and_esgd(path):
    job = load_job(path)
    assert job.field.weight_scale > 1
    assert job.optimizer.kind == ("adam" if path.stem in AT_A_PAPERS_PROTOCOL else "esgd")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fit.max_step=3", "unknown key fit.max_step; accepted: max_steps, target, samples"),
        (
            "optimizer.momentum=3",
            "unknown key optimizer.momentum; accepted: learning_rate, schedule, weight_decay, clip_norm, kind",
        ),
        ("signal.holdout=1", "signal.holdout=k holds back one pixel of k and is at least 2, got 1"),
        ("signal.kind=imge", f"unknown signal 'imge'; known kinds of signal: {', '.join(sorted(SIGNALS))}"),
        ("dataset.kind=cifar", f"unknown dataset 'cifar'; known kinds of dataset: {', '.join(sorted(DATASETS))}"),
        ("fit.max_steps=many", "fit.max_steps: input should be a valid integer"),
        ("fit.samples=-3", "fit.samples: input should be greater than 0 or 'full', got -3"),
        (
            "fit.step=plain fit.precision=tf32",
            "fit.precision=tf32 is of steps on a GPU, and fit.step=plain has float32",
        ),
        ("fit.sampling=error", "fit.sampling=error chooses what a step takes, and fit.samples=full takes all"),
        ("fit.max_steps=75", "max_steps=75 is not a multiple of check_every=20; use max_steps=60 or 80"),
        ("optimizer.schedule=linear", "should be 'constant', 'cosine', 'exponential' or 'step', got 'linear'"),
        (
            "optimizer.kind=lbfgs optimizer.learning_rate=1",
            "unknown key optimizer.learning_rate; accepted: kind, history",
        ),
        ("optimizer.kind=lbfgs optimizer.warmup=1", "unknown key optimizer.warmup; accepted: kind, history"),
        (
            "optimizer.kind=lbfgs fit.samples=16",
            "takes all samples of a field at every step, and fit.samples is 16; use",
        ),
        ("optimizer.kind=kfac field.kind=hash_grid", "optimizer.kind=kfac cannot be used: it takes MLPs apart"),
        ("optimizer.kind=spring signal.kind=occupancy", "optimizer.kind=spring cannot be used: it minimises the mean"),
        (
            "optimizer.kind=spring signal.kind=sdf signal.eikonal=0.1",
            "it minimises the mean squared error at points, which is not the loss of Sdf",
        ),
        ("optimizer.kind=lbfgs signal.kind=radiance", "its loss has to stay the same from step to step, and Radiance"),
        ("optimizer.kind=spring optimizer.momentum=1", "momentum is at least 0 and below 1, got 1.0"),
        ("optimizer.update_every=7", "fit.check_every=20 is not a multiple of optimizer.update_every=7"),
        ("field.width=0", "width is above 0, got 0"),
        ("field.init=per_datum", "use field.init=shared or optimizer.curvature=per_field"),
        ("dataset.kind=folder", "dataset.path is missing"),
        ("colour=red", "unknown key colour; accepted: name, dataset"),
        ("fit", "write section.key=value"),
        ("output=", "output: input should be a valid string"),
    ],
)
def test_a_wrong_key_is_refused_with_what_is_accepted(tmp_path, override, message):
    with pytest.raises(CallerError) as error:
        tiny_job(tmp_path, *override.split(" "))
    assert message in str(error.value)


def test_several_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(CallerError) as error:
        tiny_job(tmp_path, "fit.max_steps=no", "field.width=wide")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not valid YAML"), ("- 1", "is not a job"), ("dataset: {kind: 3}", "unknown dataset 3")],
)
def test_a_file_that_is_no_job_is_refused(tmp_path, content, message):
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(CallerError, match=message):
        load_job(path)


def test_a_missing_file_is_the_callers_mistake(tmp_path):
    with pytest.raises(CallerError, match="cannot read the job file"):
        load_job(tmp_path / "none.yaml")


def test_another_kind_replaces_the_section_before_the_other_overrides(tmp_path):
    job = tiny_job(tmp_path, "optimizer.learning_rate=0.25", "optimizer.kind=adam")
    assert job.optimizer.kind == "adam"
    assert job.optimizer.learning_rate == 0.25
    assert not hasattr(job.optimizer, "warmup") or job.optimizer.warmup == 0
    assert isinstance(job.build_optimizer(64), Adam)


def test_the_same_kind_keeps_the_section(tmp_path):
    job = tiny_job(tmp_path, "optimizer.kind=esgd")
    assert job.optimizer.warmup == 20
    assert isinstance(job.build_optimizer(64), ESGD)


def test_the_name_of_a_job_is_by_default_that_of_its_file(tmp_path):
    settings = tiny_settings(tmp_path)
    del settings["name"], settings["output"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert load_job(path).output == "runs/mine"


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("workers=2", False),
        ("fit.batch=3", False),
        ("fit.step=plain", False),
        ("fit.precision=auto", False),
        ("fit.precision=float32", True),
        ("store.shard_fields=5", False),
        ("track.enabled=false", False),
        ("output=elsewhere", False),
        ("name=other", False),
        ("max_failed_fraction=0.5", False),
        ("seed=1", True),
        ("fit.max_steps=80", True),
        ("field.weight_scale=1", True),
        ("optimizer.learning_rate=0.5", True),
        ("dataset.limit=7", True),
    ],
)
def test_the_fingerprint_changes_with_what_changes_a_result(tmp_path, override, changes):
    one, other = tiny_job(tmp_path), tiny_job(tmp_path, override)
    assert (one.fingerprint("ids") != other.fingerprint("ids")) is changes


def test_the_fingerprint_changes_with_the_data(tmp_path):
    assert tiny_job(tmp_path).fingerprint("these") != tiny_job(tmp_path).fingerprint("those")
