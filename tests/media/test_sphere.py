"""Files of maps: NetCDF and equirectangular images in, NetCDF and PNG out, pictures; and files that lie."""

import io
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfscale.media import MEDIA, netcdf
from nfscale.media.base import nothing_beside
from nfscale.media.sphere import SphereMedium, coloured
from nfscale.signals import Sphere, SphereMap
from tests.media.pages import no_other_shape

netcdf4 = pytest.importorskip("netCDF4")

RNG = np.random.default_rng(0)
LATITUDE, LONGITUDE = np.array([60.0, 20, -20, -60]), np.array([20.0, 80, 140, 200, 260, 320])
VALUES = RNG.normal(size=(4, 6)).astype(np.float32)
MEDIUM = SphereMedium()


def netcdf_bytes(fill, format: str = "NETCDF4") -> bytes:
    """What `fill` writes into a new file."""
    with tempfile.TemporaryDirectory() as folder:
        with netcdf4.Dataset(f"{folder}/x.nc", "w", format=format) as file:
            fill(file)
        return Path(folder, "x.nc").read_bytes()


def axes_of(file, latitude=LATITUDE, longitude=LONGITUDE, **attributes) -> None:
    for name, values, unit in (("y", latitude, "degrees_north"), ("x", longitude, "degrees_east")):
        file.createDimension(name, len(values))
        file.createVariable(name, "f8", (name,))[:] = values
        file[name].setncatts(attributes.get(name, {"units": unit}))


def variable_of(file, dimensions=("y", "x"), values=VALUES, kind="f4", name="t", fill_value=None, **attributes) -> None:
    variable = file.createVariable(name, kind, dimensions, fill_value=fill_value)
    variable.set_auto_maskandscale(False)
    variable.setncatts({"units": "K"} | attributes)
    variable[:] = values


def simple(format: str = "NETCDF4", **keys) -> bytes:
    def fill(file):
        axes_of(file)
        variable_of(file, **keys)

    return netcdf_bytes(fill, format)


def read(content: bytes, name: str = "x.nc") -> SphereMap:
    return MEDIUM.read(io.BytesIO(content), name, nothing_beside)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


# --- NetCDF in


@pytest.mark.parametrize("format", ["NETCDF4", "NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"])
def test_a_map_is_read_with_its_axes_names_and_unit(format):
    found = read(simple(format))
    assert (found.names, found.units) == (("t",), ("K",))
    assert np.array_equal(found.values[..., 0], VALUES)
    assert found.values.dtype == np.float32
    assert np.array_equal(found.latitude, LATITUDE)
    assert np.array_equal(found.longitude, LONGITUDE)


