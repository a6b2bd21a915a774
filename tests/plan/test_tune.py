"""`nfscale tune`: is what it finds the cheapest that reaches the quality, and is the job it writes a job?"""

import json
import math
import random

import pytest
from typer.testing import CliRunner

from nfscale.cli.app import app
from nfscale.cli.tune import _why
from nfscale.coordinator import Failure
from nfscale.errors import CallerError, EncodeError
from nfscale.job import load_job
from nfscale.plan.front import front_picture
from nfscale.plan.trials import BETAS, RATE_FACTOR, Outcome, Trials, overrides_of
from nfscale.plan.tune import Reason, Tuned, _candidates, _rank, moves, tune
from nfscale.pool import Failed, InProcessPool
from tests.jobs import tiny_job, tiny_settings


class Known:
    """Trials whose outcomes are a formula: what settings cost and come to is known, and how many were asked for."""

    def __init__(self, outcome, data: int = 64) -> None:
        self.positions = list(range(data))
        self.outcomes = {}
        self._outcome = outcome

    def tried(self, several, data, first=0):
        found = [self._outcome(dict(choices), data) for choices in several]
        if not first:
            self.outcomes |= {(choices, data): one for choices, one in zip(several, found, strict=True)}
        return found


def by_formula(choices, data):
    """Half the width costs a third and loses nothing; more steps cost and gain; muon cannot be used."""
    cost, quality = 1.0, 40.0
    if choices.get("optimizer.kind") == "muon":
        return Outcome(data, math.nan, math.nan, 0, "", "muon diverges")
    if choices.get("field.width") == 16 and "field.depth" not in choices:
        cost /= 3
    cost *= choices.get("fit.max_steps", 60) / 60
    quality += 5 * math.log2(choices.get("fit.max_steps", 60) / 60)
    quality -= 3 * abs(math.log2(choices.get(RATE_FACTOR, 1.0)))
    return Outcome(data, cost, quality, 100, "psnr_db")


def test_the_cheapest_settings_that_reach_the_quality_are_found(tmp_path):
    job = tiny_job(tmp_path / "out", "field.width=32")
    found = tune(job, Known(by_formula), seconds=60, seed=0)
    assert dict(found.choices)["field.width"] == 16
    assert found.best.quality >= found.goal * 0.995
    assert found.cost_ratio <= 1 / 3 + 1e-9
    (width,) = [reason for reason in found.reasons if reason.key == "field.width"]
    assert (width.before, width.chosen, width.cost_without) == (32, 16, pytest.approx(3.0))


IDLE = (("field.width", 16), ("fit.check_every", 40), ("optimizer.kind", "adam"))


def with_idle_choices(choices, data):
    """Half the width costs a third. Adam costs more, less so where checks are rare; these save nothing without it."""
    rare, adam = "fit.check_every" in choices, "optimizer.kind" in choices
    cost = 1 / 3 if "field.width" in choices else 1.0
    return Outcome(data, cost + 0.1 * adam + 0.05 * rare - 0.07 * (adam and rare), 40.0, 100, "psnr_db")


def test_choices_that_are_good_for_nothing_beside_the_others_are_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr("nfscale.plan.tune._candidates", lambda *drawn: [IDLE])
    trials = Known(with_idle_choices)
    found = tune(tiny_job(tmp_path / "out", "field.width=32"), trials, seconds=60, seed=0)
    assert found.choices == (("field.width", 16),)
    assert found.cost_ratio == pytest.approx(1 / 3)
    (reason,) = found.reasons
    assert (reason.key, reason.cost_without) == ("field.width", pytest.approx(3.0))
    assert {data for choices, data in trials.outcomes if choices == found.choices} == {32}


