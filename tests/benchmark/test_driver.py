"""The rows of `nfscale benchmark driver`."""

import json

import pytest
import yaml

from nfscale.benchmark import driver
from nfscale.benchmark.app import main
from nfscale.errors import NfscaleError
from tests.jobs import tiny_settings

KEYS = ["what", "data", "shards", "workers", "cpu_seconds", "peak_mb", "wait_fraction", "fields_per_second", "speedup"]


@pytest.mark.parametrize("seed", range(3))
def test_a_simulated_cluster_is_served_whatever_dies(seed):
    row = driver.simulated(data=20_000, shards=500, workers=40, seed=seed)
    assert list(row) == KEYS
    assert (row["data"], row["shards"]) == (20_000, 500)
    assert 0 < row["cpu_seconds"] < 30
    assert row["peak_mb"] > 10


def test_a_datum_without_a_commit_or_with_two_fails_the_simulation():
    folder = driver._Folder()
    folder.found = {"a": (0, 5), "b": (5, 10), "c": None}
    driver._refuse_others(folder, 10)
    with pytest.raises(NfscaleError, match="10 of 12 data"):
        driver._refuse_others(folder, 12)
    folder.found["d"] = (4, 5)
    with pytest.raises(NfscaleError, match="not once"):
        driver._refuse_others(folder, 10)


def test_a_job_is_run_and_its_waits_are_counted(tmp_path):
    job = tmp_path / "job.yaml"
    settings = tiny_settings(tmp_path / "run", optimizer={"kind": "adam"}) | {"track": {"enabled": False}}
    job.write_text(yaml.safe_dump(settings))
    main(["driver", str(job), "--data", "0", "--workers", "0", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert list(row) == KEYS
    assert (row["what"], row["data"], row["shards"], row["workers"], row["speedup"]) == ("tiny", 48, 3, 1, 1.0)
    assert 0 < row["wait_fraction"] < 1


def test_waits_are_a_part_of_all_workers_time():
    figures = {"workers": 2, "seconds": 50.0, "spent": {"steps": 80.0, "writing": 2.0, "between": 1.0}}
    figures |= {"name": "photos", "fields": 100, "shards": 10, "driver_cpu_seconds": 1.0, "driver_peak_mb": 400.0}
    row = driver.row_of(figures | {"fields_per_second": 3.8}, first_speed=2.0)
    assert row["wait_fraction"] == pytest.approx(0.03)
    assert row["speedup"] == pytest.approx(1.9)
