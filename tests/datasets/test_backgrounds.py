"""Large photographs, and the set where it can be had."""

from pathlib import Path

import pytest

from nfscale.datasets import DATASETS
from nfscale.datasets.backgrounds import BackgroundsDataset
from nfscale.errors import CallerError
from nfscale.job import load_job

JOBS = Path(__file__).resolve().parents[2] / "pipelines"


def test_an_unknown_photograph_is_refused_by_name():
    with pytest.raises(CallerError, match=r"dataset\.part: no photograph 'Sea'; there are all, Aqua, .*, YellowFlower"):
        DATASETS["backgrounds"](part="Sea").open()


def test_a_file_that_cannot_be_read_is_a_datum_with_a_reason(tmp_path):
    (tmp_path / "Wood.jpg").write_bytes(b"no photograph")
    dataset = BackgroundsDataset({"Wood.jpg": tmp_path / "Wood.jpg", "Aqua.jpg": tmp_path / "none"}, ["Wood", "Aqua"])
    assert "not an image" in (dataset.read(0).error or "")
    assert dataset.read(1).error == "No such file or directory"


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [("photos_whole", "image", (128, 128)), ("speech_whole", "audio", (1.0,)), ("brain_whole", "volume", (42, 42, 42))],
)
def test_the_jobs_on_whole_data_cut_them(name, kind, size):
    job = load_job(JOBS / f"{name}.yaml")
    assert (job.signal.kind, job.tile.size) == (kind, size)


def test_the_set_itself():
    try:
        dataset = DATASETS["backgrounds"]().open()
    except CallerError as error:
        pytest.skip(f"the photographs cannot be had here: {error}")
    assert len(dataset.ids) == 12
    assert dataset.read(list(dataset.ids).index("Wood")).content.shape == (1920, 2560, 3)