def test_a_choice_without_which_the_others_cannot_be_used_says_so(tmp_path, monkeypatch):
    def outcome_of(choices, data):
        cannot = choices.keys() == {"field.width"}
        return Outcome(data, math.nan if cannot else 1 / (1 + len(choices)), math.nan if cannot else 40.0, 100)

    monkeypatch.setattr("nfscale.plan.tune._candidates", lambda *drawn: [IDLE[:2]])
    found = tune(tiny_job(tmp_path / "out", "field.width=32"), Known(outcome_of), seconds=60, seed=0)
    width, rare = sorted(found.reasons, key=lambda reason: reason.key)
    assert (width.key, width.cost_without) == ("field.width", pytest.approx(1.5))
    assert (rare.key, rare.cost_without, rare.quality_without) == ("fit.check_every", None, None)
    assert _why(rare) == "in place of 20, with which the others cannot be used"


def test_a_round_that_is_cut_short_does_not_replace_what_was_tried_on_more_data(tmp_path, monkeypatch):
    """On few data a later candidate looks better than it is."""
    now, drawn = [0.0], [[(("field.width", 16),)], [(("fit.max_steps", 80),)]]

    def outcome_of(choices, data):
        if "fit.max_steps" in choices:
            now[0] = 50.0  # of 60, three quarters of which are for the search
            return Outcome(data, 0.1 if data == 8 else 9.0, 40.0, 100)
        return Outcome(data, 1 / (1 + len(choices)), 40.0, 100)

    monkeypatch.setattr("nfscale.plan.tune._candidates", lambda *around: drawn.pop(0))
    job = tiny_job(tmp_path / "out", "field.width=32")
    found = tune(job, Known(outcome_of), seconds=60, seed=0, clock=lambda: now[0])
    assert found.choices == (("field.width", 16),)


@pytest.mark.parametrize("seed", range(5))
def test_each_reason_that_is_left_is_one(tmp_path, seed):
    job = tiny_job(tmp_path / "out", "field.width=32")
    found = tune(job, Known(by_formula), seconds=60, seed=seed)
    assert found.reasons
    whole = found.trials[found.choices].quality
    for reason in found.reasons:
        assert reason.cost_without > 1 or whole + reason.quality_without < 0.995 * found.goal


def test_a_neighbour_lacks_a_choice():
    known = {"field.width": [16, 64], "field.depth": [1, 3], "fit.max_steps": [30, 120]}
    around = (("field.depth", 3), ("field.width", 16))
    found = _candidates(around, known, 6, random.Random(0))
    assert {(("field.depth", 3),), (("field.width", 16),)} < set(found)
    assert len(found) == len(set(found)) <= 6
    assert around not in found


def test_what_is_to_be_kept_is_kept(tmp_path):
    job = tiny_job(tmp_path / "out", "field.width=32")
    found = tune(job, Known(by_formula), seconds=60, seed=0, keep=["field.width"])
    assert all("field.width" not in dict(choices) for choices in found.trials)
    with pytest.raises(CallerError, match="nothing is left to vary"):
        tune(job, Known(by_formula), seconds=60, seed=0, keep=list(moves(job)))


def test_a_quality_that_is_asked_for_is_reached_by_more_steps(tmp_path):
    job = tiny_job(tmp_path / "out", "field.width=32")
    found = tune(job, Known(by_formula), seconds=60, seed=0, quality=44.0)
    assert found.goal == 44.0
    assert dict(found.choices)["fit.max_steps"] == 120


def test_settings_that_cannot_be_used_come_last():
    useless, bad = Outcome(8, math.nan, math.nan, 0, "", "diverged"), Outcome(8, 0.1, 20.0, 1)
    dear, cheap = Outcome(8, 2.0, 41.0, 1), Outcome(8, 1.0, 39.9, 1)
    assert sorted([useless, bad, dear, cheap], key=lambda one: _rank(one, 40.0)) == [cheap, dear, bad, useless]


def test_own_settings_that_fit_nothing_are_refused(tmp_path):
    broken = Known(lambda choices, data: Outcome(data, math.nan, math.nan, 0, "", "the calibration diverged"))
    with pytest.raises(CallerError, match="own settings fit nothing: the calibration diverged"):
        tune(tiny_job(tmp_path / "out"), broken, seconds=60, seed=0)
    with pytest.raises(CallerError, match="needs 16 data or more, the dataset has 10"):
        tune(tiny_job(tmp_path / "out"), Known(by_formula, data=10), seconds=60, seed=0)


