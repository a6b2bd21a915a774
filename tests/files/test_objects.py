"""Objects of a real S3 server: conditional puts, ranges, errors that a user understands."""

import hashlib
import http.client
import os
import pickle
import subprocess
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfscale.errors import CallerError
from nfscale.files import ObjectFiles, StoreError, StoreRefusedError, is_uri, open_files
from tests.object_store import BUCKET, s3_environment


@pytest.fixture(scope="module")
def s3():
    with s3_environment() as settings:
        yield settings


@pytest.fixture
def files(s3):
    return open_files(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def test_the_first_writer_of_a_name_wins(files):
    assert files.put_if_absent("commits/one.json", b"first")
    assert not files.put_if_absent("commits/one.json", b"second")
    assert files.read("commits/one.json") == b"first"


def test_a_put_whose_answer_was_lost_is_known_for_its_own(files):
    """A client that repeats a put is told that the object exists; it is the one that it has put itself."""
    files.replace("commits/one.json", b"mine")
    assert files.put_if_absent("commits/one.json", b"mine")
    assert not files.put_if_absent("commits/one.json", b"another's")


RACE = """
import sys
from nfscale.files import open_files
files = open_files(sys.argv[1])
sys.stdin.readline()
print(*(int(files.put_if_absent(f"commits/{key}.json", sys.argv[2].encode())) for key in range(40)))
"""


def test_of_racing_processes_one_wins_each_name(files):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, files.root, f"racer {number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [[int(word) for word in racer.communicate(timeout=100)[0].split()] for racer in racers]
    for key in range(40):
        winners = [number for number in range(3) if won[number][key]]
        assert [f"racer {number}".encode() for number in winners] == [files.read(f"commits/{key}.json")]


def test_what_is_there(files):
    assert files.some_entries(3) == files.names() == []
    assert files.size("data/a") is None
    files.replace("data/a", b"1234")
    files.replace("data/below/b", b"")
    files.replace("other", b"")
    assert files.size("data/a") == 4
    assert files.names("data") == ["data/a", "data/below/b"]
    assert set(files.some_entries(5)) == {"data/a", "data/below/b", "other"}
    files.remove("data/a")
    files.remove("data/a")
    assert files.names("data") == ["data/below/b"]


def test_an_object_is_read_at_any_place(files):
    content = bytes(range(256)) * 20_000  # more than one buffer
    with files.writing("big") as stream:
        stream.write(content)
    with files.open("big") as file:
        assert file.seek(-3, 2) == len(content) - 3
        assert file.read() == content[-3:]
        assert file.read(5) == b""
        file.seek(4_000_000)
        assert file.read(2_000_000) == content[4_000_000:]
    assert files.sha256("big") == hashlib.sha256(content).hexdigest()
    with files.local_copy("big") as path:
        assert path.name == "big"
        assert path.read_bytes() == content


def test_some_bytes_of_an_object(files):
    files.replace("a", b"0123456789")
    assert files.range("a", 3, 4) == b"3456"
    assert files.range("a", 8, 100) == b"89"
    assert files.range("a", 10, 1) == files.range("a", 1 << 40, 5) == files.range("a", 2, 0) == b""
    with pytest.raises(FileNotFoundError):
        files.range("b", 0, 1)


def test_an_entry_is_another_when_the_content_is(files):
    assert files.entry("a") is None
    files.replace("a", b"1")
    before = files.entry("a")
    assert before.size == 1
    assert files.entries() == {"a": before}
    files.replace("a", b"2")
    assert files.entry("a").size == 1
    assert files.entry("a") != before


@pytest.fixture
def fetched(files, monkeypatch):
    """An open object of 8 MiB, and the (start, length) of what is fetched of it."""
    content = os.urandom(8 << 20)
    files.replace("big", content)
    ranges, real = [], ObjectFiles.range
    monkeypatch.setattr(ObjectFiles, "range", lambda self, *place: ranges.append(place[1:]) or real(self, *place))
    with files.open("big") as file:
        yield file, content, ranges


def test_jumps_fetch_little(fetched):
    file, content, ranges = fetched
    for place in (0, 5_000_000, 2_000_000, 7_000_000):
        file.seek(place)
        assert file.read(100) == content[place : place + 100]
        assert file.read(1000) == content[place + 100 : place + 1100]
    assert len(ranges) == 4
    assert sum(length for _, length in ranges) <= 4 * 8192
    file.seek(-10, 2)
    assert file.read() == content[-10:]
    file.seek(-2000, 2)
    assert file.read(1000) == content[-2000:-1000]
    assert len(ranges) == 5, "an end is read backwards"
    file.seek(0)
    assert file.read(3_000_000) == content[:3_000_000]
    assert ranges[5:] == [(0, 3_000_000)]


def test_reading_on_fetches_ahead(fetched):
    file, content, ranges = fetched
    assert b"".join(iter(lambda: file.read(700), b"")) == content
    assert len(ranges) <= 16
    assert sum(length for _, length in ranges) == len(content)
    del ranges[:]
    for place in range(1_000_000, 3_000_000, 10_000):  # headers with little between them
        file.seek(place)
        assert file.read(512) == content[place : place + 512]
    assert len(ranges) <= 12


def test_a_prefix_is_meant_as_it_stands(s3):
    for prefix in ("per%20cent", "ha#sh", "que?ry", "sp ace", "ünï"):
        files = open_files(f"s3://{BUCKET}/prefixes/{prefix}")
        files.replace("a#b?c%20d", b"1")
        assert files.names() == ["a#b?c%20d"]
    assert len(open_files(f"s3://{BUCKET}/prefixes").names()) == 5
    assert f"{prefix}/a#b?c%20d" in open_files(f"s3://{BUCKET}/prefixes").names()


def put_as_it_is(s3, key):
    """An object whose key no library of this kind would write."""
    connection = http.client.HTTPConnection(s3["AWS_ENDPOINT_URL"].removeprefix("http://"), timeout=30)
    connection.request("PUT", f"/{BUCKET}/{key}", b"")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("key", ["a//b", "a/../b", "a/./b", "tab%09"])
def test_a_key_that_cannot_be_addressed_is_named(files, s3, key):
    files.replace("good", b"")
    put_as_it_is(s3, f"{files.root.removeprefix(f's3://{BUCKET}/')}/{key}")
    with pytest.raises(StoreRefusedError, match=rf"a key that no reader can address.*{key.replace('%09', '')}"):
        files.names()


def test_markers_of_folders_are_no_files(files, s3):
    files.replace("folder/file", b"1")
    put_as_it_is(s3, f"{files.root.removeprefix(f's3://{BUCKET}/')}/folder/")
    assert files.names() == ["folder/file"]


def test_errors_of_a_store_cross_processes(s3):
    with pytest.raises(StoreRefusedError) as caught:
        open_files("s3://no-such-bucket/x").names()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, StoreError)
    assert isinstance(copy, OSError)
    assert str(copy) == str(caught.value)


