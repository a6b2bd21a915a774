"""The commands as a shell sees them: output, files, exit codes, one line for an error."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.jobs import tiny_settings


def nfscale(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "nfscale", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a job file and a finished run of it, MLflow included."""
    home = tmp_path_factory.mktemp("home")
    (home / "job.yaml").write_text(yaml.safe_dump(tiny_settings(home / "runs" / "tiny")))
    done = nfscale("encode", home / "job.yaml", "--json", home / "encode.json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warnings, of whatever library"
    (home / "encode.txt").write_text(done.stdout)
    return home


def test_encode_prints_figures_and_where_to_look(home):
    printed = (home / "encode.txt").read_text()
    figures = json.loads((home / "encode.json").read_text())
    assert "48 in" in printed
    assert "fields/s" in printed
    assert f"median psnr_db {figures['quality_median']:.2f}" in printed
    assert "runs/tiny/review/report.html" in printed
    assert "mlruns.db" in printed
    assert figures["fields"] == figures["fitted_here"] == 48
    assert sorted(p.name for p in home.iterdir()) == ["encode.json", "encode.txt", "job.yaml", "runs"], "and no more"
    assert sorted(p.name for p in (home / "runs").iterdir()) == ["mlartifacts", "mlruns.db", "tiny"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpus_is_not_asked_for_them(home, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    keys = (f"output={tmp_path / 'run'}", "workers=1", "workers_per_gpu=2")
    refused = nfscale("encode", home / "job.yaml", *keys, cwd=tmp_path)
    assert refused.returncode == 2
    assert "workers_per_gpu=2 asks for GPUs, and this machine has none" in refused.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_encode_on_a_finished_run_does_nothing(home):
    before = {p: p.stat().st_mtime_ns for p in (home / "runs").rglob("*")}
    again = nfscale("encode", home / "job.yaml", cwd=home)
    assert again.returncode == 0
    assert "is complete; nothing to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (home / "runs").rglob("*")} == before


def test_estimate_then_encode_then_status_compares_them(home, tmp_path):
    output = tmp_path / "run"
    told = nfscale("estimate", home / "job.yaml", f"output={output}", "--seconds", 1, "--json", tmp_path / "e.json")
    assert told.returncode == 0, told.stderr
    figures = json.loads((tmp_path / "e.json").read_text())
    low, high = figures["median_quality_interval"]
    assert low <= figures["median_quality"] <= high
    assert f"of {figures['data']} data fitted" in told.stdout
    assert [path.name for path in output.iterdir()] == ["estimate.json"], "nothing is encoded"
    assert nfscale("encode", home / "job.yaml", f"output={output}", "track.enabled=false").returncode == 0
    said = nfscale("status", output, "--json", tmp_path / "s.json").stdout
    assert "estimate  device-hours: " in said
    assert "estimate  median psnr_db: " in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["actual"]["data"] == found["estimate"]["data"] == 48


def test_status_verify_and_decode(home):
    run = home / "runs" / "tiny"
    status = nfscale("status", run, "--json", home / "status.json")
    assert "48 of 48 data committed in 3 shards; complete" in status.stdout
    assert json.loads((home / "status.json").read_text())["committed"] == 48
    verify = nfscale("verify", run, "--json", home / "verify.json")
    assert verify.returncode == 0
    assert json.loads((home / "verify.json").read_text())["decoded"] == 48
    datum = json.loads((run / "commits" / "shard-00000.json").read_text())
    assert datum["rows"] == 16
    import nfscale as package

    some = package.open_weights(run).to_arrow(["datum_id"])["datum_id"].to_pylist()[3]
    assert nfscale("decode", run, "--id", some, "--shape", "24x40", "-o", home / "d.png").returncode == 0
    with Image.open(home / "d.png") as decoded:
        assert decoded.size == (40, 24)
    assert nfscale("decode", run, "--id", some, "-o", home / "d.npy").returncode == 0
    assert np.load(home / "d.npy").shape == (8, 8, 1)


def test_status_says_in_which_state_a_run_is(home, tmp_path):
    import shutil
    import time

    run = tmp_path / "copy"
    shutil.copytree(home / "runs" / "tiny", run)
    (run / "_SUCCESS").unlink()
    (run / "commits" / "shard-00001.json").unlink()
    assert (
        "32 of 48 data committed in 2 shards; stopped; the same encode command continues it"
        in nfscale("status", run).stdout
    )
    alive = {"host": "elsewhere", "pid": 7, "at": time.time(), "in_flight": {"worker-0": "shard-00001"}}
    (run / "driver.json").write_text(json.dumps(alive))
    running = nfscale("status", run).stdout
    assert "running on elsewhere, process 7" in running
    assert "in flight shard-00001 on worker-0" in running
    assert nfscale("gc", run).returncode == 2, "the attempts of a running driver look like leftovers"
    (run / "driver.json").write_text(json.dumps(alive | {"at": time.time() - 3600}))
    assert "its driver was killed" in nfscale("status", run).stdout
    assert len(list((run / "data").iterdir())) == 3
    assert "1 files" in nfscale("gc", run, "--dry-run").stdout
    assert nfscale("gc", run).returncode == 0
    assert len(list((run / "data").iterdir())) == 2
    next((run / "data").iterdir()).unlink()
    assert "damaged" in nfscale("status", run).stdout


def test_verify_exits_with_5_where_a_byte_is_wrong(home, tmp_path):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(home / "runs" / "tiny", run)
    path = next((run / "data").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    failed = nfscale("verify", run)
    assert failed.returncode == 5
    assert "mismatch" in failed.stdout


def test_review_makes_a_report_that_needs_nothing_else(home):
    assert nfscale("review", home / "runs" / "tiny").returncode == 0
    report = (home / "runs" / "tiny" / "review" / "report.html").read_text()
    assert "48 of 48 data" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert 'src="data:image/' in report


def test_review_shows_how_one_datum_converged(home):
    run = home / "runs" / "tiny"
    import nfscale as package

    row = package.open_weights(run).to_arrow().to_pylist()[5]
    shown = nfscale("review", run, "--id", row["datum_id"], "--json", home / "datum.json")
    assert shown.returncode == 0, shown.stderr
    assert f"psnr_db {row['quality']:.2f}, rank " in shown.stdout
    figures = json.loads((home / "datum.json").read_text())
    assert figures["history_quality"] == row["history_quality"]
    with Image.open(figures["picture"]) as picture:
        assert picture.width > 500
    wrong = nfscale("review", run, "--id", "no-such-datum")
    assert wrong.returncode == 2
    assert "no committed row for ['no-such-datum']; ids look like ['digit-" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_compare_writes_a_page_and_figures(home, tmp_path):
    import shutil

    run = home / "runs" / "tiny"
    other = home / "runs" / "same"
    shutil.copytree(run, other)
    compared = nfscale("compare", run, other, "--json", tmp_path / "compare.json")
    assert compared.returncode == 0, compared.stderr
    figures = json.loads((tmp_path / "compare.json").read_text())
    assert (figures["mean_difference"], figures["interval"], figures["pairs"]) == (0.0, [0.0, 0.0], 48)
    assert "no difference at 95%" in compared.stdout
    page = other / "review" / "compare-tiny-with-same.html"
    assert "Runs compared" in page.read_text()
    (logged,) = (home / "runs" / "mlartifacts").rglob("compare/compare-tiny-with-same.html")
    assert logged.read_bytes() == page.read_bytes()
    shutil.rmtree(other)
    assert nfscale("compare", run).returncode == 2


def test_status_watches_until_a_run_is_complete(home, tmp_path):
    import shutil
    import time

    run = tmp_path / "copy"
    shutil.copytree(home / "runs" / "tiny", run)
    commit = (run / "commits" / "shard-00001.json").read_bytes()
    (run / "commits" / "shard-00001.json").unlink()
    (run / "_SUCCESS").unlink()
    (run / "driver.json").write_text(json.dumps({"host": "here", "pid": 7, "at": time.time() + 600, "in_flight": {}}))
    with (tmp_path / "seen.txt").open("w") as seen:
        watching = subprocess.Popen([sys.executable, "-m", "nfscale", "status", str(run), "--watch"], stdout=seen)
        until = time.monotonic() + 200
        while "32 of 48" not in (tmp_path / "seen.txt").read_text() and time.monotonic() < until:
            time.sleep(0.2)
        (run / "commits" / "shard-00001.json").write_bytes(commit)
        (run / "_SUCCESS").write_text("{}")
        (run / "driver.json").unlink()
        assert watching.wait(200) == 0
    text = (tmp_path / "seen.txt").read_text()
    assert "32 of 48 data committed in 2 shards; running on here" in text
    assert text.rstrip().splitlines()[-3:][0].endswith("48 of 48 data committed in 3 shards; complete")
    assert "data/s" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit.max_step=3"], "unknown key fit.max_step; accepted: "),
        (["signal.kind=imge"], "unknown signal 'imge'; known kinds of signal: "),
        (["fit.max_steps=few"], "fit.max_steps: input should be a valid integer"),
        (["fit.max_steps=80"], "belongs to another job: they differ in fit.max_steps"),
        (["dataset.kind=folder", "dataset.path=none"], "dataset.path: no folder 'none'"),
    ],
)
def test_the_callers_mistake_is_one_line_and_exit_2(home, arguments, message):
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    failed = nfscale("encode", home / "job.yaml", *arguments, cwd=home)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == before


@pytest.mark.parametrize("command", ["status", "verify", "review"])
def test_a_folder_without_a_run_is_exit_2(tmp_path, command):
    failed = nfscale(command, tmp_path)
    assert failed.returncode == 2
    assert "is not a run folder" in failed.stderr


def test_too_many_failed_data_is_exit_3_and_a_repeat_says_so_again(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"?")
    settings = tiny_settings(tmp_path / "run", dataset={"kind": "folder", "path": str(tmp_path / "images")})
    settings |= {"optimizer": {"kind": "adam"}, "track": {"enabled": False}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    for _ in range(2):
        failed = nfscale("encode", tmp_path / "job.yaml")
        assert failed.returncode == 3
        assert "1 of 7 data failed" in failed.stderr
    status = nfscale("status", tmp_path / "run")
    assert "1 x decode_error: not an image" in status.stdout
    assert "bad.png" in status.stdout
    assert nfscale("encode", tmp_path / "job.yaml", "max_failed_fraction=0.2").returncode == 0


def test_a_folder_of_unreadable_images_is_exit_2_and_nothing_is_written(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"?")
    settings = tiny_settings(tmp_path / "run", dataset={"kind": "folder", "path": str(tmp_path / "images")})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    failed = nfscale("encode", tmp_path / "job.yaml")
    assert failed.returncode == 2
    assert "none of 1 data that were tried can be read" in failed.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["encode", "status", "decode", "verify", "review", "compare", "gc"])
def test_every_command_has_help_with_an_example(command):
    shown = nfscale(command, "--help")
    assert shown.returncode == 0
    assert f"nfscale {command} " in shown.stdout.split("Example:")[1]


def test_the_help_of_encode_lists_the_names_that_a_job_may_use():
    shown = " ".join(nfscale("encode", "--help").stdout.split())
    assert "field.activation: sine, finer, gaussian, sinc, gabor, complex_gabor, relu" in shown
    assert "field.encoding: none, positional, fourier" in shown
    assert "field.kind: mlp, mfn, hash_grid" in shown


@pytest.mark.parametrize("what", ["init", "spectrum", "ntk", "hessian"])
def test_every_diagnosis_has_help_with_an_example(what):
    shown = nfscale("diagnose", what, "--help")
    assert shown.returncode == 0
    assert f"nfscale diagnose {what} " in " ".join(shown.stdout.split("Example:")[1].split())
