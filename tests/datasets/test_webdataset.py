"""Tars of samples: keys, labels, and tars that were made to do harm."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfscale.datasets import webdataset
from nfscale.datasets.webdataset import WebDataset
from nfscale.errors import CallerError
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job

RNG = np.random.default_rng(0)
PIXELS = [RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(6)]


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **header) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    return info, content


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return path


def sample(index: int, extension: str = "png") -> list[tuple[tarfile.TarInfo, bytes]]:
    about = json.dumps({"name": f"n{index}", "number": index}).encode()
    return [
        member(f"{index:03d}.cls", str(index % 3).encode()),
        member(f"{index:03d}.json", about),
        member(f"{index:03d}.{extension}", png(index)),
    ]


@pytest.fixture
def shards(tmp_path):
    tar(tmp_path / "shards" / "a.tar", *sample(0), *sample(1), *sample(2))
    tar(tmp_path / "shards" / "b.tar", *sample(3), *sample(4))
    return tmp_path / "shards"


IDS = ["a/000", "a/001", "a/002", "b/003", "b/004"]


def every(dataset):
    return [dataset.read(position) for position in range(len(dataset.ids))]


def errors(dataset) -> dict[str, str | None]:
    return {datum.id: datum.error for datum in every(dataset)}


def test_a_folder_a_pattern_and_one_tar(shards):
    assert list(WebDataset(str(shards)).open().ids) == IDS
    assert list(WebDataset(str(shards / "*.tar")).open().ids) == IDS
    assert list(WebDataset(str(shards / "b.tar")).open().ids) == IDS[3:]


def test_images_and_labels(shards):
    data = every(WebDataset(str(shards), key=".PNG", label="cls").open())
    assert [d.id for d in data] == IDS
    assert [d.index for d in data] == list(range(5))
    assert all((d.content == PIXELS[i]).all() for i, d in enumerate(data))
    assert [d.label for d in data] == [0, 1, 2, 0, 1]
    assert [d.label for d in every(WebDataset(str(shards), label="json:name").open())] == [f"n{i}" for i in range(5)]
    assert [d.label for d in every(WebDataset(str(shards), label="json:number").open())] == list(range(5))
    assert [d.label for d in every(WebDataset(str(shards), label="json:other").open())] == [None] * 5
    assert [d.label for d in every(WebDataset(str(shards)).open())] == [None] * 5


def test_any_position_is_read_without_the_rest(shards, monkeypatch):
    dataset = WebDataset(str(shards)).open()
    assert len(dataset.ids) == 5
    monkeypatch.setattr(webdataset.tarfile, "open", None)  # the headers were read once
    (shards / "a.tar").unlink()
    assert (dataset.read(4).content == PIXELS[4]).all()
    assert dataset.read(0).error == "No such file or directory"


def test_the_key_is_up_to_the_first_dot_and_folders_are_part_of_it(tmp_path):
    path = tar(
        tmp_path / "x.tar",
        member("./cats", type=tarfile.DIRTYPE),
        member("./cats/1.left.png", png(0)),
        member("./cats/1.right.png", png(1)),
        member("dogs/1.right.PNG", png(2)),
        member("README", b"no extension, no sample"),
        member("__meta__.json", b"{}"),
    )
    assert errors(WebDataset(str(path)).open()) == {"x/cats/1": None, "x/dogs/1": None}
    right = WebDataset(str(path), key="right.png").open()
    assert [(d.content == PIXELS[i]).all() for d, i in zip(every(right), (1, 2), strict=True)] == [True, True]


def test_labels_are_of_one_kind_or_null(tmp_path):
    texts = [b"7", b"cat", b"", b"\xff", b"-3", b"9" * 30]
    members = [m for i, text in enumerate(texts) for m in (member(f"{i}.png", png(i)), member(f"{i}.cls", text))]
    dataset = WebDataset(str(tar(tmp_path / "x.tar", *members)), label="cls").open()
    assert [d.label for d in every(dataset)] == [7, None, None, None, -3, None]
    texts = [b'{"a": "x"}', b'{"a": 1}', b"[1]", b"[" * 100_000, b"{", b'{"a": {"b": 1}}']
    members = [m for i, text in enumerate(texts) for m in (member(f"{i}.png", png(i)), member(f"{i}.json", text))]
    dataset = WebDataset(str(tar(tmp_path / "y.tar", *members)), label="json:a").open()
    assert [d.label for d in every(dataset)] == ["x", None, None, None, None, None]
    assert all(d.error is None for d in every(dataset))


def test_a_sample_that_has_no_image_is_a_row(tmp_path):
    path = tar(tmp_path / "x.tar", member("1.json", b"{}"), member("1.txt", b"a cat"), *sample(2))
    found = errors(WebDataset(str(path)).open())
    assert found == {"x/1": "the sample has no member with an image; it has the extensions json, txt", "x/002": None}


def test_hostile_members_are_rows_and_nothing_is_written(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(png(5))
    path = tar(
        tmp_path / "tars" / "x.tar",
        member("000.png", png(0)),
        member("../../up.png", png(1)),
        member("/etc/absolute.png", png(1)),
        member("link.png", type=tarfile.SYMTYPE, linkname=str(outside)),
        member("hard.png", type=tarfile.LNKTYPE, linkname="000.png"),
        member("device.png", type=tarfile.CHRTYPE),
        member("pipe.png", type=tarfile.FIFOTYPE),
        member("000.png", png(1)),
        member("broken.png", png(1)[:60]),
        member("new\nline\x1b[31m.png", png(1)),
        member("long" * 500 + ".png", png(2)),
        member("zz.png", png(3)),
    )
    before = sorted(tmp_path.rglob("*"))
    found = errors(WebDataset(str(path)).open())
    assert sorted(tmp_path.rglob("*")) == before
    fine = {name for name, error in found.items() if error is None}
    assert fine == {"x/000", r"x/new\u000aline\u001b[31m", "x/" + "long" * 500, "x/zz"}
    said = {
        r"x/\u002e\u002e/\u002e\u002e/up": "leads out of the tar",
        r"x/\u002f/etc/absolute": "leads out of the tar",
        "x/link": "a link in a tar",
        "x/hard": "a link in a tar",
        "x/device": "not a regular file",
        "x/pipe": "not a regular file",
        "x/broken": "truncated",
    }
    for name, reason in said.items():
        assert reason in found.pop(name), name
    (repeated,) = set(found) - fine
    assert repeated.startswith("x/000@")
    assert "occurs before" in found[repeated]


def test_a_tar_that_ends_early_keeps_what_came_before(tmp_path):
    """Cut at every block and in the middle of each: no exception, and the loss is seen wherever there is one."""
    whole = tar(tmp_path / "whole.tar", *sample(0), *sample(1)).read_bytes()
    ends = [whole.rindex(png(index)) + len(png(index)) for index in (0, 1)]
    end_mark = ends[1] + -ends[1] % 512 + 512
    for cut in range(300, len(whole), 256):
        path = tmp_path / f"cut-{cut}.tar"
        path.write_bytes(whole[:cut])
        found = errors(WebDataset(str(path)).open())
        images = [found.get(f"cut-{cut}/{name}", "lost") for name in ("000", "001")]
        assert images.count(None) == sum(cut >= end for end in ends), cut
        assert any(found.values()) == (cut < end_mark), cut


def damaged_header(offset: int, field: slice, content: bytes, whole: bytes) -> bytes:
    """A tar with a field of the header at an offset replaced, and its checksum made right again."""
    header = bytearray(whole[offset : offset + 512])
    header[field] = content
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return whole[:offset] + bytes(header) + whole[offset + 512 :]


SIZE, TYPE = slice(124, 136), slice(156, 157)
NEGATIVE = b"\xff" * 8 + (2**32 - 1024).to_bytes(4, "big")
HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("field", "content", "reason"),
    [
        (SIZE, HUGE, "truncated: the tar ends within this member"),
        (SIZE, NEGATIVE, "the tar is damaged"),
        (SIZE, b"not a number", "the tar is damaged"),
        (slice(0, 512), b"\xaa" * 512, "the tar is damaged"),
        (TYPE, b"S", "a sparse file in a tar"),
    ],
)
def test_headers_that_lie_are_rows(tmp_path, field, content, reason):
    whole = tar(tmp_path / "x.tar", member("a.png", png(0)), member("b.png", png(1)), member("c.png", png(2)))
    data = whole.read_bytes()
    second = data.index(b"b.png")
    whole.write_bytes(
        data[:second] + content + data[second + 512 :]
        if len(content) == 512
        else damaged_header(second, field, content, data)
    )
    found = errors(WebDataset(str(whole)).open())
    assert found.pop("x/a") is None
    assert found
    assert any(error and reason in error for error in found.values()), found


@pytest.mark.parametrize("type", [b"L", b"K", b"x", b"g", b"N", b"D", b"?"])
def test_content_that_is_taken_for_a_header_raises_nothing(tmp_path, type):
    whole = tar(tmp_path / "x.tar", member("a.png", png(0)), member("b.png", png(1)), member("c.png", png(2)))
    data = whole.read_bytes()
    whole.write_bytes(damaged_header(data.index(b"b.png"), TYPE, type, data))
    assert errors(WebDataset(str(whole)).open())["x/a"] is None


def test_random_damage_raises_nothing(tmp_path):
    data = np.frombuffer(tar(tmp_path / "x.tar", *sample(0), *sample(1)).read_bytes(), np.uint8)
    draw = np.random.default_rng(2)
    for number in range(300):
        damaged = data.copy()
        places = draw.integers(0, 6000, draw.integers(1, 20))
        damaged[places] = draw.integers(0, 256, len(places))
        for offset in range(0, 6000, 512):  # a wrong checksum would hide the rest of the damage
            if damaged[offset + 257 : offset + 262].tobytes() == b"ustar":
                damaged[:] = np.frombuffer(damaged_header(offset, slice(0, 0), b"", damaged.tobytes()), np.uint8)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(damaged.tobytes())
        for datum in every(WebDataset(str(path), label="json:name").open()):
            assert (datum.content is None) == bool(datum.error)
            datum.id.encode("utf-8")


def test_headers_that_nest_without_end_are_a_row(tmp_path):
    path = tar(tmp_path / "x.tar", member("a.png", png(0)), member("b.png", png(1)))
    data = path.read_bytes()
    second = data.index(b"b.png")
    one = damaged_header(0, SIZE, b"00000000000\0", damaged_header(0, TYPE, b"L", data[second : second + 512]))
    path.write_bytes(data[:second] + one * 20_000)
    found = errors(WebDataset(str(path)).open())
    assert found.pop("x/a") is None
    assert ["the tar is damaged" in error for error in found.values()] == [True]


def test_what_is_no_tar_among_tars_is_a_row(shards):
    (shards / "c.tar").write_bytes(b"<html>404</html>" * 100)
    (shards / "d.tar").write_bytes(b"")
    os.mkfifo(shards / "pipe.tar")
    found = errors(WebDataset(str(shards)).open())
    assert [name for name, error in found.items() if error is None] == IDS
    assert [name for name, error in found.items() if error] == ["c/@0", "d/@0"]
    assert "the tar is damaged at byte 0" in found["c/@0"]


def test_a_compressed_tar_is_the_callers_mistake(shards):
    packed = shards / "a.tar"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    with pytest.raises(CallerError, match=r"is compressed \(gzip\).*decompress it"):
        WebDataset(str(shards)).open()
    packed.rename(shards / "a.tar.gz")
    (shards / "b.tar").unlink()
    with pytest.raises(CallerError, match="those that are compressed have to be decompressed first"):
        WebDataset(str(shards)).open()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "nowhere/*.tar"}, "no tar at 'nowhere"),
        ({"path": "ftp://bucket/x.tar"}, "cannot use 'ftp://bucket/x.tar'; expected a local path or a URI"),
        ({"key": "."}, "dataset.key is an extension"),
        ({"label": "txt"}, "dataset.label is cls, json:FIELD or null, got 'txt'"),
        ({"label": "json:"}, "dataset.label is cls, json:FIELD or null"),
    ],
)
def test_the_callers_mistakes(shards, keys, message):
    with pytest.raises(CallerError, match=message):
        WebDataset(**{"path": str(shards)} | keys).open()


def test_tars_are_encoded_and_a_bad_one_costs_no_neighbour(tmp_path, shards):
    def weights(name: str) -> dict[str, list[float]]:
        job = tiny_job(
            tmp_path / name,
            "optimizer.kind=adam",
            "fit.max_steps=20",
            dataset={"kind": "webdataset", "path": str(shards), "label": "cls"},
        )
        table = open_weights(str(encode_in_process(job)[0])).to_arrow()
        return {row["datum_id"]: row["weights"] for row in table.to_pylist()}

    clean = weights("clean")
    (shards / "c.tar").write_bytes(b"no tar")
    hostile = weights("hostile")
    assert set(hostile) - set(clean) == {"c/@0"}
    assert {name: hostile[name] for name in clean} == clean