def test_parquet_is_read_by_columns_and_by_a_filesystem(files):
    table = pa.table({"a": list(range(1000)), "b": ["x"] * 1000})
    with files.writing("data/t.parquet") as stream:
        pq.write_table(table, stream, row_group_size=100)
    assert pq.read_table(files.source("data/t.parquet"), columns=["a"]).column_names == ["a"]
    filesystem, prefix = files.arrow()
    assert pq.read_table(f"{prefix}data/t.parquet", filesystem=filesystem).equals(table)


def test_a_stream_that_fails_leaves_nothing(files):
    def half():
        with files.writing("data/file") as stream:
            stream.write(b"half")
            raise ValueError("the writer")

    with pytest.raises(ValueError, match="the writer"):
        half()
    assert files.names() == []


def test_missing_objects_and_buckets_are_named(files, s3):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        files.read("nothing")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        files.open("nothing")
    elsewhere = open_files("s3://no-such-bucket/run")
    with pytest.raises(OSError, match="no such bucket"):
        elsewhere.put_if_absent("job.json", b"")
    with pytest.raises(OSError, match="no such bucket"):
        elsewhere.names()


def test_a_store_that_ignores_the_condition_is_refused(files, monkeypatch):
    files.replace("job.json", b"{}")
    files.refuse_shared_names("job.json")
    monkeypatch.setattr(ObjectFiles, "_created", lambda self, name, content: True)
    with pytest.raises(CallerError, match="ignores the condition of a put"):
        files.refuse_shared_names("job.json")


@pytest.mark.parametrize("uri", ["ftp://host/folder", "s3://", "https://bucket.s3.amazonaws.com/x"])
def test_uris_of_other_kinds_are_refused(uri):
    assert is_uri(uri)
    with pytest.raises(CallerError, match="s3://"):
        open_files(uri)
