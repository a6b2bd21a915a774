"""Clips cut out of films, and the set where it can be had."""

from pathlib import Path

import numpy as np
import pytest

from nfscale.datasets import DATASETS, clips
from nfscale.datasets.clips import ClipsDataset
from nfscale.errors import CallerError
from nfscale.job import load_job
from nfscale.media import films

pytest.importorskip("imageio_ffmpeg", reason="reading films needs imageio-ffmpeg")

JOB = Path(__file__).resolve().parents[2] / "pipelines" / "video.yaml"


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> ClipsDataset:
    """One film of 5 frames of 20 x 33 pixels that say where they are, and a damaged one."""
    monkeypatch.setattr(clips, "_FILMS", {"a": (5, 20, 33), "b": (4, 16, 16)})
    places = np.zeros((5, 20, 33, 3), np.uint8)
    places[:] = 40 * np.arange(5)[:, None, None, None]
    places[:, 8:16, 24:32] = 250
    films.write_mp4(places, 10.0, tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no film")
    return ClipsDataset({"a.mp4": tmp_path / "a.mp4", "b.mp4": tmp_path / "b.mp4"}, size=8, frames=2)


def test_clips_are_where_their_ids_say(made_up):
    assert len(made_up.ids) == 2 * 2 * 4 + 2 * 2 * 2
    assert len(set(made_up.ids)) == len(made_up.ids)
    bright = made_up.read(made_up.ids.index("a/t01r01c03"))
    assert bright.content.values.shape == (2, 8, 8, 3)
    assert bright.content.values.min() > 235
    assert bright.content.rate == 10
    later = made_up.read(made_up.ids.index("a/t01r00c00"))
    assert np.abs(later.content.values.mean(axis=(1, 2, 3)) - [80, 120]).max() < 6
    assert (later.label, later.split, later.error) == ("a", None, None)


def test_a_film_that_cannot_be_decoded_gives_data_with_a_reason(made_up):
    datum = made_up.read(made_up.ids.index("b/t00r00c00"))
    assert datum.content is None
    assert "no film" in (datum.error or "")


@pytest.mark.parametrize("keys", [{"size": 1}, {"size": 145}, {"frames": 0}, {"frames": 121}])
def test_clips_that_cannot_be_cut_are_refused(keys):
    with pytest.raises(CallerError, match=next(iter(keys))):
        DATASETS["clips"](**keys).open()


def test_the_job_is_on_clips():
    job = load_job(JOB)
    assert (job.dataset.kind, job.signal.kind) == ("clips", "video")


def test_the_set_itself():
    try:
        dataset = DATASETS["clips"]().open()
    except CallerError as error:
        pytest.skip(f"the films cannot be had here: {error}")
    assert len(dataset.ids) == 1760 + 600 + 28
    for position in (0, 2000, len(dataset.ids) - 1):
        datum = dataset.read(position)
        assert datum.error is None
        assert datum.content.values.shape == (16, 64, 64, 3)
        assert datum.content.values.std() > 1
        assert 20 < datum.content.rate < 31
