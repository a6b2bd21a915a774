"""Levels as channels and time as a coordinate: files as climate centres write them from GRIB, read and decoded to."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nfscale.cli.decode import decode
from nfscale.datasets.netcdf import NetCdf
from nfscale.errors import CallerError
from nfscale.review.report import make_report
from nfscale.signals import Sphere
from nfscale.store import open_weights
from nfscale.verify import verify
from tests.jobs import encode_in_process, tiny_job

netcdf4 = pytest.importorskip("netCDF4")

LATITUDE, LONGITUDE = np.linspace(90, -90, 13), np.arange(0.0, 360, 20)
LEVELS = np.array([850.0, 500.0])
HOURS = 1025640 + 6 * np.arange(5)
"""In the unit of reanalyses; times as large as these are more than float32 tells apart by seconds."""
NORTH, EAST = np.deg2rad(LATITUDE)[:, None], np.deg2rad(LONGITUDE) + np.linspace(0, 2, 5)[:, None, None, None]
HEIGHT = LEVELS[:, None, None]
VALUES = {
    "t": 250 + 0.02 * HEIGHT + 30 * np.cos(NORTH) * np.sin(EAST),
    "z": 5e4 - 40.0 * HEIGHT + 2e3 * np.sin(NORTH) * np.cos(EAST),
}
"""[time, level, latitude, longitude] each."""
UNITS = {"t": "K", "z": "m**2 s**-2"}
SINCE = "hours since 1900-01-01 00:00:00.0"
STYLES = {
    "grib_to_netcdf": ("time", "level", "millibars", "gregorian"),
    "cfgrib": ("time", "isobaricInhPa", "hPa", "proleptic_gregorian"),
    "climate data store": ("valid_time", "pressure_level", "hPa", "proleptic_gregorian"),
}


def write(path: Path, style: str = "grib_to_netcdf", hours=HOURS, members: int = 0, since: str = SINCE) -> Path:
    """t and z, packed into 16 bits with a scale and an offset, with a missing cell, GRIB's keys as attributes."""
    time, level, pressure, calendar = STYLES[style]
    is_classic = style == "grib_to_netcdf"
    with netcdf4.Dataset(path, "w", format="NETCDF3_64BIT_OFFSET" if is_classic else "NETCDF4") as file:
        axes = [
            (time, "i4" if is_classic else "i8", hours, {"units": since, "calendar": calendar}),
            (level, "i4" if is_classic else "f8", LEVELS, {"units": pressure, "long_name": "pressure_level"}),
            ("latitude", "f4", LATITUDE, {"units": "degrees_north"}),
            ("longitude", "f4", LONGITUDE, {"units": "degrees_east"}),
        ]
        if members:
            axes.insert(0, ("number", "i4", np.arange(members), {"long_name": "ensemble_member"}))
        for name, kind, values, attributes in axes:
            file.createDimension(name, len(values))
            file.createVariable(name, kind, (name,))[:] = values
            file[name].setncatts(attributes)
        if style == "climate data store":
            file.createVariable("expver", str, (time,))[:] = np.array(["0001"] * len(hours), dtype=object)
        for name, values in VALUES.items():
            variable = file.createVariable(name, "i2", [axis[0] for axis in axes], fill_value=-32767)
            variable.setncatts({"units": UNITS[name], "GRIB_paramId": 130, "GRIB_typeOfLevel": "isobaricInhPa"})
            packing = {"scale_factor": np.ptp(values) / 65000, "add_offset": (values.min() + values.max()) / 2}
            variable.setncatts(packing | {"missing_value": np.int16(-32767)})
            kept = np.ma.array(values[: len(hours)])
            kept[1, 0, 2, 3] = np.ma.masked
            variable[:] = np.ma.stack([kept + n for n in range(members)]) if members else kept
    return path


def datum(path: Path, position: int = 0, **keys):
    found = NetCdf(str(path), ["t", "z"], **keys).open().read(position)
    assert found.error is None, found.error
    return found.content


