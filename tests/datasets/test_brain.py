"""Blocks cut out of a volume, and the set where it can be had."""

from pathlib import Path

import numpy as np
import pytest

from nfscale.datasets import DATASETS, brain
from nfscale.datasets.brain import BrainDataset
from nfscale.errors import CallerError
from nfscale.job import load_job

nibabel = pytest.importorskip("nibabel", reason="reading NIfTI needs nibabel")

JOB = Path(__file__).resolve().parents[2] / "pipelines" / "brain.yaml"


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> BrainDataset:
    """A volume of 5 x 7 x 9 cells that say where they are, and a damaged one."""
    monkeypatch.setattr(brain, "_SIZES", (5, 7, 9))
    values = np.indices((9, 7, 5)).transpose(1, 2, 3, 0) @ np.array([1, 10, 100])
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = -4, -30, -200
    values[:2, :2, :2] = 0
    nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), affine), tmp_path / "t1.nii.gz")
    (tmp_path / "gm.nii.gz").write_bytes(b"no volume")
    return BrainDataset({name: tmp_path / name for name in ("t1.nii.gz", "gm.nii.gz")}, ["t1", "gm"], size=2)


def test_blocks_are_where_their_ids_and_affines_say(made_up):
    assert len(made_up.ids) == 2 * 2 * 3 * 4 - 1
    assert "t1/z00y00x00" not in made_up.ids, "a block of air"
    datum = made_up.read(made_up.ids.index("t1/z01y02x03"))
    assert (datum.label, datum.error) == ("t1", None)
    assert datum.content.values[0, 0, 0] == 100 * 2 + 10 * 4 + 6
    assert datum.content.values[1, 0, 0] == 100 * 3 + 10 * 4 + 6
    assert (datum.content.affine @ [0, 0, 0, 1])[:3].tolist() == [6 - 4, 4 - 30, 2 - 200]


def test_a_whole_volume_is_one_datum(made_up):
    whole = BrainDataset(made_up._paths, ["t1"], size=None)
    assert list(whole.ids) == ["t1"]
    voxels = whole.read(0).content
    assert voxels.values.shape == (5, 7, 9)
    assert (voxels.affine @ [0, 0, 0, 1])[:3].tolist() == [-4, -30, -200]


def test_a_volume_that_cannot_be_read_gives_data_with_a_reason(made_up):
    datum = made_up.read(made_up.ids.index("gm/z00y00x00"))
    assert datum.content is None
    assert "not a NIfTI file" in (datum.error or "")


def test_a_size_that_cannot_be_cut_is_refused():
    for size in (1, 190):
        with pytest.raises(CallerError, match=r"dataset\.size is 2 to 189 mm"):
            DATASETS["brain"](size=size).open()


def test_the_job_is_on_blocks():
    job = load_job(JOB)
    assert (job.dataset.kind, job.signal.kind) == ("brain", "volume")


def test_the_set_itself():
    try:
        dataset = DATASETS["brain"](part="all").open()
    except CallerError as error:
        pytest.skip(f"the maps cannot be had here: {error}")
    assert len(dataset.ids) == 110 + 118 + 110
    whole = DATASETS["brain"](size=None).open()
    assert list(whole.ids) == ["t1"]
    assert whole.read(0).content.values.shape == (189, 233, 197)
    assert list(DATASETS["brain"]().open().ids) == list(dataset.ids)[:110]
    for position in (20, 170, 300):
        datum = dataset.read(position)
        assert datum.error is None
        assert datum.content.values.shape == (32, 32, 32)
        assert datum.content.values.std() > 5
        assert datum.content.spacing.tolist() == [1, 1, 1]
