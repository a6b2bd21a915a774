"""NetCDF files as datasets: what is a datum, its id and its label; files that cannot be used; the shipped winds."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfscale.datasets import DATASETS
from nfscale.datasets.netcdf import NetCdf
from nfscale.errors import CallerError
from nfscale.job import load_job
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job

netcdf4 = pytest.importorskip("netCDF4")

LATITUDE, LONGITUDE = np.linspace(-80, 80, 9), np.arange(20.0, 380, 30)
SHAPE = (len(LATITUDE), len(LONGITUDE))
VALUES = np.random.default_rng(0).normal(10, 3, (2, 5, *SHAPE)).astype(np.float32)
JOBS = Path(__file__).resolve().parents[2] / "pipelines"


def write(path: Path, variables=("t", "u"), levels: int = 2, **attributes) -> Path:
    """Two variables of two levels and five months each; the second is the first and a hundred."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with netcdf4.Dataset(path, "w") as file:
        for name, values, units in (
            ("level", np.arange(levels), "hPa"),
            ("time", 30.5 * np.arange(5), "days since 1999-11-15"),
            ("lat", LATITUDE, "degrees_north"),
            ("lon", LONGITUDE, "degrees_east"),
        ):
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
            file[name].units = units
        for number, name in enumerate(variables):
            variable = file.createVariable(name, "f4", ("level", "time", "lat", "lon"), fill_value=-999)
            variable.setncatts({"units": "K"} | attributes)
            variable[:] = VALUES[:levels] + 100 * number
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "era5.nc")


