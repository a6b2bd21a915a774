"""The comparison of preconditioners, end to end on tiny photographs: every method is fitted, told and drawn."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from nfscale.optim import Extra, Schedule
from pipelines import preconditioners
from pipelines.preconditioners import DECIBELS, METHODS, SMALL, Fit, Report, Task
from tests.jobs import tiny_settings

TINY = Task("photographs", 8, 2, 32, DECIBELS, count=2, others=2, side=12, measured=100)
PLAN = preconditioners.shortened(replace(SMALL, paper=TINY, own=TINY, others=(), moments=(10,)), 10)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    matplotlib.use("agg")
    report = Report(tmp_path_factory.mktemp("preconditioners"), [], [])
    tasks = preconditioners.compared(report, PLAN)
    settings = tiny_settings(report.folder / "run", optimizer={"kind": "adam"})
    settings["field"] = {"kind": "mlp", "width": 6, "depth": 2}
    preconditioners.tell(report, PLAN, tasks, preconditioners.second_moments(settings, PLAN.moments))
    return report


def test_every_method_is_in_runs_csv(report):
    rows = list(csv.DictReader((report.folder / "runs.csv").read_text().splitlines()))
    assert len(rows) == len(report.rows)
    for activation in ("sine", "relu_positional"):
        own = {row["method"] for row in rows if row["table"] == "own" and row["activation"] == activation}
        assert own == set(METHODS)
        paper = {row["method"] for row in rows if row["table"] == "paper" and row["activation"] == activation}
        assert paper == set(preconditioners.at_paper(activation, TINY, small=True))
    assert {row["activation"] for row in rows} == set(PLAN.activations)
    assert {row["weight_scale"] for row in rows if row["table"] == "own" and row["activation"] == "sine"} == {
        "1.0",
        "1.5",
    }
    assert all(row["history"].startswith("0:") for row in rows)


def test_two_fields_of_every_batch(report):
    found: dict[tuple, int] = {}
    for fit in report.rows:
        key = (fit.table, fit.activation, fit.weight_scale, fit.method, fit.rate)
        found[key] = found.get(key, 0) + 1
    assert set(found.values()) == {2}


def test_tables_have_every_method_and_claim(report):
    text = (report.folder / "tables.md").read_text()
    for method in METHODS:
        assert f"| sine | 1.5 | {method} |" in text
    for heading in ("Claims", "At the paper's settings", "Each at its own rate", "Adam's v beside diag(J^T J)"):
        assert f"## {heading}" in text
    assert "sine: ESGD ends at least 2 dB above Adam" in text
    assert "first by seconds, own rates, sine, weight_scale 1.5" in text


def test_figures_are_drawn(report):
    for name in ("curves", "costs", "adam_sgd", "second_moment"):
        assert (report.folder / f"{name}.png").stat().st_size > 1000


def test_curvature_has_a_price_and_adam_is_the_unit(report):
    price = {fit.method: fit.gradients_per_step for fit in report.rows if fit.table == "paper"}
    assert price["adam"] == price["sgd"] == 1
    assert price["adahessian_e"] > 1


def test_the_best_rate_reaches_more_levels_before_it_ends_better():
    def fit(rate: float, history: list[tuple[int, float]]) -> Fit:
        end = history[-1][1]
        return Fit("own", "t", "sine", 1.0, "m", rate, "cosine", "a", 20, end, end, False, 2.0, 0.5, 0, history)

    slow, fast = fit(0.1, [(10, 20.0), (20, 50.0)]), fit(0.2, [(10, 41.0), (20, 42.0)])
    report = Report(Path(), [slow, fast], [])
    assert report.best(DECIBELS, method="m") == [fast]
    assert (fast.to(40.0), fast.to(40.0, "gradients"), fast.to(40.0, "seconds")) == (10, 20, 5)
    assert slow.to(60.0) == math.inf
    assert preconditioners.reached([slow], (30.0, 60.0), "steps") == "20/-"


def test_released_esgd_is_the_formula():
    """Two steps of one weight by hand: probes at both, the mean corrected by steps, absolute damping."""
    method = preconditioners.ReleasedESGD(0.15, Schedule("constant"))
    params = {"w": torch.zeros(1, 1)}
    state, rate, due = method.init(params), torch.ones(1), torch.ones(1, dtype=torch.bool)
    square = momentum = 0.0
    for step, (gradient, product) in enumerate(((2.0, 3.0), (-1.0, 0.5))):
        square = 0.999 * square + 0.001 * product**2
        momentum = 0.9 * momentum + 0.1 * gradient
        expected = -0.15 * momentum / (1 - 0.9 ** (step + 1)) / (math.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-4)
        extra = Extra(torch.tensor([step]), rate, {"w": torch.full((1, 1), product)}, due)
        updates, state = method.update({"w": torch.full((1, 1), gradient)}, state, params, extra)
        assert updates["w"].item() == pytest.approx(expected, rel=1e-4)
    asked = method.wants_curvature(torch.arange(300)).nonzero().flatten().tolist()
    assert asked == [*range(50), 149, 249]
