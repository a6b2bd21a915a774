"""Comparisons of runs: what is planted is found, and what is luck is not."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfscale.errors import CallerError
from nfscale.review import compare_runs, comparison_page, words_of
from nfscale.review.compare import _first_at
from nfscale.store import RunFolder, open_weights
from nfscale.store.schema import write_parquet
from tests.jobs import encode_in_process, tiny_job

PLANTED_DB = 0.2


def encoded(output, *overrides):
    dataset = {"kind": "digits"}
    options = ["optimizer.kind=adam", "fit.check_every=10", "fit.max_steps=20", "store.shard_fields=512", *overrides]
    return encode_in_process(tiny_job(output, *options, dataset=dataset))[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("compare") / "one")


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory):
    return encoded(tmp_path_factory.mktemp("compare") / "other-seed", "seed=1")


def changed(run, target, change):
    """A copy of a run whose rows went through `change(table) -> table`."""
    shutil.copytree(run.files.path, target)
    copy = RunFolder(target)
    for commit in copy.commits():
        path = target / commit.file
        rows = change(pq.read_table(path).cast(copy.plan().table_schema()))
        with path.open("wb") as stream:
            write_parquet(rows, stream)
        copy.recommit(dataclasses.replace(commit, rows=len(rows)))
    return copy


def planted(table):
    """Every datum is better or worse by chance, and by 0.2 dB on average."""
    noise = np.random.default_rng(len(table)).normal(PLANTED_DB, 1.0, len(table))
    place = table.schema.get_field_index("quality")
    better = pa.array((table["quality"].to_numpy() + noise).astype(np.float32))
    return table.set_column(place, table.schema.field(place), better)


def test_a_planted_difference_is_found(run, tmp_path):
    comparison, paired = compare_runs(run, changed(run, tmp_path / "better", planted))
    assert comparison.pairs == 1797
    assert comparison.interval_over == "data"
    assert comparison.interval[0] > 0
    assert comparison.is_different
    assert comparison.interval[0] < PLANTED_DB < comparison.interval[1]
    reach = 1.96 * paired.differences.std() / np.sqrt(1797)
    assert comparison.interval[1] - comparison.mean_difference == pytest.approx(reach, rel=0.01)
    assert comparison.worst[0]["difference"] == pytest.approx(paired.differences.min())
    assert "is better: mean difference +0." in words_of(comparison)


def test_two_seeds_of_one_job_do_not_differ(run, other_seed):
    """Their means do, by far more than chance among data explains: fields of a run share the luck of one theta0."""
    comparison, _ = compare_runs(run, other_seed)
    assert comparison.interval_over == "seeds"
    assert comparison.interval[0] < 0 < comparison.interval[1]
    assert not comparison.is_different
    assert comparison.differing == ["seed: 0 and 1"]
    assert "luck" in comparison.notes[0]


def test_two_seeds_with_fields_of_their_own_do_not_differ_over_the_data(tmp_path):
    runs = [encoded(tmp_path / f"seed{seed}", f"seed={seed}", "field.init=per_datum") for seed in (0, 1)]
    comparison, _ = compare_runs(*runs)
    assert comparison.interval_over == "data"
    assert comparison.interval[0] < 0 < comparison.interval[1]


def test_a_run_does_not_differ_from_itself(run):
    comparison, _ = compare_runs(run, run)
    assert (comparison.mean_difference, comparison.interval) == (0.0, (0.0, 0.0))
    assert not comparison.is_different
    assert comparison.cost["steps_ratio"] == pytest.approx(1.0)


def test_equal_quality_costs_less_where_it_comes_sooner(run, tmp_path):
    def sooner(table):
        place = table.schema.get_field_index("history_step")
        steps = pa.array([[step // 2 for step in row] for row in table["history_step"].to_pylist()])
        return table.set_column(place, table.schema.field(place), steps.cast(table.schema.field(place).type))

    comparison, _ = compare_runs(run, changed(run, tmp_path / "sooner", sooner))
    assert comparison.cost["steps_ratio"] == pytest.approx(0.5)
    assert comparison.cost["seconds_ratio"] == pytest.approx(0.5)
    assert comparison.cost["pairs"] == 1797


def test_data_are_paired_by_their_ids(run, tmp_path):
    comparison, paired = compare_runs(run, changed(run, tmp_path / "reversed", lambda table: table[::-1][:-5]))
    shards = len(run.commits())
    assert (comparison.pairs, comparison.only_one, comparison.only_other) == (1797 - 5 * shards, 5 * shards, 0)
    assert comparison.mean_difference == 0.0
    table = {row["datum_id"]: row["quality"] for row in open_weights(run.files.path).to_arrow().to_pylist()}
    assert [table[datum_id] for datum_id in paired.ids.to_pylist()] == pytest.approx(paired.one.tolist())


def test_runs_that_share_no_data_are_refused(run, tmp_path):
    def renamed(table):
        return table.set_column(0, table.schema.field(0), pa.array([f"x{i}" for i in table["datum_id"].to_pylist()]))

    with pytest.raises(CallerError, match="0 fitted data in common"):
        compare_runs(run, changed(run, tmp_path / "renamed", renamed))


def test_a_level_between_two_checks_is_on_the_line_between_them():
    best = np.array([10.0, 20.0, 20.0, 30.0])
    steps = [0, 10, 20, 30]
    assert [_first_at(steps, best, level) for level in (10.0, 15.0, 20.0, 25.0, 30.0)] == [0, 5, 10, 25, 30]


def test_the_page_needs_nothing_else(run, other_seed):
    page = comparison_page([compare_runs(run, other_seed)])
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "luck of that draw" in page


def test_figures_as_json(run, other_seed):
    figures = json.loads(json.dumps(compare_runs(run, other_seed)[0].to_json()))
    assert {"mean_difference", "interval", "pairs"} <= figures.keys()
    assert figures["confidence"] == 0.95
