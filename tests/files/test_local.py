"""Local files appear whole, and of several writers one wins."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from nfscale.files import LocalFiles


def test_the_first_of_many_writers_wins(tmp_path):
    files = LocalFiles(tmp_path)

    def put(number):
        return [files.put_if_absent(f"{key}", f"{number}".encode()) for key in range(50)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put, range(8)))
    for key in range(50):
        winners = [number for number in range(8) if won[number][key]]
        assert [f"{w}".encode() for w in winners] == [files.read(f"{key}")]
    assert len(list(tmp_path.iterdir())) == 50, "no temporary file is left"


def test_replace_leaves_the_old_content_or_the_new(tmp_path):
    files = LocalFiles(tmp_path)
    files.replace("below/file", b"old")
    files.replace("below/file", b"new")
    assert files.read("below/file") == b"new"
    assert [p.name for p in (tmp_path / "below").iterdir()] == ["file"]


def test_a_stream_that_fails_leaves_nothing(tmp_path):
    files = LocalFiles(tmp_path)

    def half():
        with files.writing("data/file") as stream:
            stream.write(b"half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (its own)
        half()
    assert files.names() == files.unfinished() == []


def test_what_a_killed_writer_left_is_no_file(tmp_path):
    files = LocalFiles(tmp_path)
    files.replace("file", b"1")
    left = f".file.{'0' * 32}"
    (tmp_path / left).write_bytes(b"half")
    assert files.names() == ["file"]
    assert files.unfinished() == [left]


def test_some_bytes_and_the_version_of_a_file(tmp_path):
    files = LocalFiles(tmp_path)
    files.replace("a", b"0123456789")
    assert files.range("a", 3, 4) == b"3456"
    assert files.range("a", 8, 100) == b"89"
    assert files.range("a", 20, 1) == b""
    assert files.entry("a").size == files.size("a") == 10
    assert files.entry("b") is files.size("b") is None