@pytest.mark.parametrize("style", list(STYLES))
def test_levels_become_channels_and_times_one_datum(tmp_path, style):
    dataset = NetCdf(str(write(tmp_path / "era.nc", style)), ["t", "z"], time="coordinate", levels="channels").open()
    assert list(dataset.ids) == ["era/t+z"]
    content = dataset.read(0).content
    assert content.values.shape == (5, 13, 18, 4)
    assert content.names == ("t_850", "t_500", "z_850", "z_500")
    assert content.units == ("K", "K", "m**2 s**-2", "m**2 s**-2")
    for channel, (name, place) in enumerate((("t", 0), ("t", 1), ("z", 0), ("z", 1))):
        there = ~np.isnan(content.values[..., channel])
        assert (~there).sum() == (place == 0)
        step = np.ptp(VALUES[name]) / 65000
        np.testing.assert_allclose(content.values[..., channel][there], VALUES[name][:, place][there], atol=step)
    assert np.array_equal(content.times, HOURS)
    assert np.array_equal(content.latitude, LATITUDE.astype(np.float32))
    assert (content.origin.time, content.origin.level) == STYLES[style][:2]
    assert content.origin.levels == (850, 500, 850, 500)


def test_members_times_and_levels_are_data_where_they_are_not_asked_together(tmp_path):
    path = write(tmp_path / "era.nc", members=3)
    for keys, count, shape in (
        ({}, 30, (13, 18, 2)),
        ({"levels": "channels"}, 15, (13, 18, 4)),
        ({"time": "coordinate"}, 6, (5, 13, 18, 2)),
        ({"time": "coordinate", "levels": "channels"}, 3, (5, 13, 18, 4)),
    ):
        dataset = NetCdf(str(path), ["t", "z"], **keys).open()
        assert len(dataset.ids) == count
        assert dataset.read(count - 1).content.values.shape == shape
    assert list(dataset.ids) == ["era/t+z/0000", "era/t+z/0001", "era/t+z/0002"]
    np.testing.assert_allclose(dataset.read(2).content.values[0, 0, 0, 0] - VALUES["t"][0, 0, 0, 0], 2, atol=0.01)


def test_samples_are_of_unit_vectors_and_time(tmp_path):
    content = datum(write(tmp_path / "era.nc"), time="coordinate", levels="channels")
    signal = Sphere(**Sphere.settled({"channels": "auto"}, [content]))
    assert (signal.dimensions, signal.channels, signal.time_span) == (4, 4, (HOURS[0], HOURS[-1]))
    samples = signal.samples(content)
    assert samples.coordinates.shape == (5 * 13 * 18, 4)
    torch.testing.assert_close(samples.coordinates[:, :3].norm(dim=1), torch.ones(5 * 13 * 18))
    assert sorted(set(samples.coordinates[:, 3].tolist())) == [-1, -0.5, 0, 0.5, 1]
    moves = (samples.coordinates[1:, :3] != samples.coordinates[:-1, :3]).any(dim=1).sum()
    assert moves < 13 * 18, "a cell at all times, then the next"
    at = samples.coordinates.numpy()
    vectors, times = signal.coordinates(signal.shape_of(signal.measures(content))).numpy(), samples.values.numpy()
    rows = {tuple(np.round(row, 5)): n for n, row in enumerate(vectors)}
    flat = content.values.reshape(-1, 4)
    low, high = np.array(signal.ranges).T
    for sample in np.flatnonzero(np.abs(at[:, 2]) < 0.9)[::37]:  # at a pole all longitudes are one place
        expected = (flat[rows[tuple(np.round(at[sample], 5))]] - low) / (high - low) - 0.5
        np.testing.assert_allclose(times[sample], expected, atol=1e-5)
    later = datum(write(tmp_path / "later.nc", hours=HOURS + 3), time="coordinate", levels="channels")
    with pytest.raises(ValueError, match=r"signal\.time_span=\[first, last\] sets them"):
        signal.samples(later)
    other = datum(write(tmp_path / "other.nc", since="days since 1900-01-01"), time="coordinate", levels="channels")
    with pytest.raises(ValueError, match="the map's times are in 'days since 1900-01-01'"):
        signal.samples(other)
    with pytest.raises(ValueError, match="no times, unlike this run's"):
        signal.samples(datum(tmp_path / "era.nc", levels="channels"))


