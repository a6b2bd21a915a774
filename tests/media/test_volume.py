"""Volumes in files: NIfTI, npy and slices in, NIfTI, npy and pictures out; and files that lie."""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfscale.cli.decode import decode
from nfscale.datasets import DATASETS
from nfscale.errors import CallerError
from nfscale.media import nifti
from nfscale.media.base import nothing_beside
from nfscale.media.volume import VolumeMedium
from nfscale.signals import Volume, Voxels
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job
from tests.media.pages import no_other_shape

nibabel = pytest.importorskip("nibabel", reason="reading NIfTI needs nibabel")

MEDIUM = VolumeMedium()
AFFINE = np.array([[0.0, -2, 0, 40], [3, 0, 0, -7], [0, 0, 5, 1], [0, 0, 0, 1]])
VALUES = np.random.default_rng(0).normal(100, 30, (4, 9, 8)).astype(np.float32)
"""[z, y, x]"""


def nifti_bytes(array: np.ndarray, affine=AFFINE, form=nibabel.Nifti1Image, unit: str = "mm") -> bytes:
    """What nibabel writes of an array [x, y, z, ...]."""
    image = form(array, affine)
    image.header.set_xyzt_units(unit)
    return image.to_bytes()


def read(content: bytes, name: str = "x.nii"):
    return MEDIUM.read(io.BytesIO(content), name, nothing_beside)


