"""Hostile files: each is fitted or a row with a reason, none is an exception, none costs a neighbour."""

import io
import os
import re
import socket
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from nfscale.datasets.folder import Folder
from nfscale.errors import CallerError
from nfscale.hostile import escaped
from nfscale.media.image import read_image
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job, tiny_settings

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
RGB = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
SHAPE = (6, 9)
"""Of images whose orientation matters: height and width differ."""


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(array: np.ndarray, format: str = "PNG", **options) -> bytes:
    return encoded(Image.fromarray(array), format, **options)


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


def grey_png(width: int, height: int, pixels: bytes, **damage) -> bytes:
    """A PNG made by hand, of scan lines that are given as they are stored."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = bytearray(zlib.compress(pixels, damage.get("level", 9)))
    if damage.get("flip"):
        data[len(data) // 2] ^= 1
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", bytes(data), damage.get("crc")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


LINES = b"".join(b"\0" + bytes(row) for row in GREY)
FLOATS = RNG.random((8, 8)).astype(np.float32)
ANIMATED = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1].copy())]}
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def floats_with(value: float) -> bytes:
    spoiled = FLOATS.copy()
    spoiled[3, 4] = value
    return picture(spoiled, "TIFF")


GOOD = {
    "grey.png": picture(GREY),
    "grey-alpha.png": encoded(Image.fromarray(RGBA).convert("LA"), "PNG"),
    "rgb.png": picture(RGB),
    "rgba.png": picture(RGBA),
    "palette.png": encoded(Image.fromarray(RGB).convert("P"), "PNG"),
    "palette-transparent.png": encoded(Image.fromarray(RGB).convert("P"), "PNG", transparency=0),
    "one-bit.png": encoded(Image.fromarray(GREY).convert("1"), "PNG"),
    "cmyk.jpg": encoded(Image.frombytes("CMYK", (8, 8), RGBA.tobytes()), "JPEG"),
    "sixteen-bit.png": picture(GREY.astype(np.uint16) * 257),
    "sixteen-bit.tif": picture(GREY.astype(np.uint16) * 257, "TIFF"),
    "wide-integers-in-range.tif": picture(GREY.astype(np.int32), "TIFF"),
    "floats.tif": picture(FLOATS, "TIFF"),
    "lossless.webp": picture(RGB, "WEBP", lossless=True),
    "deflated.tif": picture(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "windows.bmp": picture(RGB, "BMP"),
    "plain.ppm": picture(RGB, "PPM"),
    "progressive.jpg": picture(RGB, "JPEG", progressive=True),
    "rotated.jpg": picture(RGB[: SHAPE[0], :5], "JPEG", exif=ROTATED),
    "damaged-exif.jpg": picture(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
    "animated.gif": picture(RGB, "GIF", **ANIMATED),
    "animated.png": picture(RGB, "PNG", **ANIMATED),
    "animated.webp": picture(RGB, "WEBP", lossless=True, **ANIMATED),
    "pages.tif": picture(RGB, "TIFF", **ANIMATED),
    "really-a-jpeg.png": picture(RGB, "JPEG"),
    "wrong-checksum.png": grey_png(8, 8, LINES, crc=1),
    "no-end.png": grey_png(8, 8, LINES)[:-12],
    "junk-behind.png": picture(RGB) + b"junk" * 100,
    "1x1.png": picture(GREY[:1, :1]),
    "1xN.png": picture(GREY[:1, :7]),
    "Nx1.png": picture(GREY[:7, :1]),
    "UPPER.PNG": picture(RGB),
    "with space.png": picture(RGB),
    "grüße-文字-🙂.png": picture(RGB),
    "new\nline.png": picture(RGB),
    "\x1b[31mred.png": picture(RGB),
    "'quotes\".png": picture(RGB),
    "-rf.png": picture(RGB),
    "back\\slash.png": picture(RGB),
    "$(touch hacked).png": picture(RGB),
    "long" * 60 + ".png": picture(RGB),
    "a/duplicate.png": picture(GREY),
    "b/duplicate.png": picture(GREY),
}

BAD = {
    "cut-01.png": picture(RGB)[:1],
    "cut-20.png": picture(RGB)[:20],
    "cut-half.png": picture(RGB)[:120],
    "cut-01.jpg": picture(RGB, "JPEG")[:2],
    "cut-20.jpg": picture(RGB, "JPEG")[:20],
    "cut-half.jpg": picture(RGB, "JPEG")[:-60],
    "cut-20.webp": picture(RGB, "WEBP")[:20],
    "cut-half.webp": picture(RGB, "WEBP", lossless=True)[:150],
    "cut-08.tif": picture(RGB, "TIFF")[:8],
    "cut-half.tif": picture(RGB, "TIFF")[:150],
    "cut-half.gif": picture(RGB, "GIF")[:90],
    "cut-half.bmp": picture(RGB, "BMP")[:100],
    "cut-half.ppm": picture(RGB, "PPM")[:100],
    "empty.png": b"",
    "empty.jpg": b"",
    "text.png": b"not an image",
    "page.png": b"<!doctype html><html><body>404 Not Found</body></html>",
    "zeros.png": bytes(len(picture(RGB))),
    "zeros.jpg": bytes(1000),
    "absurd-header.png": grey_png(2**31 - 1, 2**31 - 1, LINES),
    "larger-header.png": grey_png(64, 64, LINES),
    "no-pixels.png": grey_png(0, 8, b""),
    "bomb.png": grey_png(14_000, 14_000, bytes(14_000 * 14_001), level=1),  # a megabyte of 196 million pixels
    "small-bomb.png": grey_png(9_000, 9_000, b"\0"),
    "broken-stream.png": grey_png(8, 8, LINES, flip=True),
    "no-stream.png": grey_png(8, 8, LINES).replace(b"IDAT", b"iDAT"),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(hacked) print\n",
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'></svg>",
    "nan.tif": floats_with(np.nan),
    "infinite.tif": floats_with(np.inf),
    "floats-out-of-range.tif": floats_with(255.0),
    "wide-integers.tif": picture(np.full((8, 8), 1 << 20, dtype=np.int32), "TIFF"),
    "negative-integers.tif": picture(np.full((8, 8), -1, dtype=np.int32), "TIFF"),
}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def good(tmp_path):
    root = tmp_path / "good"
    write(root, GOOD)
    os.symlink("rgb.png", root / "link-inside.png")
    with suppress(OSError):  # some file systems refuse bytes that are no UTF-8
        (root / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(RGB))
    return root


def add_bad(root: Path) -> list[str]:
    """Put bad files of each kind into a folder; the ids that they are to have."""
    write(root, BAD)
    outside = root.parent / "outside"
    write(outside, {"secret.png": picture(RGB)})
    links = {
        "link-out.png": "../outside/secret.png",
        "link-absolute.png": str(outside / "secret.png"),
        "link-dead.png": "nowhere.png",
        "link-loop.png": "link-loop-2.png",
        "link-loop-2.png": "link-loop.png",
        "link-device.png": "/dev/zero",
        "link-up": "..",
        "link-folder-loop": ".",
    }
    for name, target in links.items():
        os.symlink(target, root / name)
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / "folder.png" / "cut.png").write_bytes(BAD["cut-20.png"])
    return [*BAD, *(name for name in links if name.endswith(".png")), "pipe.png", "folder.png/cut.png"]


def hostile_job(tmp_path, root, name, *overrides):
    # Width 16 and one shared draw: results are equal bit for bit. Every image becomes RGB.
    return tiny_job(
        tmp_path / name,
        *overrides,
        dataset={"kind": "folder", "path": str(root)},
        signal={"kind": "image", "channels": 3, "convert": "rgb"},
        fit={"max_steps": 20, "samples": 16, "check_every": 10},
    )


@pytest.mark.parametrize("overrides", [(), ("optimizer.kind=adam", "fit.samples=full")], ids=["esgd", "adam-full"])
def test_hostile_files_are_rows_and_cost_no_neighbour(tmp_path, good, overrides):
    clean, _ = encode_in_process(hostile_job(tmp_path, good, "clean", *overrides))
    clean_rows = {row["datum_id"]: row for row in open_weights(clean.files.path).to_arrow().to_pylist()}
    assert set(clean_rows) >= {escaped(name) for name in [*GOOD, "link-inside.png"]}
    assert len(clean_rows) == len([path for path in good.rglob("*") if path.is_file()])
    assert {name: row["reason"] for name, row in clean_rows.items() if row["status"] != "max_steps"} == {}

    bad = add_bad(good)
    assert len(GOOD) + len(bad) >= 80
    folder, summary = encode_in_process(hostile_job(tmp_path, good, "hostile", *overrides))
    rows = {row["datum_id"]: row for row in open_weights(folder.files.path).to_arrow().to_pylist()}
    assert set(rows) - set(clean_rows) == set(bad)
    assert summary.failed == len(bad)
    for name in bad:
        assert rows[name]["status"] == "decode_error", name
        reason = rows[name]["reason"]
        assert 5 < len(reason) <= 300, name
        assert reason.isprintable(), reason
        assert str(tmp_path) not in reason, reason
        assert " object at 0x" not in reason, reason
    if not overrides:  # what fields share is estimated on a sample of the data, which the bad ones do not enter
        assert folder.calibration()[2].tobytes() == clean.calibration()[2].tobytes()
    for name, row in clean_rows.items():
        assert rows[name]["weights"] == row["weights"], name
        assert rows[name]["quality"] == row["quality"], name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.png", "not an image, or an image format that cannot be read"),
        ("postscript.png", "not an image, or an image format that cannot be read"),
        ("cut-half.png", "truncated"),
        ("bomb.png", "too large: .*196000000 pixels"),
        ("small-bomb.png", "too large: 9000 x 9000 pixels"),
        ("link-out.png", "a link that leads out of the dataset's folder"),
        ("link-absolute.png", "a link that leads out of the dataset's folder"),
        ("link-device.png", "a link that leads out of the dataset's folder"),
        ("link-dead.png", "a link that leads nowhere"),
        ("link-loop.png", "a link that leads back to itself"),
        ("pipe.png", "not a regular file but a named pipe"),
        ("wide-integers.tif", "at most 16 bits are read"),
    ],
)
def test_reasons_say_what_is_wrong(good, name, reason):
    add_bad(good)
    dataset = Folder(str(good)).open()
    datum = dataset.read(list(dataset.ids).index(name))
    assert datum.content is None
    assert re.search(reason, datum.error)


def read(content: bytes) -> np.ndarray:
    return read_image(io.BytesIO(content))


def test_of_several_frames_the_first_is_taken():
    for name in ("animated.png", "animated.webp", "pages.tif"):
        assert (read(GOOD[name])[:, :, :3] == RGB).all(), name
    assert read(GOOD["animated.gif"]).shape[:2] == (8, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright_as_their_exif_says(format):
    tall = np.zeros((16, 8), dtype=np.uint8)
    tall[:8] = 255  # white above black once it stands
    stored = np.rot90(tall)  # a camera held sideways: orientation 6 says to turn it clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    array = read(encoded(Image.fromarray(stored).convert("RGB"), format, exif=exif))
    assert array.shape == (16, 8, 3)
    assert array[:6].min() > 240
    assert array[-6:].max() < 15


def test_every_mode_arrives_in_its_range():
    shapes = {name: (read(GOOD[name]).dtype.name, read(GOOD[name]).shape[2:]) for name in GOOD if "." in name}
    assert shapes["grey.png"] == ("uint8", ())
    assert shapes["grey-alpha.png"] == ("uint8", (2,))
    assert shapes["palette.png"] == ("uint8", (3,))
    assert shapes["palette-transparent.png"] == ("uint8", (4,))
    assert shapes["one-bit.png"] == ("bool", ())
    assert shapes["cmyk.jpg"] == ("uint8", (3,))
    assert shapes["sixteen-bit.png"] == shapes["sixteen-bit.tif"] == ("uint16", ())
    assert shapes["floats.tif"] == ("float32", ())


def test_ids_are_printable_utf8_and_unique(tmp_path):
    """Two names that a careless escape would make equal: a byte that is no UTF-8, and its escape spelt out."""
    names = [b"caf\xe9.png", rb"caf\xe9.png", b"caf\xc3\xa9.png", rb"caf\\xe9.png", b"a\nb.png", rb"a\u000ab.png"]
    try:
        for name in names:
            Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(picture(RGB))
    except OSError as error:  # some file systems refuse bytes that are no UTF-8
        pytest.skip(f"this file system does not take the names: {error.strerror}")
    dataset = Folder(str(tmp_path)).open()
    assert set(dataset.ids) == {
        r"caf\xe9.png",
        r"caf\\xe9.png",
        "café.png",
        r"caf\\\\xe9.png",
        r"a\u000ab.png",
        r"a\\u000ab.png",
    }
    assert all(datum_id.encode("utf-8").decode().isprintable() for datum_id in dataset.ids)
    assert all(dataset.read(position).content is not None for position in range(len(names)))


def test_labels_of_strange_folders_are_printable(tmp_path):
    write(tmp_path, {"a\tb/x.png": picture(RGB)})
    assert Folder(str(tmp_path), label_from="parent").open().read(0).label == r"a\u0009b"


def test_a_socket_is_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        assert Folder(".").open().read(0).error == "not a regular file but a socket"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_a_row(tmp_path):
    write(tmp_path, {"x.png": picture(RGB)})
    (tmp_path / "x.png").chmod(0)
    assert Folder(str(tmp_path)).open().read(0).error == "Permission denied"


def test_a_file_that_vanishes_after_the_listing_is_a_row(tmp_path):
    write(tmp_path, {"x.png": picture(RGB)})
    dataset = Folder(str(tmp_path)).open()
    assert dataset.read(0).content is not None
    (tmp_path / "x.png").unlink()
    assert "the file is gone" in dataset.read(0).error


def test_links_into_other_folders_of_the_root_are_followed(tmp_path):
    write(tmp_path, {"all/x.png": picture(RGB), "some/y.png": picture(GREY)})
    os.symlink("../all/x.png", tmp_path / "some" / "x.png")
    os.symlink(tmp_path, tmp_path.parent / f"{tmp_path.name}-link")
    dataset = Folder(str(tmp_path.parent / f"{tmp_path.name}-link")).open()
    assert [dataset.read(p).error for p in range(3)] == [None, None, None]
    inner = Folder(str(tmp_path / "some")).open()
    assert "out of the dataset's folder" in inner.read(list(inner.ids).index("x.png")).error


@pytest.mark.parametrize("pattern", ["../*.png", "/etc/*", "a/../../*", "", "**.png", "a**/x.png"])
def test_a_pattern_that_leaves_the_folder_is_the_callers_mistake(tmp_path, pattern):
    with pytest.raises(CallerError, match=r"dataset\.pattern"):
        Folder(str(tmp_path), pattern=pattern).open()


def outcome(content: bytes) -> str:
    try:
        return f"an array of {read(content).size} values"
    except ValueError as error:
        return str(error)


def test_no_damage_of_a_few_bytes_raises_anything_else():
    """Hundreds of damaged files of each format: an array, or ValueError with a sentence."""
    draw = np.random.default_rng(1)
    for name in (
        "rgb.png",
        "progressive.jpg",
        "lossless.webp",
        "deflated.tif",
        "floats.tif",
        "animated.gif",
        "windows.bmp",
    ):
        original = np.frombuffer(GOOD[name], dtype=np.uint8)
        for _ in range(300):
            damaged = original.copy()
            places = draw.integers(0, len(damaged), draw.integers(1, 6))
            damaged[places] = draw.integers(0, 256, len(places))
            said = outcome(damaged.tobytes()[: draw.integers(1, len(damaged) + 1)])
            assert 5 < len(said) <= 300
            assert said.isprintable()


@pytest.mark.parametrize(("allowed", "code"), [(0.1, 3), (0.9, 0)])
def test_the_exit_code_says_whether_more_failed_than_allowed(tmp_path, allowed, code):
    write(tmp_path / "images", {"a.png": picture(RGB), "b.png": picture(RGB), "bad.png": b"", "c.png": b"text"})
    settings = tiny_settings(tmp_path / "run", dataset={"kind": "folder", "path": "images"}) | {
        "max_failed_fraction": allowed,
        "optimizer": {"kind": "adam"},
        "track": {"enabled": False},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", "job.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == code, done.stderr
    assert ("2 of 4 data failed" in done.stderr) == (code == 3)
    assert open_weights(tmp_path / "run").to_arrow().num_rows == 4
