"""Data in an object store: the same data as on a disk, fetched by ranges; whose fault an error is."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.exceptions import GenericError, PermissionDeniedError
from PIL import Image

from nfscale.datasets import DATASETS, arrow, arrow_ipc, webdataset
from nfscale.datasets.base import ids_digest
from nfscale.datasets.folder import Folder
from nfscale.datasets.hf import HuggingFace
from nfscale.datasets.npz import Npz
from nfscale.datasets.table import Table
from nfscale.datasets.webdataset import WebDataset
from nfscale.errors import CallerError
from nfscale.files import ObjectFiles, StoreError
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job
from tests.object_store import BUCKET, s3_environment

ROOT = f"s3://{BUCKET}/in"
COUNT = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
BIG = np.random.default_rng(1).integers(0, 256, (100, 256, 256, 3), dtype=np.uint8)
"""19.7 MB, which no compression makes smaller."""


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def write_images(root: Path) -> None:
    names = ["cats/a-b/one.png", "cats/a/two.PNG", "cats/grüße 100%25 #?+.png", "dogs/back\\slash.png", "dogs/.dot.png"]
    for index, name in enumerate([*names, "top.png", "notes.txt", "dogs/c1\x85\u2028.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(IMAGES[index]))
    (root / "cats" / "broken.png").write_bytes(png(IMAGES[0])[:60])
    (root / "cats" / "empty.png").write_bytes(b"")
    (root.parent / "labels.csv").write_text("id,label,split\ntop.png,7,train\nnotes.txt,1,\ncats/broken.png,3,test\n")


def write_arrays(root: Path) -> None:
    names = {"keys": np.array([f"n{i}" for i in range(COUNT)]), "y": np.arange(COUNT)[:, None]}
    np.save(root / "images.npy", IMAGES)
    np.save(root / "fortran.npy", np.asfortranarray(IMAGES))
    np.savez(root / "images.npz", images=IMAGES.astype(">u2"), **names)
    np.savez_compressed(root / "packed.npz", images=IMAGES, **names)
    np.save(root / "big.npy", BIG)
    np.savez(root / "big.npz", x=BIG, y=np.arange(len(BIG)))


def write_ipc(table: pa.Table, path: Path, rows: int, new=pa.ipc.new_file, compression=None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_tables(root: Path) -> None:
    table = pa.table(
        {
            "key": [f"k{i}" for i in range(COUNT)],
            "class": pa.array([["cat", "dog", None][i % 3] for i in range(COUNT)]).dictionary_encode(),
            "png": pa.array([png(image) for image in IMAGES[:-1]] + [b"no image"]),
            "image": pa.array([{"bytes": png(image), "path": f"{image.sum()}.png"} for image in IMAGES]),
            "flat": pa.array([i.ravel().tolist() for i in IMAGES], pa.list_(pa.uint8())),
        }
    )
    for name in ("table/a-b/1.parquet", "table/a/2.arrow", "table/a/3.arrows", "table/_hidden/4.feather"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, 9), root / "table/a-b/1.parquet", row_group_size=4)
    write_ipc(table.slice(9, 6), root / "table/a/2.arrow", 4, compression="zstd")
    write_ipc(table.slice(15, 6), root / "table/a/3.arrows", 4, pa.ipc.new_stream)
    write_ipc(table.slice(21), root / "table/_hidden/4.feather", 4)
    (root / "table/a/_metadata.parquet").write_bytes(b"not for us")
    pixels = BIG.reshape(len(BIG), -1)
    big = pa.table({"x": pa.FixedSizeListArray.from_arrays(pixels.ravel(), pixels.shape[1]), "y": range(len(BIG))})
    big = big.append_column("z", big["x"])  # a wide column that is not asked for
    pq.write_table(big, root / "big.parquet", row_group_size=4, compression=None)
    write_ipc(big, root / "big.arrow", 10)
    write_ipc(big, root / "big.arrows", 10, pa.ipc.new_stream)


def write_saved(root: Path) -> None:
    """What Hugging Face's save_to_disk leaves."""
    for split, start, stop in (("train", 0, 15), ("test", 15, COUNT)):
        table = pa.table({"image": [{"bytes": png(i), "path": None} for i in IMAGES[start:stop]]})
        table = table.append_column("label", pa.array([i % 2 for i in range(start, stop)], pa.int64()))
        (root / "saved" / split).mkdir(parents=True)
        write_ipc(table, root / "saved" / split / "data-0.arrow", 4, pa.ipc.new_stream)
        (root / "saved" / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def write_tars(root: Path) -> None:
    tar(root / "tars/2024/a-b.tar", {"0.cls": b"3", "0.png": png(IMAGES[0]), "../up.png": b"", "1.png": png(IMAGES[1])})
    tar(root / "tars/2024/a.tar", {"1.png": png(IMAGES[2]), "1.cls": b"5", "2.png": png(IMAGES[3])[:50]})
    tar(root / "tars/2025/new\u2028.tar", {"x//y.png": png(IMAGES[4]), "dir/\n.png": png(IMAGES[5])})
    tar(root / "tars/.hidden/b.tar", {"1.png": png(IMAGES[6])})
    cut = (root / "tars/2024/a.tar").read_bytes()[:2300]
    (root / "tars/2025/cut.tar").write_bytes(cut)
    (root / "tars/2025/none.tar").write_bytes(b"")
    samples = [{f"{i:03d}.cls": b"1", f"{i:03d}.png": png(image)} for i, image in enumerate(BIG)]
    tar(root / "big.tar", {name: content for sample in samples for name, content in sample.items()})


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for name in ("images", "arrays"):
        (root / name).mkdir()
    write_images(root / "images")
    write_arrays(root / "arrays")
    write_tables(root)
    write_saved(root)
    write_tars(root)
    return root


@pytest.fixture(scope="module")
def s3(local):
    with s3_environment():
        files = ObjectFiles(ROOT)
        for path in local.rglob("*"):
            if path.is_file():
                files.replace(path.relative_to(local).as_posix(), path.read_bytes())
        files.replace("images/cats/", b"")
        yield files


@pytest.fixture
def traffic(s3, monkeypatch):
    """Requests and bytes that came."""
    seen = SimpleNamespace(requests=0, bytes=0)

    def counted(method):
        real = getattr(ObjectFiles, method)

        def call(self, *arguments):
            answer = real(self, *arguments)
            seen.requests += 1
            seen.bytes += len(answer) if isinstance(answer, bytes) else 0
            return answer

        monkeypatch.setattr(ObjectFiles, method, call)

    for method in ("entry", "entries", "some_entries", "read", "range"):
        counted(method)
    return seen


SAME = {
    "folder": ("folder", {"path": "images"}),
    "a pattern": ("folder", {"path": "images", "pattern": "cats/**/*.png", "label_from": "parent"}),
    "all files": ("folder", {"path": "images", "pattern": "**/*"}),
    "a CSV": ("folder", {"path": "images", "label_from": "labels.csv"}),
    "npy": ("npz", {"path": "arrays/images.npy"}),
    "fortran": ("npz", {"path": "arrays/fortran.npy"}),
    "npz": ("npz", {"path": "arrays/images.npz", "labels": "y", "ids": "keys"}),
    "packed npz": ("npz", {"path": "arrays/packed.npz", "array": "images", "labels": "y", "splits": "keys"}),
    "tables": ("table", {"path": "table", "column": "png", "id_column": "key", "label_column": "class"}),
    "arrays": ("table", {"path": "table/", "column": "flat", "shape": [8, 8, 3], "split_column": "class"}),
    "parquet": ("table", {"path": "table/a-b/1.parquet", "column": "png"}),
    "structs": ("table", {"path": "table/a-b/1.parquet", "column": "image"}),
    "stream": ("table", {"path": "table/a/3.arrows", "column": "png", "id_column": "key", "label_column": "class"}),
    "saved": ("hf", {"path": "saved", "column": "image", "label_column": "label"}),
    "one split": ("hf", {"path": "saved/test", "column": "image"}),
    "tars": ("webdataset", {"path": "tars", "label": "cls"}),
    "tars by pattern": ("webdataset", {"path": "tars/*/*.tar", "label": "cls"}),
    "tars of a year": ("webdataset", {"path": "tars/20?4/*.tar"}),
    "one tar": ("webdataset", {"path": "tars/2024/a.tar"}),
}


def opened(kind, keys, root):
    placed = {key: f"{root}/{keys[key]}" for key in ("path", "label_from") if keys.get(key) not in (None, "parent")}
    return DATASETS[kind](**keys | placed).open()


@pytest.mark.parametrize("name", SAME)
def test_data_are_the_same_as_on_a_disk(local, s3, name):
    there, here = opened(*SAME[name], ROOT), opened(*SAME[name], local)
    assert ids_digest(there.ids) == ids_digest(here.ids)
    assert len(here.ids) > 1
    assert all(one.isprintable() for one in there.ids)
    for position in (*range(len(here.ids)), *range(len(here.ids) - 1, -1, -3)):
        expected, found = here.read(position), there.read(position)
        facts = [(d.id, d.index, d.label, d.split, d.error) for d in (expected, found)]
        assert facts[0] == facts[1]
        assert np.array_equal(found.content, expected.content)
        if found.content is not None:
            assert found.content.dtype == expected.content.dtype
            assert found.content.flags.writeable == expected.content.flags.writeable


def test_an_encode_from_a_store_is_equal_bit_for_bit(local, s3, tmp_path):
    tables = []
    for name, root in (("disk", str(local)), ("store", ROOT)):
        dataset = {"kind": "folder", "path": f"{root}/images", "label_from": f"{root}/labels.csv"}
        job = tiny_job(
            tmp_path / name,
            "optimizer.kind=adam",
            dataset=dataset,
            signal={"kind": "image", "channels": 3, "convert": "rgb"},
            fit={"max_steps": 20, "samples": 16, "check_every": 10},
        )
        folder, _ = encode_in_process(job)
        table = open_weights(str(folder))
        rows = table.to_arrow(["datum_id", "status", "reason", "label", "split"]).to_pylist()
        tables.append((rows, table.weights().tobytes()))
    assert tables[0] == tables[1]
    assert [row["status"] for row in rows].count("decode_error") == 2


# --- what is fetched


def test_a_folder_is_one_listing_and_a_request_for_each_datum(s3, traffic):
    dataset = Folder(f"{ROOT}/images").open()
    assert traffic.requests == 2  # whether anything is there, and what
    for position in range(len(dataset.ids)):
        dataset.read(position)
    assert traffic.requests == 2 + len(dataset.ids)


@pytest.mark.parametrize(
    ("kind", "keys", "opening_requests", "opening_bytes", "one_requests", "one_bytes"),
    [
        ("npz", {"path": "arrays/big.npy"}, 4, 10_000, 1, 200_000),
        ("npz", {"path": "arrays/big.npz", "array": "x", "labels": "y"}, 20, 60_000, 1, 200_000),
        ("table", {"path": "big.parquet", "column": "x", "label_column": "y"}, 40, 400_000, 1, 1_000_000),
        ("table", {"path": "big.arrow", "column": "x", "label_column": "y"}, 40, 300_000, 2, 2_000_000),
        ("table", {"path": "big.arrows", "column": "x", "label_column": "y"}, 40, 300_000, 2, 2_000_000),
        ("webdataset", {"path": "big.tar", "label": "cls"}, 110, 900_000, 1, 200_000),
    ],
)
def test_a_datum_costs_little_of_a_large_file(
    s3, traffic, kind, keys, opening_requests, opening_bytes, one_requests, one_bytes
):
    webdataset._index.cache_clear()
    dataset = opened(kind, keys, ROOT)
    assert len(dataset.ids) == len(BIG)
    assert traffic.requests <= opening_requests
    assert traffic.bytes <= opening_bytes
    traffic.requests = traffic.bytes = 0
    array = dataset.read(57).content
    assert np.array_equal(array.reshape(BIG[57].shape), BIG[57])
    assert traffic.requests <= one_requests
    assert traffic.bytes <= one_bytes
    traffic.requests = traffic.bytes = 0
    for position in range(40, 60):
        array = dataset.read(position).content
        assert np.array_equal(array.reshape(BIG[position].shape), BIG[position])
    assert traffic.requests <= 20
    assert traffic.bytes <= 25 * BIG[0].size


def test_small_rows_in_order_are_read_ahead(s3, traffic):
    s3.replace("small.npy", npy := npy_of(np.arange(200_000, dtype=np.int64).reshape(-1, 4)))
    dataset = Npz(f"{ROOT}/small.npy").open()
    traffic.requests = traffic.bytes = 0
    assert all((dataset.read(p).content == np.arange(4 * p, 4 * p + 4)).all() for p in range(len(dataset.ids)))
    assert traffic.requests <= 10
    assert traffic.bytes <= 1.01 * len(npy)


def npy_of(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_members_of_a_tar_that_are_small_cost_few_requests(s3, traffic, tmp_path):
    tar(tmp_path / "x.tar", {f"{i}.png": png(IMAGES[i % COUNT]) for i in range(500)})
    s3.replace("many/x.tar", content := (tmp_path / "x.tar").read_bytes())
    traffic.requests = traffic.bytes = 0
    assert len(WebDataset(f"{ROOT}/many/*.tar").open().ids) == 500
    assert traffic.requests <= 12
    assert traffic.bytes <= 1.1 * len(content)


# --- whose fault it is


@pytest.mark.parametrize(
    ("opener", "message"),
    [
        (Folder(f"{ROOT}/none"), r"dataset\.path: no objects below 's3://encoded/in/none'"),
        (Folder(f"{ROOT}/images", pattern="*.gif"), r"no files below 's3://encoded/in/images' match '\*\.gif'"),
        (Folder(f"{ROOT}/images", label_from=f"{ROOT}/no.csv"), r"dataset\.label_from: s3://encoded/in/no\.csv"),
        (Folder(f"{ROOT}/images", label_from="s3://labels.csv"), r"dataset\.label_from: .* names no object"),
        (Npz(f"{ROOT}/none.npy"), r"dataset\.path: no object 's3://encoded/in/none\.npy'"),
        (Npz(f"{ROOT}/images"), r"no object 's3://encoded/in/images'"),
        (Npz(f"{ROOT}/labels.csv"), r"cannot read 'labels\.csv'"),
        (Table(f"{ROOT}/none", "x"), r"no object 's3://encoded/in/none' and none below it"),
        (Table(f"{ROOT}/images", "x"), r"no files below 's3://encoded/in/images' end in one of"),
        (Table(f"{ROOT}/big.arrow", "w"), r"'big\.arrow' has no column 'w'; its columns: x, y, z"),
        (HuggingFace(f"{ROOT}/table", "x"), r"no state\.json in 's3://encoded/in/table'"),
        (WebDataset(f"{ROOT}/none/*.tar"), r"no tar at 's3://encoded/in/none/\*\.tar'"),
        (WebDataset(f"{ROOT}/images"), r"no tar at 's3://encoded/in/images'"),
        (Folder("s3://no-such-bucket/x"), r"dataset\.path: s3://no-such-bucket/x: there is no such bucket"),
        (Npz("s3://no-such-bucket/x.npy"), "there is no such bucket"),
        (Table("s3://no-such-bucket", "x"), "there is no such bucket"),
        (WebDataset("s3://no-such-bucket/*.tar"), "there is no such bucket"),
        (Folder("ftp://host/x"), "expected a local path or a URI with a bucket"),
    ],
)
def test_what_is_not_there_is_the_callers_mistake(s3, opener, message):
    with pytest.raises(CallerError, match=message) as caught:
        opener.open()
    assert "\n" not in str(caught.value)


def test_objects_that_vanish_or_are_too_large_are_rows(s3, monkeypatch):
    s3.replace("mended/a.png", png(IMAGES[0]))
    s3.replace("mended/b.png", png(IMAGES[1]))
    dataset = Folder(f"{ROOT}/mended").open()
    s3.remove("mended/a.png")
    assert dataset.read(0).error == "s3://encoded/in/mended/a.png does not exist"
    assert dataset.read(1).error is None
    monkeypatch.setattr("nfscale.datasets.folder.MAX_ENCODED_BYTES", 10)
    monkeypatch.setattr(ObjectFiles, "range", None)
    assert "too large: an object of" in dataset.read(1).error


def test_an_array_or_a_tar_that_becomes_shorter_is_rows(s3, local):
    s3.replace("shrinks.npy", npy_of(BIG[:30, ::8, ::8]))
    s3.replace("shrinks/x.tar", (local / "tars/2024/a-b.tar").read_bytes())
    array, samples = Npz(f"{ROOT}/shrinks.npy").open(), WebDataset(f"{ROOT}/shrinks").open()
    s3.replace("shrinks.npy", s3.read("shrinks.npy")[:1000])
    s3.replace("shrinks/x.tar", b"")
    assert "the file ends before this row" in array.read(20).error
    assert all(samples.read(position).error for position in range(len(samples.ids)))


def test_a_damaged_row_group_is_its_rows(s3, local):
    place = pq.ParquetFile(local / "table/a-b/1.parquet").metadata.row_group(1).column(2).dictionary_page_offset
    content = bytearray((local / "table/a-b/1.parquet").read_bytes())
    content[place : place + 40] = b"\xff" * 40
    s3.replace("damaged.parquet", bytes(content))
    dataset = Table(f"{ROOT}/damaged.parquet", "png").open()
    assert [p for p in range(9) if dataset.read(p).error] == [4, 5, 6, 7]


READERS = {name: SAME[name] for name in ("folder", "tables", "tars")} | {
    "rows": ("npz", {"path": "arrays/big.npy"}),
    "pieces of row groups": ("table", {"path": "big.parquet", "column": "x"}),
    "batches": ("table", {"path": "big.arrow", "column": "x"}),
    "batches of a stream": ("table", {"path": "big.arrows", "column": "x"}),
}


@pytest.mark.parametrize("name", READERS)
def test_a_store_that_does_not_answer_is_no_datums_fault(s3, monkeypatch, name):
    """Neither is it remembered: the same dataset goes on where the store does."""
    monkeypatch.setattr(arrow, "_CHUNK_BYTES", 300)  # row groups are streamed through
    dataset = opened(*READERS[name], ROOT)
    expected = [dataset.read(position) for position in range(min(len(dataset.ids), COUNT))]
    dataset = opened(*READERS[name], ROOT)
    outages = 0
    for datum in expected:
        with monkeypatch.context() as outage:
            outage.setattr(obstore, "get", broken)
            outage.setattr(obstore, "get_range", broken)
            try:
                found = [dataset.read(datum.index)]  # what was read ahead needs no store
            except StoreError:
                found = []
        outages += not found
        for one in (*found, dataset.read(datum.index)):
            assert np.array_equal(one.content, datum.content)
            assert one.error == datum.error
    assert outages > 1


def broken(*_, **__):
    raise GenericError("error sending request: connection refused")


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_opened_while_the_store_does_not_answer(s3, monkeypatch, name):
    webdataset._index.cache_clear()
    monkeypatch.setattr(obstore, "get", broken)
    monkeypatch.setattr(obstore, "get_range", broken)
    if name == "folder":
        monkeypatch.setattr(obstore, "list", broken)
    with pytest.raises(StoreError, match="connection refused"):
        opened(*READERS[name], ROOT)


def test_a_locked_object_is_a_row_and_refused_credentials_are_none(s3, monkeypatch):
    dataset = Folder(f"{ROOT}/images").open()

    def refuse(code):
        def get(*_, **__):
            raise PermissionDeniedError(f"<Error><Code>{code}</Code></Error>")

        monkeypatch.setattr(obstore, "get_range", get)

    refuse("AccessDenied")
    assert "access is denied" in dataset.read(0).error
    refuse("InvalidAccessKeyId")
    with pytest.raises(StoreError, match="the credentials are refused"):
        dataset.read(0)


def test_a_stream_that_lies_is_the_callers_mistake(s3, local):
    whole = (local / "table/a/3.arrows").read_bytes()
    draw = np.random.default_rng(3)
    outcomes = set()
    for number in range(60):
        damaged = bytearray(whole)
        for place in draw.integers(0, len(whole), draw.integers(1, 30)):
            damaged[place] = draw.integers(0, 256)
        content = bytes(damaged if number % 2 else damaged[: draw.integers(8, len(whole))])
        try:
            stream = io.BytesIO(content)
            arrow._remote_ipc(stream, "png", arrow_ipc.batches_of_stream(stream)).chunk(0)
            outcomes.add("read")
        except (ValueError, OSError, pa.ArrowException) as error:
            outcomes.add(type(error).__name__)
    assert "ValueError" in outcomes


def test_a_batch_that_no_worker_could_hold_is_refused(s3, monkeypatch):
    monkeypatch.setattr(arrow_ipc, "_BATCH_BYTES", 1 << 20)
    with pytest.raises(CallerError, match=r"a record batch of [0-9,]+ bytes.*write batches of fewer rows"):
        Table(f"{ROOT}/big.arrows", "x").open()


def test_a_zip_whose_directory_leads_nowhere_is_the_callers_mistake(s3, local):
    content = bytearray((local / "arrays/images.npz").read_bytes())
    with zipfile.ZipFile(local / "arrays/images.npz") as archive:
        place = archive.start_dir
    content[place + 42 : place + 46] = b"\xff\xff\xff\x7f"  # where the first member lies
    s3.replace("lies.npz", bytes(content))
    with pytest.raises(CallerError, match=r"cannot read 'lies\.npz'"):
        Npz(f"{ROOT}/lies.npz").open()