def test_a_classic_file_that_scipy_wrote_is_read(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    with scipy_io.netcdf_file(tmp_path / "x.nc", "w") as file:
        file.createDimension("time", None)
        for name, values, unit in (("lat", LATITUDE, b"degrees_north"), ("lon", LONGITUDE, b"degrees_east")):
            file.createDimension(name, len(values))
            file.createVariable(name, "f8", (name,))[:] = values
            file.variables[name].units = unit
        file.createVariable("t", "f4", ("time", "lat", "lon"))[:] = VALUES[None]
        file.createVariable("n", "i2", ("time",))[:] = np.array([7], np.int16)
    assert np.array_equal(read((tmp_path / "x.nc").read_bytes()).values[..., 0], VALUES)


def test_packed_and_missing_values_are_those_the_attributes_say():
    packed = np.arange(24, dtype=np.int16).reshape(4, 6)
    found = read(simple(values=packed, kind="i2", fill_value=7, scale_factor=0.5, add_offset=270.0, valid_max=20))
    expected = packed * 0.5 + 270
    expected[(packed == 7) | (packed > 20)] = np.nan
    np.testing.assert_array_equal(found.values[..., 0], expected)
    values = VALUES.copy()
    values[1, 2], values[2, 2] = -1e34, -99.9
    found = read(simple(values=values, missing_value=np.float32(-1e34)))
    assert np.isnan(found.values).sum() == 1
    with netcdf_file(simple(values=values, missing_value=np.float32(-1e34))) as file:
        assert np.isnan(file.read(file.require(["t"]), 0, missing=-99.9).values).sum() == 2


class netcdf_file:  # noqa: N801 (used as a function)
    def __init__(self, content: bytes) -> None:
        self.file = netcdf.MapFile(content)

    def __enter__(self) -> netcdf.MapFile:
        return self.file

    def __exit__(self, *_) -> None:
        self.file.close()


@pytest.mark.parametrize(
    "attributes",
    [
        {
            "y": {"units": "degrees", "standard_name": "latitude"},
            "x": {"units": "degrees", "standard_name": "longitude"},
        },
        {"y": {"units": "degrees", "axis": "Y"}, "x": {"units": "degrees", "axis": "X"}},
        {"y": {"units": "degree_N"}, "x": {"units": "degreesE"}},
    ],
)
def test_axes_are_found_by_what_is_said_of_them(attributes):
    def fill(file):
        axes_of(file, **attributes)
        file.createDimension("one", 1)
        variable_of(file, ("x", "one", "y"), VALUES.T[:, None])

    found = read(netcdf_bytes(fill))
    assert np.array_equal(found.values[..., 0], VALUES)
    assert found.values.flags.c_contiguous


def test_axes_may_be_named_by_other_variables():
    def fill(file):
        axes_of(file, y={"units": "1"}, x={"units": "1"})
        for name, along in (("lat", "y"), ("lon", "x")):
            file.createVariable(name, "f4", (along,))[:] = file[along][:] / 2
        variable_of(file)

    assert np.array_equal(read(netcdf_bytes(fill)).latitude, LATITUDE / 2)


def test_months_are_those_of_the_time_axis():
    def fill(file, units="days since 2000-12-01", calendar="noleap"):
        axes_of(file)
        for name, count in (("level", 2), ("time", 4)):
            file.createDimension(name, count)
            file.createVariable(name, "f8", (name,))[:] = 31 * np.arange(count)
        file["time"].setncatts({"units": units, "calendar": calendar})
        variable_of(file, ("level", "time", "y", "x"), np.zeros((2, 4, 4, 6)))

    def months(**keys):
        with netcdf_file(netcdf_bytes(lambda file: fill(file, **keys))) as file:
            return file.months(file.planes["t"])

    assert months() == (1, [12, 1, 2, 3])
    assert months(units="hours since 0000-01-01", calendar="standard") == (1, [1, 1, 1, 1])
    assert months(units="moons since ever") is None
    assert months(units="K") is None


# --- NetCDF that lies


def sparse(file) -> None:
    for name, unit in (("y", "degrees_north"), ("x", "degrees_east")):
        file.createDimension(name, 10**6)
        file.createVariable(name, "f4", (name,), chunksizes=(1000,)).setncatts({"units": unit})
    file.createVariable("t", "f4", ("y", "x"), chunksizes=(100, 100))


def one_huge_piece(file) -> None:
    axes_of(file)
    file.createDimension("time", 10**9)
    file.createVariable("t", "f4", ("time", "y", "x"), chunksizes=(2 * 10**7, 4, 6), compression="zlib")


def several(file) -> None:
    axes_of(file)
    file.createDimension("time", 3)
    variable_of(file, ("time", "y", "x"), np.zeros((3, 4, 6)))


def without_rows(file) -> None:
    axes_of(file, y={"units": "m"})
    variable_of(file)


def rotated(file) -> None:
    axes_of(file, y={"units": "degrees", "standard_name": "grid_latitude"})
    variable_of(file)


def strings(file) -> None:
    axes_of(file)
    file.createVariable("t", str, ("y", "x"))[0, 0] = "warm"


def damaged() -> bytes:
    """A compressed variable of which a byte is another."""

    def fill(file):
        axes_of(file)
        file.createVariable("t", "f4", ("y", "x"), compression="zlib", complevel=4, shuffle=False)[:] = VALUES

    content = bytearray(netcdf_bytes(fill))
    at = content.find(zlib.compress(VALUES.tobytes(), 4)[:12])
    assert at > 0
    content[at + 4] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"Dear colleague,\n", "not a NetCDF file, or a damaged one"),
        (b"CDF\1", "ends within its header"),
        (b"CDF\1" + b"\0" * 4 + b"\0\0\0\x0b" + b"\0" * 20, "another list was expected"),
        (b"CDF\5" + b"\xff" * 200, "damaged"),
        (b"\x89HDF\r\n\x1a\n" + bytes(500), "not a NetCDF file"),
        (simple()[:-500], "not a NetCDF file"),
        (simple("NETCDF3_CLASSIC")[:-8], r"the file is truncated: it has \d+ bytes, its header says at least \d+"),
        (netcdf_bytes(sparse), "too large: a map of 1000000 x 1000000 cells"),
        (netcdf_bytes(several), r"holds several maps \(3 of 't'\); dataset.kind=netcdf"),
        (netcdf_bytes(without_rows), "no variable has both latitude and longitude"),
        (netcdf_bytes(rotated), "no variable has both latitude and longitude"),
        (netcdf_bytes(strings), "no variable has both latitude and longitude"),
        (netcdf_bytes(lambda file: None), "no variable has both"),
    ],
)
def test_a_file_that_holds_no_map_is_refused(content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_a_damaged_or_huge_piece_is_refused():
    with pytest.raises(ValueError, match=r"cannot be read from the file"):
        read(damaged())
    with (
        netcdf_file(netcdf_bytes(one_huge_piece)) as file,
        pytest.raises(ValueError, match="stored in pieces of more than"),
    ):
        file.read(file.require(["t"]), 0)


@pytest.mark.parametrize("format", ["NETCDF3_CLASSIC", "NETCDF3_64BIT_DATA"])
def test_a_classic_file_cut_anywhere_is_never_read_as_zeros(format):
    def fill(file):
        axes_of(file)
        file.createDimension("time", None)
        variable_of(file, ("time", "y", "x"), VALUES[None])
        variable_of(file, ("time",), np.array([3], np.int16), "i2", "n")

    whole = netcdf_bytes(fill, format)
    assert np.array_equal(read(whole).values[..., 0], VALUES)
    for length in range(len(whole) - 3):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            read(whole[:length])


def test_variables_that_are_no_maps_are_named():
    def fill(file):
        axes_of(file)
        file.createDimension("time", 2)
        variable_of(file)
        variable_of(file, ("time", "y", "x"), np.zeros((2, 4, 6)), name="later")

    with netcdf_file(netcdf_bytes(fill)) as file:
        for names, message in (
            (["snow"], "there is no variable 'snow'; variables with latitude and longitude are 'later', 't'"),
            (["y"], r"the variable 'y' is no map: .* its dimensions \['y'\]"),
            (["t", "later"], "'t' has the dimensions .* and 'later'"),
        ):
            with pytest.raises(ValueError, match=message):
                file.require(names)


# --- NetCDF out


def test_what_is_written_is_read_back_with_cf_attributes(tmp_path):
    given = SphereMap(
        RNG.random((4, 6, 3)).astype(np.float32), LATITUDE, LONGITUDE, ("t", "2 m/../t", "t"), ("K", "m s-1", "1")
    )
    MEDIUM.write(given, tmp_path / "x.nc")
    with netcdf4.Dataset(tmp_path / "x.nc") as file:
        assert file.Conventions == "CF-1.8"
        assert list(file.variables) == ["lat", "lon", "t", "v_2_m____t", "t_"]
        assert (file["lat"].units, file["lon"].standard_name) == ("degrees_north", "longitude")
        assert [file[name].units for name in list(file.variables)[2:]] == ["K", "m s-1", "1"]
    with netcdf_file((tmp_path / "x.nc").read_bytes()) as file:
        found = file.read(file.require(["t", "v_2_m____t", "t_"]), 0)
    assert np.array_equal(found.values, given.values)
    assert np.array_equal(found.longitude, LONGITUDE)
    with pytest.raises(OSError, match=r"\w"):
        MEDIUM.write(given, tmp_path / "absent" / "x.nc")


def test_a_map_without_names_is_written_with_some(tmp_path):
    for channels in (1, 2):
        MEDIUM.write(SphereMap(np.ones((4, 6, channels), np.float32), LATITUDE, LONGITUDE), tmp_path / "x.nc")
        with netcdf4.Dataset(tmp_path / "x.nc") as file:
            assert list(file.variables)[2:] == [["value"], ["value_0", "value_1"]][channels - 1]


def test_a_file_goes_through_samples_into_a_file(tmp_path):
    given = read(simple(values=VALUES))
    signal = Sphere(**Sphere.settled({}, [given]))
    samples, wanted = signal.samples(given), signal.coordinates(signal.shape_of(signal.measures(given)))
    place = [int((samples.coordinates == at).all(dim=1).nonzero()[0, 0]) for at in wanted]
    (rebuilt,) = signal.reconstruct(samples.values[place][None], signal.shape_of(signal.measures(given)))
    MEDIUM.write(rebuilt, tmp_path / "x.nc")
    again = read((tmp_path / "x.nc").read_bytes())
    np.testing.assert_allclose(again.values, given.values, atol=1e-6)
    assert (again.names, again.units) == (("t",), ("K",))
    assert np.array_equal(again.latitude, given.latitude)
    assert np.array_equal(again.longitude, given.longitude)


# --- images


def test_an_image_is_a_map_from_pole_to_pole_and_all_around():
    pixels = RNG.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    found = read(png(pixels), "x.png")
    assert (found.latitude[0], found.longitude[0]) == (67.5, -157.5)
    np.testing.assert_allclose(found.values, pixels / 255, atol=1e-6)
    assert (found.names, found.ranges) == (("red", "green", "blue"), ((0.0, 1.0),) * 3)
    deep = RNG.integers(0, 65536, (4, 8), dtype=np.uint16)
    np.testing.assert_allclose(read(png(deep), "x.png").values[..., 0], deep / 65535, atol=1e-6)
    clear = np.dstack([pixels, np.full((4, 8), 255, np.uint8)])
    clear[1, 2, 3] = 0
    missing = np.isnan(read(png(clear), "x.png").values)
    assert missing.sum() == 3
    assert missing[1, 2].all()
    with pytest.raises(ValueError, match="not an image"):
        read(b"no", "x.png")
    assert read(simple(), "a cell without a suffix").names == ("t",)


def test_a_map_is_written_as_an_image_and_read_back(tmp_path):
    """South first and from 20 degrees east on: the picture is turned to north and -180 degrees."""
    width = 8
    longitude = 22.5 + 45 * np.arange(width)
    values = RNG.random((4, width, 3)).astype(np.float32)
    given = SphereMap(values, np.array([-67.5, -22.5, 22.5, 67.5]), longitude, ranges=((0.0, 1.0),) * 3)
    MEDIUM.write(given, tmp_path / "x.png")
    found = read((tmp_path / "x.png").read_bytes(), "x.png")
    for row, latitude in enumerate(found.latitude):
        for column, east in enumerate(found.longitude):
            same = np.argmin(abs(given.latitude - latitude)), np.argmin(abs((longitude - east + 180) % 360 - 180))
            np.testing.assert_allclose(found.values[row, column], values[same], atol=0.003)


def test_one_channel_is_coloured_within_the_range_of_the_run():
    given = SphereMap(np.array([[[0.0], [5], [np.nan]]], np.float32), np.array([0.0]), np.array([0.0, 1, 2]))
    picture = coloured(SphereMap(given.values, given.latitude, given.longitude, ranges=((0.0, 5.0),)))
    assert picture.shape == (1, 3, 4)
    assert picture[0, 0].tolist() == [68, 1, 84, 255]  # viridis at its ends
    assert picture[0, 1].tolist() == [253, 231, 36, 255]
    assert picture[0, 2, 3] == 0
    assert coloured(given).shape == (1, 3, 4)
    both = SphereMap(np.ones((4, 6, 2), np.float32), LATITUDE, LONGITUDE, ranges=((-1.0, 1.0),) * 2)
    assert coloured(both).shape == (8, 6, 4)


# --- what a page shows


def run_maps(channels: int = 1) -> tuple[SphereMap, SphereMap]:
    keys = (("a", "b")[:channels], ("K", "m")[:channels], ((0.0, 1.0),) * channels)
    values = RNG.random((18, 36, channels)).astype(np.float32)
    axes = np.linspace(-85, 85, 18), np.arange(25.0, 385, 10)
    gaps = values.copy()
    gaps[:9, :18] = np.nan
    return SphereMap(gaps, *axes, *keys), SphereMap(values + np.float32(0.1), *axes, *keys)


def test_rmse_is_in_the_unit_and_weighted_by_area():
    original, rebuilt = run_maps()
    assert MEDIUM.measures(original, rebuilt) == {"rmse": pytest.approx(0.1, rel=1e-5)}
    values = original.values.copy()
    values[0, 18:] += 3  # of the southernmost row, half of which is missing
    zone = 1 - np.sin(np.deg2rad(80))
    there = zone / 2 + (1 - zone) / 2 + 1
    wrong = SphereMap(values, original.latitude, original.longitude, original.names, original.units, original.ranges)
    expected = 3 * np.sqrt(zone / 2 / there)
    assert MEDIUM.measures(original, wrong)["rmse"] == pytest.approx(expected, rel=1e-5)
    assert list(MEDIUM.measures(*run_maps(2))) == ["rmse_a", "rmse_b"]
    other = SphereMap(rebuilt.values, original.latitude + 1, original.longitude)
    assert MEDIUM.measures(original, other) == {}
    assert MEDIUM.measurable(original)


@pytest.mark.parametrize("channels", [1, 2])
def test_panels_are_maps_with_a_scale(channels):
    original, rebuilt = run_maps(channels)
    panels = MEDIUM.panels(original, rebuilt, no_other_shape)
    assert [panel.mime for panel in panels] == ["image/png"] * 3
    assert panels[2].caption == "rebuilt - original, RMSE 0.1 K" + (", 0.1 m" if channels == 2 else "")
    for panel in panels:
        picture = np.asarray(Image.open(io.BytesIO(panel.content)).convert("RGBA"))
        assert picture[0, 0, 3] == 0, "the page shows through"
        assert max(picture.shape) < 1000
        grey = (picture == [0x8A, 0x8A, 0x8A, 255]).all(axis=2)
        assert 0.1 < grey.mean() * 4 < 1, "a quarter of the map is missing, in each of the three"
    other = SphereMap(rebuilt.values, rebuilt.latitude / 2, rebuilt.longitude, *(None, None, rebuilt.ranges))
    assert len(MEDIUM.panels(original, other, no_other_shape)) == 2


def test_the_medium_is_listed():
    assert isinstance(MEDIA["sphere"], SphereMedium)
    assert Path("x.NC").suffix.lower() in MEDIA["sphere"].suffixes