def test_a_factor_multiplies_the_rate_that_the_other_choices_give(tmp_path):
    settings = tiny_settings(tmp_path / "out")
    adam = tiny_job(tmp_path / "out", "optimizer.kind=adam").build_optimizer(4096).learning_rate
    found = overrides_of(settings, (("optimizer.kind", "adam"), (RATE_FACTOR, 0.5)))
    assert found[-1] == f"optimizer.learning_rate={float(f'{0.5 * adam:.3g}')}"


def test_betas_are_chosen_together(tmp_path):
    job = tiny_job(tmp_path / "out", "optimizer.kind=adam")
    assert (0.9, 0.999) not in moves(job)[BETAS]
    assert moves(job)[BETAS]
    found = overrides_of(tiny_settings(tmp_path / "out"), ((BETAS, (0.3, 0.7)), ("optimizer.kind", "adam")))
    assert {"optimizer.beta1=0.3", "optimizer.beta2=0.7"} < set(found)


def test_choices_that_do_not_go_together_are_an_outcome(tmp_path):
    trials = Trials(tiny_settings(tmp_path / "out"), list(range(8)), InProcessPool(None))
    fine, refused = trials.tried([(), (("fit.max_steps", 70), ("fit.check_every", 60))], 8)
    assert fine.quality > 10
    assert fine.seconds > 0
    assert "multiple" in refused.why_not


def test_settings_that_end_their_process_are_unusable_and_a_failure_of_no_setting_ends_the_search(monkeypatch):
    died = [Failed("worker-0", Failure.CRASH, "the worker process died (OUT_OF_MEMORY)")]
    monkeypatch.setattr("nfscale.plan.trials.call_all", lambda *call: died)
    (outcome,) = Trials({}, [0, 1], InProcessPool(None)).tried([()], 2)
    assert (outcome.data, outcome.why_not) == (2, "the worker process died (OUT_OF_MEMORY)")
    died[0] = Failed("worker-0", Failure.TASK, "KeyError: 'image'")
    with pytest.raises(EncodeError, match="a trial failed: KeyError: 'image'"):
        Trials({}, [0, 1], InProcessPool(None)).tried([()], 2)


def test_the_front_has_what_no_other_beats():
    outcomes = {(("fit.samples", n),): Outcome(8, n, q, 1) for n, q in ((1, 20.0), (2, 30.0), (3, 25.0), (4, 31.0))}
    outcomes[(("fit.samples", 9),)] = Outcome(4, 0.1, 99.0, 1)  # on fewer data
    own, reasons = outcomes[(("fit.samples", 4),)], [Reason("fit.samples", 4, 2, 2.0, 1.0)]
    tuned = Tuned((("fit.samples", 2),), 30.0, own, outcomes[(("fit.samples", 2),)], reasons, outcomes, 1.0)
    assert [dict(choices)["fit.samples"] for choices in tuned.front] == [1, 2, 4]
    assert front_picture(tuned).startswith(b"\x89PNG")


def test_the_command_writes_a_job_that_can_be_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("nfscale.plan.tune.CANDIDATES", 4)
    monkeypatch.setattr("nfscale.plan.tune._RUNG_DATA", (4, 8))
    (tmp_path / "job.yaml").write_text(json.dumps(tiny_settings(tmp_path / "run")))
    arguments = ["tune", tmp_path / "job.yaml", "track.enabled=false", "--seconds", 1, "-o", tmp_path / "tuned"]
    said = CliRunner().invoke(app, [str(one) for one in arguments])
    assert said.exit_code == 0, said.output
    assert "no part in the choice" in said.output
    figures = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert figures["cost_ratio"] > 0
    job = load_job(tmp_path / "tuned" / "tuned.yaml")
    for key, value in figures["choices"].items():
        if key == BETAS:
            assert [job.optimizer.beta1, job.optimizer.beta2] == value
        elif key != RATE_FACTOR:
            section, _, name = key.partition(".")
            assert getattr(getattr(job, section), name) == value
