"""The figures of `nfscale benchmark store` are those of the files that it wrote."""

import json

import pytest

from nfscale.benchmark.app import main
from tests.jobs import encode_in_process, tiny_job


def test_formats_are_compared_on_the_weights_of_a_run(tmp_path, capsys):
    encode_in_process(tiny_job(tmp_path / "run", "fit.max_steps=20"))
    main(["store", str(tmp_path / "run"), "--fields", "40", "--rounds", "1", "--json", str(tmp_path / "rows.json")])
    assert "40 fields of 337 weights" in capsys.readouterr().out
    figures = json.loads((tmp_path / "rows.json").read_text())
    assert figures["machine"]["cpus"] >= 1
    rows = {row["format"]: row for row in figures["rows"]}
    for exact in ("torch.save per field", "npy mapped", "nfscale float32", "nfscale ipc copy"):
        assert rows[exact]["largest_error"] == 0
    assert 0 < rows["nfscale delta_float16"]["largest_error"] < rows["nfscale float16"]["largest_error"]
    assert rows["npy mapped"]["bytes_per_field"] == pytest.approx(4 * 337 + 128 / 40)


def test_without_a_run_the_weights_are_made_up(capsys):
    main(["store", "--fields", "8", "--rounds", "1"])
    assert "8 fields of 12,867 weights" in capsys.readouterr().out


def test_the_command_passes_its_arguments_on(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"], prog="nfscale benchmark")
    assert stopped.value.code == 0
    assert "store" in capsys.readouterr().out
