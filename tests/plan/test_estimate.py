"""`nfscale estimate`: does a sample say what the whole comes to, as surely as it claims?"""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from nfscale.difficulty import difficulties
from nfscale.errors import CallerError
from nfscale.plan import actual, estimate
from nfscale.plan.estimate import _MACHINE, CONFIDENCE, _Resampled, _share, reckoned
from nfscale.plan.sample import FittedSample, _evenly, _spread_order, fitted_sample, stratified
from nfscale.planner import make_plan
from nfscale.run import OpenRun
from nfscale.store import WeightsTable
from nfscale.store.run_folder import Commit, RunFolder
from tests.jobs import encode_in_process, tiny_job


def commit(index: int, start: int, rows: int, seconds: float, size: int = 1000) -> Commit:
    return Commit(
        shard=f"shard-{index:05d}",
        index=index,
        start=start,
        stop=start + rows,
        file="",
        rows=rows,
        bytes=size,
        sha256="",
        attempt="",
        order=index,
        worker="w",
        committed_at=0.0,
        seconds=seconds,
        fit_seconds=0.0,
        spent={},
        counts={},
        quality={},
        steps_mean=0.0,
    )


def sample_of(plan, costs, qualities, statuses=None, reached=None, chunk: int = 10) -> FittedSample:
    """A sample with these figures, fitted in chunks that took 0.5 s beside the fits of their data."""
    count = len(costs)
    rows = pa.table(
        {
            "datum_id": [str(n) for n in range(count)],
            "status": statuses or ["converged"] * count,
            "quality": pa.array(qualities, pa.float32()),
            "steps_to_target": pa.array(reached or [1] * count, pa.int32()),
            "wall_seconds": pa.array(costs, pa.float32()),
        }
    )
    edges = range(0, count, chunk)
    commits = [commit(i, a, min(chunk, count - a), float(sum(costs[a : a + chunk])) + 0.5) for i, a in enumerate(edges)]
    return FittedSample(plan, rows, commits, 1.0, 2.0, 64, 10**8)


@pytest.fixture
def plan(tmp_path):
    return replace(make_plan(tiny_job(tmp_path / "out")), data_count=10_000)


def test_an_estimate_is_the_samples_mean_times_the_data(tmp_path, plan):
    costs = [1.0, 2.0, 3.0, 2.0] * 10
    found = reckoned(sample_of(plan, costs, [30.0] * 40), tiny_job(tmp_path / "out"), workers=4, seed=0, price=2.0)
    per_datum = 2.0 + 0.5 / 10  # the mean of the fits, and a chunk's other half second among its ten
    assert found.device_hours.value == pytest.approx(10_000 * per_datum / 3600)
    assert found.money.value == pytest.approx(2 * found.device_hours.value)
    assert found.bytes == 10_000 * 100
    assert found.wall_seconds.low < 10_000 * per_datum / 4 + 3 < found.wall_seconds.high
    spread = 1.645 * np.std(costs) / math.sqrt(40) * math.sqrt(1 - 40 / 10_000)
    assert found.device_hours.high * 3600 / 10_000 == pytest.approx((per_datum + spread) * _MACHINE, rel=0.02)


def test_what_was_seen_of_all_is_certain_but_for_the_machine(tmp_path, plan):
    sample = sample_of(replace(plan, data_count=20), [1.0, 3.0] * 10, list(np.linspace(20, 40, 20)))
    found = reckoned(sample, tiny_job(tmp_path / "out"), workers=1, seed=0)
    assert found.median_quality == (30.0, 30.0, 30.0)
    assert found.device_hours.high / found.device_hours.value == pytest.approx(_MACHINE)


@pytest.mark.parametrize(("drawn", "count"), [(12, 40), (40, 1000), (200, 1000)])
def test_intervals_hold_the_truth_as_often_as_they_say(drawn, count):
    random = np.random.default_rng(3)
    hits = {"mean": 0, "median": 0}
    rounds = 200
    for round_ in range(rounds):
        population = random.lognormal(0.0, 0.5, count)  # skewed as costs are; one outlier is not to decide all rounds
        values = random.choice(population, drawn, replace=False)
        resampled = _Resampled(drawn, count, np.random.default_rng(round_))
        low, _, high = resampled.of_mean(values)
        hits["mean"] += low <= population.mean() <= high
        low, _, high = resampled.of_percentile(values, 50)
        hits["median"] += low <= np.median(population) <= high
    # Three standard deviations of a binomial below the promise.
    least = CONFIDENCE - 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / rounds)
    assert min(hits.values()) / rounds >= least, hits


def test_a_share_of_nothing_seen_is_not_surely_nothing():
    low, value, high = _share(np.zeros(20), 10_000)
    assert (low, value) == (0.0, 0.0)
    assert 0.05 < high < 0.2
    assert _share(np.ones(20), 20) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_beginning_is_spread_over_easy_and_hard(seed):
    order = _spread_order(100, seed)
    assert sorted(order) == list(range(100))
    for length in (4, 8, 16, 32):
        quarters = np.bincount(np.array(order[:length]) // 25, minlength=4)
        assert quarters.max() - quarters.min() <= 1 + length // 8, length


def test_data_of_unknown_difficulty_come_among_the_others():
    merged = sorted([*_evenly([1, 2, 3, 4]), *_evenly([10, 20])])
    assert [item for _, item in merged] == [1, 10, 2, 3, 20, 4]


def test_the_sample_begins_with_data_of_all_difficulties(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.freeze(make_plan(tiny_job(folder)))
    run = OpenRun(folder)
    positions = stratified(run, seed=0)
    assert sorted(positions) == list(range(48))
    assert stratified(run, seed=0) == positions != stratified(run, seed=1)
    measured = difficulties(run.dataset, run.signal, range(48))
    hardness = np.argsort(np.argsort([measured[p]["high_frequency_percent"] for p in range(48)]))
    assert np.bincount(hardness[positions[:8]] // 12, minlength=4).max() <= 4


def test_a_sample_is_fitted_as_the_run_fits_it(tmp_path):
    """With time for all of the data, the sample's rows are the run's."""
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    sample = fitted_sample(tiny_job(tmp_path / "run"), seconds=60, processes=1, seed=0)
    columns = ["datum_id", "quality", "steps"]
    expected = WeightsTable(folder).to_arrow(columns).sort_by("datum_id").to_pydict()
    assert sample.rows.select(columns).sort_by("datum_id").to_pydict() == expected
    found = reckoned(sample, tiny_job(tmp_path / "run"), workers=1, seed=0)
    assert found.median_quality.value == pytest.approx(actual(folder)["median_quality"])
    assert found.bytes == pytest.approx(actual(folder)["bytes"], rel=0.5)
    assert found.batch > 1


@pytest.mark.timeout(120)
def test_several_processes_fit_a_sample(tmp_path):
    found = estimate(tiny_job(tmp_path / "run"), seconds=1, workers=2, processes=2, seed=0)
    assert 8 <= found.sampled <= 48
    assert found.memory_bytes > 50 << 20


def test_a_dataset_without_data_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    job = tiny_job(tmp_path / "out", dataset={"kind": "folder", "path": str(tmp_path / "none")})
    with pytest.raises(CallerError):
        estimate(job, seconds=1, workers=1, processes=1, seed=0)