@pytest.mark.parametrize("form", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("kind", ["float32", "int16", "uint8", ">f8"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_volume_of_nibabel_is_read_with_its_affine(form, kind, packed):
    content = nifti_bytes(VALUES.T.astype(kind), form=form)
    found = read(gzip.compress(content) if packed else content)
    assert found.values.dtype == np.float32
    assert found.values.shape == VALUES.shape
    np.testing.assert_allclose(found.values, VALUES.astype(kind), rtol=1e-6)
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)


def test_the_header_scales_values_and_places():
    content = nifti_bytes(np.full((2, 2, 2), 7, np.int16), unit="micron")
    scaled = bytearray(content)
    scaled[112:120] = np.array([0.5, -1], "<f4").tobytes()  # scl_slope and scl_inter
    found = read(bytes(scaled))
    assert (found.values == 2.5).all()
    np.testing.assert_allclose(found.affine[:3], AFFINE[:3] / 1000, atol=1e-7)


def test_axes_of_length_one_are_left_out():
    assert read(nifti_bytes(VALUES.T[..., None, None])).values.shape == VALUES.shape


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_that_is_written_is_where_it_was(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    MEDIUM.write(Voxels(VALUES[..., None], AFFINE, (0.0, 255.0)), path)
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(image.header.get_zooms(), (3, 2, 5))
    np.testing.assert_allclose(image.get_fdata(), VALUES.T, rtol=1e-6)
    with path.open("rb") as stream:
        back = MEDIUM.read(stream, path.name, nothing_beside)
    assert np.array_equal(back.values, VALUES)


def test_channels_are_the_fifth_axis(tmp_path):
    MEDIUM.write(Voxels(np.stack([VALUES, -VALUES], axis=3), AFFINE), tmp_path / "x.nii")
    assert nibabel.load(tmp_path / "x.nii").shape == (8, 9, 4, 1, 2)


def test_arrays_and_pictures_of_slices_are_written(tmp_path):
    content = Voxels(VALUES[..., None], AFFINE, (0.0, 255.0))
    MEDIUM.write(content, tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy")[..., 0], VALUES)
    MEDIUM.write(content, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width >= 2 * 8
        assert image.height >= 2 * 9


# --- arrays and slices


@pytest.mark.parametrize("array", [VALUES, VALUES.astype(">i2"), np.asfortranarray(VALUES), VALUES[..., None] > 100])
def test_an_npy_file_is_a_volume(array):
    stream = io.BytesIO()
    np.save(stream, array)
    found = read(stream.getvalue(), "x.npy")
    assert np.array_equal(found, array)
    assert found.dtype.isnative


def test_slices_are_a_volume_by_number_or_by_page(tmp_path):
    slices = [np.full((5, 6), 40 * n, np.uint8) for n in range(3)]
    for number, one in enumerate(slices):
        Image.fromarray(one).save(tmp_path / f"s{number}.png")
    Image.fromarray(slices[0]).save(
        tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(one) for one in slices[1:]]
    )
    for pattern in ("s0.png", "*.tif"):
        dataset = DATASETS["folder"](str(tmp_path), pattern=pattern, modality="volume").open()
        datum = dataset.read(0)
        assert datum.error is None
        assert np.array_equal(datum.content, np.stack(slices))
    signal = Volume(**Volume.settled({"channels": "auto", "spacing": [5.0, 1.0, 1.0]}, [np.stack(slices)]))
    assert (signal.span, signal.limits) == (15, (0, 255))


# --- files that lie

LIES = {
    "empty": (b"", "not a NIfTI file"),
    "text": (b"no volume at all" * 40, "not a NIfTI file"),
    "truncated": (nifti_bytes(VALUES.T)[:-100], "truncated: it has"),
    "header alone": (nifti_bytes(VALUES.T)[:200], "not a NIfTI file"),
    "truncated gzip": (gzip.compress(nifti_bytes(VALUES.T))[:-30], "truncated: the gzip file ends early"),
    "damaged gzip": (b"\x1f\x8b\x08\x00" + b"\xff" * 40, "a damaged gzip file"),
    "4-D": (nifti_bytes(np.zeros((2, 3, 4, 5), np.float32)), r"3 axes, and the file has 4: \[2, 3, 4, 5\]"),
    "2-D": (nifti_bytes(np.zeros((2, 3), np.float32)), "3 axes"),
    "complex": (nifti_bytes(np.zeros((2, 3, 4), np.complex64)), "its values are complex64"),
    "colours": (
        nifti_bytes(np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "volumes are integers or floats",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_a_sentence(lie):
    content, reason = LIES[lie]
    with pytest.raises(ValueError, match=reason):
        read(content)


def test_a_header_that_claims_gigabytes_is_refused_before_they_are_made():
    content = bytearray(nifti_bytes(VALUES.T))
    content[40:56] = np.array([3, 32767, 32767, 32767, 1, 1, 1, 1], "<i2").tobytes()  # dim
    with pytest.raises(ValueError, match="too large or empty"):
        read(bytes(content))


def test_what_is_mended_in_a_header_is_not_told_to_the_terminal(capfd):
    content = bytearray(nifti_bytes(VALUES.T))
    content[0] = 0x5D  # sizeof_hdr
    assert read(bytes(content)).values.shape == VALUES.shape
    assert capfd.readouterr() == ("", "")


def test_a_gzip_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(nifti, "_MOST_BYTES", 1 << 16)
    with pytest.raises(ValueError, match="unpacks to more than 65,536 bytes"):
        read(gzip.compress(bytes(1 << 20)))


def test_values_that_are_no_numbers_are_a_reason_of_the_signal():
    values = VALUES.T.copy()
    values[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Volume(1, span=100.0).samples(read(nifti_bytes(values)))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(VALUES)[:-10], "truncated"),
        (npy(VALUES)[:40], r"\w+"),
        (npy(np.array(["text"])), "volumes are integers or floats"),
        (npy(VALUES).replace(b"(4, 9, 8)", b"(9999999999,)"), r"too large|cannot be decoded"),
        (npy(VALUES)[:6] + b"\x09\x09" + npy(VALUES)[8:], r"version \(9, 9\)"),
    ],
    ids=["truncated", "header", "text", "claims", "version"],
)
def test_an_npy_file_that_lies_is_a_sentence(content, reason):
    with pytest.raises(ValueError, match=reason):
        read(content, "x.npy")


def test_an_npy_file_of_objects_is_not_unpickled():
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="volumes are integers or floats"):
        read(stream.getvalue(), "x.npy")


def test_pages_that_differ_or_are_too_many_are_refused(tmp_path, monkeypatch):
    first, other = Image.new("L", (4, 5)), Image.new("L", (4, 6))
    for name, second in (("same", first), ("odd", other)):
        first.save(tmp_path / f"{name}.tif", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match="its pages differ"):
        read((tmp_path / "odd.tif").read_bytes(), "odd.tif")
    monkeypatch.setattr(nifti, "MAX_VALUES", 30)
    with pytest.raises(ValueError, match="too large: 2 pages"):
        read((tmp_path / "same.tif").read_bytes(), "same.tif")


def test_bad_files_in_a_folder_are_data_with_a_reason(tmp_path: Path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes(VALUES.T)))
    (tmp_path / "b.nii.gz").write_bytes(LIES["truncated gzip"][0])
    (tmp_path / "c.nii").write_bytes(LIES["4-D"][0])
    dataset = DATASETS["folder"](str(tmp_path), modality="volume").open()
    data = [dataset.read(position) for position in range(len(dataset.ids))]
    assert [datum.error is None for datum in data] == [True, False, False]


def test_without_the_package_the_caller_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(CallerError, match=r"pip install 'nfscale\[volume\]'"):
        read(b"")
    with pytest.raises(CallerError, match=r"pip install 'nfscale\[volume\]'"):
        DATASETS["brain"]().open()


def test_volumes_are_encoded_verified_and_decoded_to_where_they_were(tmp_path):
    """Of four volumes, one is cut off and one holds NaN: rows with a reason."""
    scans = tmp_path / "scans"
    scans.mkdir()
    moved = AFFINE + np.array([[0, 0, 0, 100]] * 3 + [[0] * 4])
    broken = np.where(VALUES > 150, np.nan, VALUES)
    (scans / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes(VALUES.T)))
    (scans / "b.nii").write_bytes(nifti_bytes(VALUES.T[:, ::-1].copy(), moved))
    (scans / "c.nii").write_bytes(LIES["truncated"][0])
    (scans / "d.nii").write_bytes(nifti_bytes(broken.T.astype(np.float32)))
    job = tiny_job(
        tmp_path / "run",
        dataset={"kind": "folder", "path": str(scans)},
        signal={"kind": "volume"},
        field={"kind": "mlp", "width": 16, "depth": 2, "omega_0": 10, "weight_scale": 1.5},
        optimizer={"kind": "esgd", "calibration_data": 2, "warmup": 20},
        max_failed_fraction=0.5,
    )
    folder, summary = encode_in_process(job)
    assert summary.counts["decode_error"] == 2
    rows = open_weights(tmp_path / "run").to_arrow(["reason", "metrics"]).to_pylist()
    assert [row["reason"] is None for row in rows] == [True, True, False, False]
    assert "truncated" in rows[2]["reason"]
    assert "NaN" in rows[3]["reason"]
    assert "ssim_worst_slice" in dict(rows[0]["metrics"])
    assert not verify(folder).mismatches
    decode(str(tmp_path / "run"), "b.nii", tmp_path / "b.nii.gz", None)
    whole = nibabel.load(tmp_path / "b.nii.gz")
    assert whole.shape == VALUES.shape[::-1]
    np.testing.assert_allclose(whole.affine, moved, atol=1e-4)
    assert 50 < whole.get_fdata().mean() < 150, "in the data's own unit"
    decode(str(tmp_path / "run"), "b.nii", tmp_path / "fine.nii", "1mm")
    fine = nibabel.load(tmp_path / "fine.nii")
    np.testing.assert_allclose(fine.header.get_zooms(), (1, 1, 1), atol=1e-5)
    assert fine.shape == (24, 18, 20)
    decode(str(tmp_path / "run"), "b.nii", tmp_path / "b.png", None)
    with pytest.raises(CallerError, match=r"cannot write 'b\.gz'"):
        decode(str(tmp_path / "run"), "b.nii", tmp_path / "b.gz", None)


# --- measures and pages


def test_measures_are_of_slices():
    original = Voxels(VALUES[..., None], AFFINE, (0.0, 255.0))
    values = original.values.copy()
    values[2] = values[2, ::-1]
    found = MEDIUM.measures(original, Voxels(values, AFFINE))
    assert found["ssim_worst_slice"] < 0.5
    assert found["ssim"] == pytest.approx((3 + found["ssim_worst_slice"]) / 4)
    assert MEDIUM.measurable(original)
    assert not MEDIUM.measurable(Voxels(VALUES[:, :4, :, None], AFFINE))


def test_a_page_shows_slices():
    original = Voxels(VALUES[..., None], AFFINE, (0.0, 255.0))
    slices, middle = MEDIUM.panels(original, Voxels(VALUES[..., None] * 0.9, AFFINE, (0.0, 255.0)), no_other_shape)
    for panel, columns in ((slices, 4), (middle, 2)):
        with Image.open(io.BytesIO(panel.content)) as image:
            assert image.width > columns * 80
    assert slices.caption == "slices 0, 1, 2, 3"