def test_a_datum_is_a_map_at_one_place_of_the_other_axes(file):
    dataset = NetCdf(str(file), "u", label_from="month").open()
    assert list(dataset.ids)[:6] == [f"era5/u/0000-{time:04d}" for time in range(5)] + ["era5/u/0001-0000"]
    assert len(dataset.ids) == 10
    for position in (0, 4, 7):
        datum = dataset.read(position)
        assert (datum.id, datum.index, datum.error) == (dataset.ids[position], position, None)
        content = datum.content
        np.testing.assert_allclose(content.values[..., 0], VALUES[position // 5, position % 5] + 100, rtol=1e-6)
        assert (content.names, content.units) == (("u",), ("K",))
        assert datum.label == [11, 12, 1, 2, 3][position % 5]


def test_several_variables_are_the_channels_of_one_map(file):
    dataset = NetCdf(str(file), ["u", "t"]).open()
    assert dataset.ids[7] == "era5/u+t/0001-0002"
    content = dataset.read(7).content
    assert content.values.shape == (*SHAPE, 2)
    np.testing.assert_allclose(content.values[..., 0] - content.values[..., 1], 100, atol=1e-4)


def test_without_a_name_the_only_map_is_taken(tmp_path, file):
    assert NetCdf(str(write(tmp_path / "one.nc", ["t"]))).open().ids[0] == "one/t/0000-0000"
    with pytest.raises(CallerError, match=r"several variables are maps \('t', 'u'\); dataset\.variable names"):
        NetCdf(str(file)).open()


def test_another_value_may_mean_missing(file):
    value = float(VALUES[0, 0, 3, 4])
    content = NetCdf(str(file), "t", missing=value).open().read(0).content
    assert np.argwhere(np.isnan(content.values)).tolist() == [[3, 4, 0]]


def test_axes_may_be_named(tmp_path):
    with netcdf4.Dataset(tmp_path / "x.nc", "w") as file:
        for name, count in (("rows", 3), ("columns", 4)):
            file.createDimension(name, count)
            file.createVariable(name, "f4", (name,))[:] = 10 * np.arange(count)
        file.createVariable("t", "f4", ("rows", "columns"))[:] = 1
    with pytest.raises(CallerError, match=r"no map: it has not both .* \['rows', 'columns'\]"):
        NetCdf(str(tmp_path / "x.nc"), "t").open()
    dataset = NetCdf(str(tmp_path / "x.nc"), "t", latitude="rows", longitude="columns").open()
    assert list(dataset.ids) == ["x/t"]
    assert dataset.read(0).content.latitude.tolist() == [0, 10, 20]


def test_a_folder_is_read_file_by_file_and_what_is_none_is_a_row(tmp_path):
    whole = write(tmp_path / "maps" / "b" / "x.nc").read_bytes()
    write(tmp_path / "maps" / "a.cdf", ["t"], levels=1)
    write(tmp_path / "maps" / "other.nc", ["snow"])
    write(tmp_path / "outside.nc")
    (tmp_path / "maps" / "cut.nc").write_bytes(whole[:5000])
    (tmp_path / "maps" / "empty.nc").write_bytes(b"")
    (tmp_path / "maps" / "note.nc").write_text("no maps here")
    (tmp_path / "maps" / "readme.txt").write_text("not looked at")
    (tmp_path / "maps" / "link.nc").symlink_to(tmp_path / "outside.nc")
    os.mkfifo(tmp_path / "maps" / "pipe.nc")
    dataset = NetCdf(str(tmp_path / "maps"), "t").open()
    errors = {d.id: d.error for d in map(dataset.read, range(len(dataset.ids))) if d.error}
    assert len(dataset.ids) == 5 + 10 + len(errors)
    assert dataset.ids[0] == "a/t/0000-0000"
    assert "b/x/t/0001-0004" in dataset.ids
    assert list(errors) == ["cut", "empty", "link", "note", "other"]
    for name, message in (
        ("cut", "not a NetCDF file, or a damaged one"),
        ("empty", "the file is empty"),
        ("note", "not a NetCDF file"),
        ("other", "there is no variable 't'; variables with latitude and longitude are 'snow'"),
        ("link", "leads out of the dataset's folder"),
    ):
        assert message in errors[name]
        assert str(tmp_path) not in errors[name]
    assert [dataset.index_of(position) for position in (0, 12)] == [0, 12]


def test_files_that_differ_in_the_suffix_alone_keep_it(tmp_path):
    for name in ("x.nc", "x.cdf"):
        write(tmp_path / name, ["t"], levels=1)
    assert NetCdf(str(tmp_path)).open().ids[5] == "x.nc/t/0000-0000"


def test_more_files_than_are_kept_open(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number:02d}.nc", ["t"], levels=1)
    dataset = NetCdf(str(tmp_path)).open()
    for position in (0, 99, 3, 50):
        np.testing.assert_array_equal(dataset.read(position).content.values[..., 0], VALUES[0, position % 5])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variable": "snow"}, "no variable 'snow'; variables with latitude and longitude are 't', 'u'"),
        ({"variable": "time"}, "the variable 'time' is no map"),
        ({"variable": ["t", "snow"]}, "no variable 'snow'"),
        ({"path": "absent.nc"}, r"no file or folder 'absent\.nc'"),
    ],
)
def test_what_cannot_be_opened_is_the_callers_mistake(file, keys, message):
    with pytest.raises(CallerError, match=message) as error:
        NetCdf(**({"path": str(file), "variable": "t"} | keys)).open()
    assert "\n" not in str(error.value)


def test_a_header_may_claim_any_number_of_maps(tmp_path):
    with netcdf4.Dataset(tmp_path / "x.nc", "w") as file:
        for name, count, units in (("time", 10**9, "1"), ("lat", 3, "degrees_north"), ("lon", 4, "degrees_east")):
            file.createDimension(name, count)
            if count < 10:
                file.createVariable(name, "f4", (name,))[:] = np.arange(count)
                file[name].units = units
        file.createVariable("t", "f4", ("time", "lat", "lon"), chunksizes=(10, 3, 4))
    with pytest.raises(CallerError, match=r"'x\.nc' claims 1,000,000,000 maps"):
        NetCdf(str(tmp_path / "x.nc"), "t").open()


def test_without_the_package_the_caller_is_told_what_to_install(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "netCDF4", None)
    for opener in (NetCdf(str(file)), DATASETS["navy_winds"](), DATASETS["upper_winds"]()):
        with pytest.raises(CallerError, match=r"pip install 'nfscale\[climate\]'"):
            opener.open()