@pytest.mark.parametrize("style", ["grib_to_netcdf", "climate data store"])
def test_a_run_decodes_to_a_file_with_everything_named_as_it_came(tmp_path, style):
    path = write(tmp_path / "era.nc", style, members=2)
    dataset = {"kind": "netcdf", "path": str(path), "variable": ["t", "z"], "time": "coordinate", "levels": "channels"}
    overrides = ("fit.samples=64", "optimizer.calibration_data=2", "fit.max_steps=200", "field.omega_0=5")
    folder, _ = encode_in_process(tiny_job(tmp_path / "run", *overrides, dataset=dataset, signal={"kind": "sphere"}))
    assert not verify(folder).mismatches
    assert make_report(folder)["fields"] == 2
    time, level, pressure, calendar = STYLES[style]
    for shape, hours in ((None, HOURS), ("9x26x36", np.linspace(HOURS[0], HOURS[-1], 9)), ("1x4x8", [HOURS.mean()])):
        (decoded,) = open_weights(str(folder)).decode(["era/t+z/0001"], shape)
        np.testing.assert_allclose(decoded.times, hours)
        decode(str(folder), "era/t+z/0001", tmp_path / "out.nc", shape)
        with netcdf4.Dataset(tmp_path / "out.nc") as file:
            assert file["t"].dimensions == file["z"].dimensions == (time, level, "latitude", "longitude")
            assert (file[time].units, file[time].calendar, file[level].units) == (SINCE, calendar, pressure)
            np.testing.assert_allclose(file[time][:], hours)
            assert np.array_equal(file[level][:], LEVELS)
            assert (file["t"].units, file["z"].units) == ("K", "m**2 s**-2")
            np.testing.assert_allclose(file["z"][:, 1], decoded.values[..., 3])
            if shape is None:
                assert np.abs(file["t"][:] - VALUES["t"] - 1).mean() < 3
    decode(str(folder), "era/t+z/0001", tmp_path / "out.png", None)
    with pytest.raises(CallerError, match="rows x columns"):
        decode(str(folder), "era/t+z/0001", tmp_path / "out.nc", "4x5x6x7")


def damaged(path: Path, name: str) -> Path:
    with netcdf4.Dataset(path, "a") as file:
        if name == "times descend":
            file["time"][:] = HOURS[::-1]
        elif name == "a time is missing":
            file["time"][2] = netcdf4.default_fillvals["i4"]
        elif name == "a scale that is no number":
            file["t"].scale_factor = "many"
        elif name == "values beyond all units":
            file["t"].scale_factor = 1e300
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("times descend", "the times do not ascend"),
        ("a time is missing", "the times hold NaN"),
        ("values beyond all units", "far from the range|infinite|missing value"),
        ("cut off", "ends early|shorter|truncated|its header"),
        ("no levels", "has no axis of levels"),
        ("no times", "has no axis of times"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_row_with_a_reason(tmp_path, name, reason):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "good.nc")
    bad = write(tmp_path / "data" / "bad.nc")
    if name == "cut off":
        bad.write_bytes(bad.read_bytes()[:-100])
    elif name in ("no levels", "no times"):
        axes = [("latitude", LATITUDE, "degrees_north"), ("longitude", LONGITUDE, "degrees_east")]
        axes.insert(0, ("time", [1, 2], "days since 2000-01-01") if name == "no levels" else ("level", [1, 2], "hPa"))
        with netcdf4.Dataset(bad, "w") as file:
            for axis, values, unit in axes:
                file.createDimension(axis, len(values))
                file.createVariable(axis, "f8", (axis,))[:] = values
                file[axis].units = unit
            for one in ("t", "z"):
                file.createVariable(one, "f4", [axis[0] for axis in axes])[:] = 1.0
    else:
        damaged(bad, name)
    dataset = {
        "kind": "netcdf",
        "path": str(tmp_path / "data"),
        "variable": ["t", "z"],
        "time": "coordinate",
        "levels": "channels",
    }
    sections = {"dataset": dataset, "signal": {"kind": "sphere"}, "max_failed_fraction": 0.6}
    job = tiny_job(tmp_path / "run", "fit.samples=64", "optimizer.calibration_data=1", "fit.max_steps=20", **sections)
    folder, _ = encode_in_process(job)
    rows = open_weights(str(folder)).to_arrow(["datum_id", "status", "reason"]).to_pylist()
    (failed,) = [row for row in rows if row["status"] == "decode_error"]
    assert failed["datum_id"].startswith("bad")
    assert any(part in failed["reason"] for part in reason.split("|")), failed["reason"]
    assert len(rows) == 2
