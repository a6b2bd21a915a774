"""Steps where they buy most: the allotment beside brute force, the model on known cases, a plan that a run follows."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from nfscale.cli.estimate import _seconds_in
from nfscale.cli.estimate import estimate as estimate_command
from nfscale.difficulty import bits, bits_at
from nfscale.errors import CallerError
from nfscale.plan.spend import Tried, _spent, allotted, cost_of_share, lengths_of
from nfscale.store import open_weights, step_plan
from tests.jobs import encode_in_process, tiny_job, tiny_settings


def made_up(seed: int, lengths: int = 3, data: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    steps = np.sort(random.uniform(50, 1000, (lengths, data)), axis=0)
    return np.sort(random.random((lengths, data)), axis=0), steps


def every_plan(chances: np.ndarray, steps: np.ndarray) -> list[tuple[float, float]]:
    """Of all assignments, steps and chances in all."""
    lengths, data = chances.shape
    every = np.arange(data)
    choices = (np.array(choice) for choice in itertools.product(range(lengths), repeat=data))
    return [(steps[choice, every].sum(), chances[choice, every].sum()) for choice in choices]


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_that_costs_as_much_expects_more(seed):
    chances, steps = made_up(seed)
    plans, every = every_plan(chances, steps), np.arange(6)
    least, most = steps.min(axis=0).sum(), steps.max(axis=0).sum()
    for budget in np.linspace(least + 1, most, 7):
        chosen = allotted(chances, steps, budget)
        cost, hoped = steps[chosen, every].sum(), chances[chosen, every].sum()
        assert cost <= budget
        assert hoped >= max(value for total, value in plans if total <= cost + 1e-6) - 1e-9
        best = max(value for total, value in plans if total <= budget)
        assert hoped >= best - (chances[-1] - chances[0]).max(), "at most one datum short of what whole data allow"


def test_a_share_costs_what_a_plan_for_that_much_reaches():
    chances, steps = made_up(9, data=40)
    for share in (0.55, 0.65, 0.72):
        cost = cost_of_share(chances, steps, share)
        chosen = allotted(chances, steps, cost)
        assert chances[chosen, np.arange(40)].mean() >= share - 1e-9
        fewer = allotted(chances, steps, cost - (steps[-1] - steps[0]).max())
        assert chances[fewer, np.arange(40)].mean() < share


def test_of_data_that_are_alike_as_many_as_the_budget_allows_get_more():
    chances, steps = np.array([[0.1] * 10, [0.6] * 10]), np.array([[100.0] * 10, [300.0] * 10])
    assert allotted(chances, steps, 1700).tolist() == [1] * 3 + [0] * 7
    assert allotted(chances, steps, 1000).tolist() == [0] * 10
    assert allotted(chances, steps, 1e9).tolist() == [1] * 10
    with pytest.raises(ValueError, match="1000 steps at least, and a budget of 900"):
        allotted(chances, steps, 900)


def test_data_that_cannot_reach_the_target_get_the_least_and_easy_ones_what_they_need():
    chances, steps = (
        np.array([[0.9, 0.0, 0.0], [1.0, 0.9, 0.0]]),
        np.array([[80.0, 100.0, 100.0], [90.0, 250.0, 400.0]]),
    )
    assert allotted(chances, steps, 450).tolist() == [1, 1, 0]


def test_harder_data_are_never_expected_to_do_better():
    tried = Tried(
        (100, 200),
        np.array([1.0, 2.0, 2.0, 3.0, 4.0]),
        np.array([[1, 0, 1, 0, 0], [1, 1, 1, 0, 1]]) > 0,
        np.array([[60, 100, 80, 100, 100], [50, 90, 110, 200, 140]], float),
    )
    chances, steps = tried.expected(np.array([0.0, 1.0, 2.0, 2.5, 4.0, 9.0]))
    np.testing.assert_allclose(chances[0], [1, 1, 0.5, 0.25, 0, 0])
    np.testing.assert_allclose(chances[1], [1, 1, 1, 0.75, 0.5, 0.5], err_msg="3 and 4 break the order: their mean")
    np.testing.assert_allclose(steps[1], [50, 50, 100, 135, 170, 170])


def test_bits_of_one_wave():
    """All its energy is at two of the frequencies."""
    size, amplitude, error = 64, 0.5, 1e-3
    wave = amplitude * np.cos(2 * np.pi * 5 * np.arange(size) / size)[:, None]
    each = amplitude**2 * size / 4
    assert bits(wave, error) == pytest.approx(2 * 0.5 * np.log2(each / error) / size)
    assert bits(wave, 2 * each) == 0
    assert bits(np.stack([wave, 0 * wave], axis=-1)[:, 0], error) == pytest.approx(bits(wave, error) / 2)


def test_bits_go_with_the_range_of_the_data_and_the_quality(tmp_path):
    job = tiny_job(tmp_path)
    dataset = job.open_dataset()
    signal = job.build_signal([dataset.read(0).content])
    low, high = (bits_at(dataset, signal, range(48), quality) for quality in (20.0, 40.0))
    assert sorted(high) == list(range(48))
    assert all(high[n] > low[n] for n in high)
    limit = 20 / (20 * np.log10(2))  # of 20 dB, where all frequencies are above both errors
    assert all(high[n] - low[n] <= limit for n in high)


JOB = ("optimizer.kind=adam", "fit.max_steps=40", "fit.check_every=10", "fit.target=26")


def test_a_plan_takes_its_budget_and_a_run_follows_it(tmp_path, capsys):
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(tiny_settings(tmp_path / "run")))
    told = {"on_workers": 1, "price": None, "seed": 0, "json_file": tmp_path / "e.json"}
    estimate_command(job_file, list(JOB), seconds=1, budget="1d", plan_file=None, **told)
    said, plan = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())["plan"]
    assert f"fit.step_plan={plan['file']}" in said
    assert plan["file"] == f"{tmp_path}/run.steps.parquet"
    assert plan["device_hours"] < plan["budget_hours"] == 24
    assert 0 < plan["uniform_share_at_target"] <= plan["share_at_target"] + 1e-9
    assert sum(plan["data_by_steps"].values()) == 48
    steps = step_plan.read(plan["file"])
    assert set(steps.values()) <= set(lengths_of(tiny_job(tmp_path, *JOB))) == {10, 20, 40, 80, 160}
    folder, _ = encode_in_process(tiny_job(tmp_path / "run", *JOB, f"fit.step_plan={plan['file']}"))
    rows = open_weights(folder.files.path).to_arrow().to_pylist()
    assert all(
        row["steps"] <= steps[row["datum_id"]]
        if row["status"] == "converged"
        else row["steps"] == steps[row["datum_id"]]
        for row in rows
    )
    reached = sum(row["status"] == "converged" for row in rows) / 48
    assert reached == pytest.approx(plan["share_at_target"], abs=0.15)
    figures = json.loads(pq.read_schema(plan["file"]).metadata[b"nfscale.step_plan"])
    assert figures["share_at_target"] == plan["share_at_target"]


def test_what_a_plan_costs_is_its_steps_and_what_comes_beside_them():
    """Two lengths, of which the longer brings the harder half of 100 data to the target at 400 steps each."""
    difficulty = np.repeat([1.0, 2.0], 50)
    tried = Tried((100, 400), np.array([1.0, 2.0]), np.array([[1, 0], [1, 1]]) > 0, np.array([[80.0, 100], [90, 400]]))
    ids = [str(number) for number in range(100)]
    chances, steps = tried.expected(difficulty)

    def spent(budget: float):
        return _spent(tried, ids, chances, steps, 0.5, 1000.0, budget, knows_difficulty=True)

    half = spent(1000 + 0.5 * (50 * 80 + 25 * 100 + 25 * 400))
    assert list(half.steps.values()) == [100] * 50 + [400] * 25 + [100] * 25
    assert half.share_at_target == pytest.approx(0.75)
    assert half.device_hours * 3600 == pytest.approx(1000 + 0.5 * 16500)
    assert half.figures()["data_by_steps"] == {"100": 75, "400": 25}
    part = (16500 - 9000) / (24500 - 9000)  # of the way from one length to the other, which takes as many steps
    assert half.uniform_steps == round(100 + part * 300)
    assert half.uniform_share_at_target == pytest.approx(0.5 + part / 2)
    assert half.uniform_hours == half.device_hours
    enough = spent(1e6)
    assert enough.share_at_target == 1
    assert enough.device_hours * 3600 == pytest.approx(1000 + 0.5 * (50 * 80 + 50 * 400)), "and no step more"
    with pytest.raises(CallerError, match=r"a budget of 0.278 h is not enough: 100 data of 100 steps each take 1.53 h"):
        spent(1000)


def test_what_cannot_be_planned_is_refused_before_anything_is_fitted(tmp_path):
    job_file = tmp_path / "job.yaml"
    job_file.write_text(json.dumps(tiny_settings(tmp_path / "run")))

    def run(*overrides, budget: str | None = "1h", plan_file: str | None = None):
        options = {"seconds": 1, "on_workers": 1, "price": None, "seed": 0, "json_file": None}
        estimate_command(job_file, list(overrides), budget=budget, plan_file=plan_file, **options)

    for overrides, message in (
        ((), "this job has none; give one, such as fit.target=40"),
        (("fit.target=30", "fit.first_steps=20"), "use one of the two: fit.first_steps=null"),
    ):
        with pytest.raises(CallerError, match=message):
            run(*overrides)
    with pytest.raises(CallerError, match="--plan says where the plan of a budget goes; give --budget too"):
        run("fit.target=30", budget=None, plan_file="p.parquet")
    with pytest.raises(CallerError, match="--budget 'soon' is no time; write a number above 0 with s, m, h or d"):
        run("fit.target=30", budget="soon")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("10h", 36000), ("1.5h", 5400), ("30m", 1800), ("90s", 90), ("45", 45), ("2 d", 172800)]
)
def test_a_budget_is_a_time(text, seconds):
    assert _seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "10 fortnights", "-3h", "0h", "1e3"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(CallerError, match="is no time"):
        _seconds_in(text)
