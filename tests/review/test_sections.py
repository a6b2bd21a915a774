"""What a report says of a table, at sizes that no test fits: its rows are drawn."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nfscale.difficulty import measures
from nfscale.errors import CallerError
from nfscale.review import curve_of, make_report
from nfscale.review.gathered import OTHERS, _Names, gathered
from nfscale.store.history import quality_over_seconds
from nfscale.store.run_folder import JOB_FILE, REPORT
from nfscale.store.table import WeightsTable
from tests.synthetic import synthetic_run

ROWS = 10_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("synthetic") / "run", ROWS)


@pytest.fixture(scope="module")
def report(run):
    summary = make_report(run)
    return summary, (run.files.path / REPORT).read_text()


def test_what_is_gathered_is_what_the_table_holds(run):
    table = WeightsTable(run)
    rows, whole = gathered(table), table.to_arrow(["datum_id", "quality", "status", "label"])
    assert rows.quality == pytest.approx(whole["quality"].to_numpy(), nan_ok=True)
    names = np.array([*rows.label.names])
    assert names[rows.label.codes].tolist() == whole["label"].to_pylist()
    worst = rows.ids_at(rows.fitted[:3])
    assert worst == whole.sort_by("quality")["datum_id"].to_pylist()[:3]
    failed = whole.filter(pc.is_in(whole["status"].cast("string"), pa.array(["diverged", "decode_error"])))
    assert sum(failure.count for failure in rows.failures) == len(failed) > 0
    assert set(rows.failures[0].examples) <= set(failed["datum_id"].to_pylist())


def test_names_beyond_the_most_are_one(monkeypatch):
    monkeypatch.setattr("nfscale.review.gathered._MOST_NAMES", 2)
    names = _Names()
    names.add(pa.chunked_array([["a", "b", "c", None, "a"]]))
    names.add(pa.chunked_array([["d", "b"]]))
    coded = names.coded()
    assert coded.names == ["a", "b", OTHERS]
    assert coded.codes.tolist() == [0, 1, 2, -1, 0, 2, 1]
    assert coded.counts() == {"a": 2, "b": 2, OTHERS: 2}


def test_a_large_report_is_small_and_whole(report):
    summary, text = report
    assert len(text) < 2_000_000
    assert f"{ROWS:,} of {ROWS:,} data" in text
    for section in ("failures", "quality", "convergence", "worst", "gallery", "difficulty", "by-label", "work", "job"):
        assert f'id="{section}"' in text, section
    assert summary["worst"] in text
    assert "not an image" in text or "diverged in each" in text
    assert "node-0-worker-2" in text
    assert "http" not in text.replace("http://www.w3.org", ""), "it needs no network"


def test_the_words_are_those_of_the_table(run, report):
    summary, text = report
    table = WeightsTable(run).to_arrow(["quality", "steps_to_target"])
    reached = len(table["steps_to_target"].drop_null()) / ROWS
    assert summary["reached_fraction"] == pytest.approx(reached)
    assert f"is reached by {100 * reached:.1f} %" in text
    assert summary["quality_min"] == table["quality"].drop_null().to_numpy().min()


def test_the_job_can_be_repeated(run, report, tmp_path):
    from nfscale.job import load_job

    repeated = load_job(run.files.path / JOB_FILE, [f"output={tmp_path / 'again'}"])
    assert repeated.model_dump(mode="json") | {"output": ""} == run.plan().job | {"output": ""}


def test_quality_over_seconds_spreads_a_field_over_its_steps():
    histories = pa.table(
        {"history_step": [[0, 10]], "history_quality": [[1.0, 9.0]], "steps": [10], "wall_seconds": [2.0]}
    )
    seconds, median = quality_over_seconds(histories, [50])
    assert (seconds[0], seconds[-1]) == (0.0, 2.0)
    assert median[:-1].tolist() == [1.0] * (len(seconds) - 1)
    assert median[-1] == 9.0


def test_difficulty_of_known_pictures():
    rows, columns = np.mgrid[0:32, 0:32]
    checks = ((rows + columns) % 2).astype(np.float32)[..., None]
    assert measures(checks) == pytest.approx({"high_frequency_percent": 100.0, "entropy_bits": 1.0})
    slow = np.cos(2 * np.pi * rows / 32)[..., None]
    assert measures(slow)["high_frequency_percent"] == pytest.approx(0.0, abs=1e-9)
    even = (rows * 8 + columns % 8)[..., None].astype(np.float32)
    assert measures(even)["entropy_bits"] == pytest.approx(8.0)
    flat = measures(np.full((8, 8, 1), 0.5))
    assert flat == {"high_frequency_percent": 0.0, "entropy_bits": 0.0}


def test_the_curve_of_one_datum(run):
    table = WeightsTable(run)
    figures, picture = curve_of(run, "17")
    (row,) = table.rows(["row-0000017"]).to_pylist()
    assert figures["datum_id"] == "row-0000017"
    assert figures["history_quality"] == row["history_quality"]
    quality = table.to_arrow(["quality"])["quality"].drop_null().to_numpy()
    assert figures["rank"] == 1 + (quality < row["quality"]).sum()
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    with pytest.raises(CallerError, match="no committed row for"):
        curve_of(run, "row-x")


def test_the_convergence_table_has_every_row(run, report):
    table = pq.read_table(run.files.path / "review" / "convergence.parquet")
    assert len(table) == ROWS
    assert "weights" not in table.column_names


def test_without_its_dataset_a_run_has_a_report_without_pictures(tmp_path, monkeypatch):
    run = synthetic_run(tmp_path / "run", 50)
    monkeypatch.setattr("tests.synthetic.Noise.__len__", lambda self: 49)
    make_report(run)
    text = (run.files.path / REPORT).read_text()
    assert "Not shown: " in text
    assert "<svg" in text
