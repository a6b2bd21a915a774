"""Volumes and films that stay in the file that they are mapped from: read where they are drawn, and nowhere else."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nfscale.engine import Stop, fit
from nfscale.errors import CallerError
from nfscale.fields import MLP
from nfscale.media.base import nothing_beside
from nfscale.media.volume import VolumeMedium
from nfscale.optim import Adam, Schedule
from nfscale.review.report import make_report
from nfscale.signals import Samples, Video, Volume
from nfscale.signals.grids import z_order, z_ordered
from nfscale.signals.mapped import mapping_of
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job

SHAPE = (6, 9, 7)
TURNED = np.array([[0.0, -2, 0, 40], [3, 0, 0, -7], [0, 0, 5, 1], [0, 0, 0, 1]])
RNG = np.random.default_rng(0)


@pytest.fixture
def small(monkeypatch):
    """Bounds that small arrays are beyond."""
    monkeypatch.setattr("nfscale.signals.volume.MAX_CELLS", 100)
    monkeypatch.setattr("nfscale.signals.video.MAX_PIXELS", 100)
    monkeypatch.setattr("nfscale.media.nifti.MAX_CELLS", 100)
    monkeypatch.setattr("nfscale.media.volume.MAX_CELLS", 100)


def mapped(path: Path, array: np.ndarray) -> np.ndarray:
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def everything(samples: Samples) -> Samples:
    """What a source holds."""
    assert samples.source is not None
    return samples.source.draw(torch.arange(samples.count))


def assert_equal(one: Samples, other: Samples) -> None:
    assert torch.equal(one.coordinates, other.coordinates)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("sizes", [(4, 6, 5), (7, 1, 2), (16, 9, 31), (1, 1, 1), (3, 20)])
def test_the_cells_of_ranks_are_those_of_the_whole_order(sizes):
    order, kept = z_order(*sizes), [np.ones(size, bool) for size in sizes]
    cells = np.ravel_multi_index(z_ordered(np.arange(len(order)), kept), sizes)
    assert np.array_equal(cells, order)
    kept[0][1::3] = False
    left = order[kept[0][np.unravel_index(order, sizes)[0]]]
    cells = np.ravel_multi_index(z_ordered(np.arange(len(left)), kept), sizes)
    assert np.array_equal(cells, left)


@pytest.mark.parametrize("holdout", [None, 3])
@pytest.mark.parametrize("kind", ["u1", "<i2", ">f4", "f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_mapped_volume_has_the_samples_of_one_in_memory(tmp_path, monkeypatch, kind, order, holdout):
    array = np.asarray(RNG.integers(0, 200, SHAPE).astype(kind), order=order)
    content, held = mapped(tmp_path / "v.npy", array), np.array(array)
    signal = Volume(1, span=50.0, value_range=[0, 255], spacing=[2.0, 1.0, 3.0], holdout=holdout)
    in_memory = signal.samples(held)
    monkeypatch.setattr("nfscale.signals.volume.MAX_CELLS", 100)
    samples = signal.samples(content)
    assert samples.count == in_memory.count
    assert samples.bytes < 2 * in_memory.bytes  # the check, which has all cells of so small a volume
    assert_equal(everything(samples), in_memory)
    assert_equal(samples.check, in_memory)
    if holdout is not None:
        assert_equal(samples.heldout, in_memory.heldout)
    with pytest.raises(ValueError, match="too large"):
        signal.samples(held)


@pytest.mark.parametrize(("shape", "convert"), [((12, 6, 5), None), ((12, 6, 5, 3), None), ((12, 6, 5, 3), "grey")])
def test_a_mapped_film_has_the_samples_of_one_in_memory(tmp_path, monkeypatch, shape, convert):
    frames = RNG.integers(0, 256, shape).astype(np.uint8)
    channels = 1 if convert or len(shape) == 3 else 3
    signal = Video(channels, convert=convert, frames=11, holdout=4)
    in_memory = signal.samples(frames)
    monkeypatch.setattr("nfscale.signals.video.MAX_PIXELS", 100)
    samples = signal.samples(mapped(tmp_path / "f.npy", frames))
    torch.testing.assert_close(everything(samples).values, in_memory.values, rtol=0, atol=1e-7)  # grey: of another loop
    assert torch.equal(everything(samples).coordinates, in_memory.coordinates)
    assert torch.equal(samples.heldout.coordinates, in_memory.heldout.coordinates)
    assert signal.measures(mapped(tmp_path / "g.npy", frames))["checked_pixels"] > 0
    with pytest.raises(ValueError, match=r"too large.*signal\.frames"):
        Video(3, frames=4, resize=[8, 8]).samples(mapped(tmp_path / "h.npy", np.zeros((12, 90, 50, 3), np.uint8)))


def test_what_is_checked_is_spread_over_all_cells_and_the_same_for_each(tmp_path, small, monkeypatch):
    monkeypatch.setattr("nfscale.signals.mapped.CHECKED", 27)
    signal = Volume(1, span=9.0, value_range=[0, 255])
    one, other = (
        signal.samples(mapped(tmp_path / f"{n}.npy", np.full((6, 6, 6), n, np.uint8))).check for n in range(2)
    )
    assert torch.equal(one.coordinates, other.coordinates)
    assert len(one.values) == 27
    eighths = (one.coordinates > 0).long() @ torch.tensor([4, 2, 1])
    assert eighths.bincount(minlength=8).min() > 0


def test_a_volume_says_what_its_quality_is_measured_on(tmp_path, small):
    content = mapped(tmp_path / "v.npy", RNG.integers(0, 256, SHAPE).astype(np.uint8))
    signal = Volume(**Volume.settled({"channels": "auto"}, [content]))
    assert signal.limits == (0, 255)
    assert signal.measures(content)["checked_cells"] == content.size
    assert signal.shape_of(signal.measures(content))[:3] == SHAPE
    with pytest.raises(ValueError, match="too large to be held"):
        signal.original(content)


@pytest.mark.parametrize("form", ["Nifti1Image", "Nifti2Image"])
def test_a_large_nifti_stays_in_its_file(tmp_path, small, form):
    nibabel = pytest.importorskip("nibabel")
    image = getattr(nibabel, form)(RNG.integers(0, 900, SHAPE[::-1]).astype(np.int16), TURNED)
    image.header.set_xyzt_units("mm")
    path, medium = tmp_path / "v.nii", VolumeMedium()
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, path)
    with path.open("rb") as stream:
        found = medium.read(stream, path.name, nothing_beside)
    assert mapping_of(found.values) is not None
    np.testing.assert_allclose(found.affine, TURNED, atol=1e-5)
    signal = Volume(1, span=99.0, value_range=[0, 500])
    drawn = everything(signal.samples(found))
    expected = nibabel.load(path).get_fdata(dtype=np.float32).T
    order = z_order(*SHAPE)
    np.testing.assert_allclose(drawn.values[:, 0], expected.reshape(-1)[order] / 500 - 0.5, atol=1e-6)
    assert signal.shape_of(signal.measures(found)) == (*SHAPE, *TURNED[:3].ravel())
    cut = path.read_bytes()[:-1]
    path.write_bytes(cut)
    with path.open("rb") as stream, pytest.raises(ValueError, match="truncated"):
        medium.read(stream, path.name, nothing_beside)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_what_no_field_can_be_fitted_to_has_a_reason(tmp_path, small, value):
    array = RNG.random(SHAPE).astype(np.float32)
    array[3, 4, 5] = value
    with pytest.raises(ValueError, match=r"NaN or infinite|far from the range"):
        Volume(1, value_range=[0, 1]).samples(mapped(tmp_path / "v.npy", array))
    with pytest.raises(ValueError, match=r"NaN or infinite|values from"):
        Video(1).samples(mapped(tmp_path / "f.npy", array))


def test_nan_that_no_check_sees_is_a_field_that_diverges(tmp_path, small, monkeypatch):
    monkeypatch.setattr("nfscale.signals.mapped.CHECKED", 8)
    signal = Volume(1, value_range=[0, 1])
    clean = RNG.random(SHAPE).astype(np.float32)
    checked = signal.samples(mapped(tmp_path / "c.npy", clean)).check.coordinates
    spoiled = clean.copy()
    cells = signal.samples(mapped(tmp_path / "d.npy", clean))
    everywhere = everything(cells).coordinates
    unseen = [n for n, at in enumerate(everywhere) if not (at == checked).all(dim=1).any()]
    spoiled.reshape(-1)[z_order(*SHAPE)[unseen]] = np.nan
    how = {"optimizer": Adam(0.01, Schedule("constant")), "stop": Stop(20, check_every=10), "seed": 0, "samples": 16}
    data = [("spoiled", signal.samples(mapped(tmp_path / "s.npy", spoiled))), ("clean", cells)]
    results = {one.id: one for one in fit(MLP(3, 1, width=8, depth=2), signal, data, device="cpu", **how)}
    assert not results["spoiled"].result.ok
    assert torch.isfinite(results["spoiled"].weights).all()
    assert results["clean"].result.ok


SIDE = 512
PROGRAM = """
import json, re, sys
import numpy as np, torch
import nfscale
from nfscale.signals import Volume
from nfscale.signals.grids import axis_centres
torch.set_num_threads(1)
path, side = sys.argv[1], int(sys.argv[2])
signal, field = Volume(1, span=float(side), value_range=[0, 255]), nfscale.MLP(3, 1, width=16, depth=2, omega_0=8)
def peak(): return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
adam = nfscale.Adam(5e-3, nfscale.Schedule("cosine", total_steps=300))
how = {"optimizer": adam, "stop": nfscale.Stop(300, check_every=50), "seed": 0, "samples": 256, "device": "cpu"}
list(nfscale.fit(field, signal, [("small", signal.samples(np.zeros((16, 16, 16), np.uint8)))], **how))
resting = peak()
volume = np.load(path, mmap_mode="r")
(fitted,) = nfscale.fit(field, signal, [("one", signal.samples(volume))], **how)
grown = peak() - resting
apply, error = field.layout.unravel(fitted.weights[None]), 0.0
for z in range(0, side, 16):  # another set of cells than those of the check: whole slices
    plane = torch.cartesian_prod(axis_centres(side)[z : z + 1], axis_centres(side), axis_centres(side))
    values = torch.from_numpy(volume[z].astype(np.float32).reshape(-1, 1) / 255 - 0.5)
    with torch.no_grad():
        error += float((field.apply(apply, plane[None])[0] - values).square().mean()) / (side // 16)
found = {"quality": fitted.quality, "slices_db": float(-10 * np.log10(error)), "start": fitted.history_quality[0]}
print(json.dumps(found | {"grown_bytes": grown}))
"""


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_run_of_volumes_that_stay_in_their_files(tmp_path, small, monkeypatch, kind):
    """Fitted, verified, reviewed and decoded; a file that is cut off is a row with a reason."""
    monkeypatch.setattr("nfscale.datasets.npz._MAPPED_VALUES", 100)
    monkeypatch.setattr("nfscale.signals.mapped.CHECKED", 64)
    volumes = (127 + 100 * np.sin(np.indices((5, 12, 12, 12)).sum(axis=0) / 5)).astype(np.uint8)
    (tmp_path / "data").mkdir()
    dataset = {"kind": "folder", "path": str(tmp_path / "data")}
    if kind == "npz":
        np.savez(tmp_path / "v.npz", volumes=volumes)
        dataset = {"kind": "npz", "path": str(tmp_path / "v.npz")}
    else:
        for number, volume in enumerate(volumes):
            np.save(tmp_path / "data" / f"{number}.npy", volume)
        (tmp_path / "data" / "cut.npy").write_bytes((tmp_path / "data" / "0.npy").read_bytes()[:-1])
    sections = {"dataset": dataset, "signal": {"kind": "volume", "holdout": 4}, "max_failed_fraction": 0.5}
    job = tiny_job(
        tmp_path / "run", "fit.samples=32", "optimizer.calibration_data=3", "store.dtype=float16", **sections
    )
    folder, _ = encode_in_process(job)
    assert not verify(folder).mismatches
    table = open_weights(str(folder))
    rows = table.to_arrow(["datum_id", "status", "reason", "quality", "quality_heldout", "metrics"]).to_pylist()
    fitted = [row for row in rows if row["status"] == "max_steps"]
    assert len(fitted) == 5
    for row in fitted:
        assert dict(row["metrics"])["checked_cells"] == 64
        assert row["quality"] > 10
        assert row["quality_heldout"] > 10
    assert make_report(folder)["fields"] == len(rows)
    assert table.decode([fitted[0]["datum_id"]], "3x4x5")[0].values.shape == (3, 4, 5, 1)
    monkeypatch.setattr("nfscale.signals.base.MAX_DECODED_SAMPLES", 1000)
    with pytest.raises(CallerError, match="1,728 samples are asked for"):
        table.decode([fitted[0]["datum_id"]])
    if kind == "folder":
        (cut,) = [row for row in rows if row["status"] == "decode_error"]
        assert cut["datum_id"] == "cut.npy"
        assert "truncated" in cut["reason"]
    with pytest.raises(CallerError, match="takes all samples of a datum at every step"):
        encode_in_process(tiny_job(tmp_path / "full", "optimizer.calibration_data=3", **sections))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read peaks of memory from")
def test_a_volume_of_a_hundred_million_cells_is_fitted_in_little_memory(tmp_path):
    """512^3 cells of one byte: 537 MB as float32 values, 2.1 GB with their coordinates."""
    path = tmp_path / "large.npy"
    large = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(SIDE, SIDE, SIDE))
    z, y, x = (np.linspace(0, 3, SIDE, dtype=np.float32) + n for n in range(3))
    plane = np.cos(y)[:, None] * np.sin(2 * x)[None]
    for place in range(SIDE):
        large[place] = 127.5 + 100 * np.sin(z[place]) * plane
    large.flush()
    del large
    said = subprocess.run([sys.executable, "-c", PROGRAM, path, str(SIDE)], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    assert 0 < found["grown_bytes"] < SIDE**3 * 4 / 3
    assert found["quality"] > found["start"] + 15
    assert found["quality"] == pytest.approx(found["slices_db"], abs=0.2)