def test_maps_are_encoded_verified_and_decoded_in_their_unit(tmp_path, file):
    """One month is missing, another holds a value that the file does not declare: rows with a reason."""
    with netcdf4.Dataset(file, "a") as opened:
        opened["t"][0, 1] = -999
        opened["t"][0, 2, 0, 0] = 1e38
        opened["t"][1, 0, 4:, :7] = -999
    job = tiny_job(
        tmp_path / "run",
        dataset={"kind": "netcdf", "path": str(file), "variable": "t", "label_from": "month"},
        signal={"kind": "sphere", "holdout": 5},
        field={"kind": "mlp", "width": 16, "depth": 2, "omega_0": 10},
        max_failed_fraction=0.5,
    )
    folder, summary = encode_in_process(job)
    table = open_weights(tmp_path / "run")
    rows = table.to_arrow(["datum_id", "label", "status", "reason", "metrics", "quality_heldout"]).to_pylist()
    assert summary.counts["decode_error"] == 2
    assert rows[1]["reason"] == "all values of the map are missing"
    assert "a missing value that the file does not declare" in rows[2]["reason"]
    assert [row["label"] for row in rows[:5]] == [11, 12, 1, 2, 3]
    fitted = [dict(row["metrics"]) for row in rows if row["status"] != "decode_error"]
    assert len(fitted) == 8
    assert all(metrics["rmse"] > 0 for metrics in fitted)
    assert dict(rows[5]["metrics"])["missing_fraction"] == pytest.approx(35 / 108)
    assert all(row["quality_heldout"] is not None for row in rows if row["status"] != "decode_error")
    assert not verify(folder).mismatches
    (decoded,) = table.decode(["era5/t/0000-0000"])
    assert (decoded.units, decoded.names) == (("K",), ("t",))
    assert np.array_equal(decoded.latitude, LATITUDE)
    assert np.array_equal(decoded.longitude, LONGITUDE)
    assert table.decode(["era5/t/0000-0000"], shape=(18, 36))[0].values.shape == (18, 36, 1)


def test_a_folder_may_hold_images_of_the_globe_beside_netcdf(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "globe.png")
    write(tmp_path / "one.nc", ["t"])
    (tmp_path / "cut.png").write_bytes((tmp_path / "globe.png").read_bytes()[:60])
    dataset = DATASETS["folder"](str(tmp_path), modality="sphere").open()
    errors = [datum.error for datum in map(dataset.read, range(3))]
    assert list(dataset.ids) == ["cut.png", "globe.png", "one.nc"]
    assert errors[1] is None
    assert "holds several maps (10 of 't')" in errors[2]
    assert errors[0]
    np.testing.assert_allclose(dataset.read(1).content.values, pixels / 255, atol=1e-6)


# --- the shipped sets


@pytest.mark.parametrize(
    ("kind", "count", "names", "first"),
    [("navy_winds", 132, ("UWND", "VWND"), "1982-01"), ("upper_winds", 12, ("uwnd", "vwnd"), "01")],
)
def test_the_winds_are_whole(kind, count, names, first):
    try:
        dataset = DATASETS[kind]().open()
    except CallerError as error:
        pytest.skip(str(error))
    assert len(set(dataset.ids)) == len(dataset.ids) == count
    assert dataset.ids[0] == first
    for position in range(0, count, 11):
        datum = dataset.read(position)
        content = datum.content
        assert (datum.id, datum.index, datum.label) == (dataset.ids[position], position, position % 12 + 1)
        assert (content.values.shape, content.names) == ((73, 144, 2), names)
        assert np.isfinite(content.values).all()
        assert 5 < np.abs(content.values).max() < 100
        assert sorted(np.abs(content.latitude[[0, -1]]).tolist()) == [90, 90]
    if kind == "navy_winds":
        assert [dataset.read(position).split for position in (0, 107, 108, 131)] == ["train", "train", "test", "test"]


def test_the_job_that_ships_is_valid():
    for kind in ("navy_winds", "upper_winds"):
        job = load_job(JOBS / "climate.yaml", [f"dataset.kind={kind}"])
        assert (job.dataset.kind, job.signal.kind) == (kind, "sphere")
        assert job.needs_calibration
