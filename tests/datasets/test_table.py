"""Columns of Parquet, Arrow IPC and Feather files: one contract whatever the file, chunk by chunk."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nfscale.datasets import arrow
from nfscale.datasets.table import Table
from nfscale.errors import CallerError

COUNT = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 5, 3), dtype=np.uint8)


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def whole_table() -> pa.Table:
    content = [png(image) for image in IMAGES]
    content[3], content[4] = None, b"no image"
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES)
    return pa.table(
        {
            "name": [f"n{i:02d}" for i in range(COUNT)],
            "number": pa.array(range(100, 100 + COUNT), pa.int32()),
            "class": pa.array([["cat", "dog", None][i % 3] for i in range(COUNT)]).dictionary_encode(),
            "part": ["train"] * 20 + [None] * 3,
            "score": [0.5] * COUNT,
            "png": pa.array(content, pa.binary()),
            "large_png": pa.array(content, pa.large_binary()),
            "image": pa.array(
                [None if c is None else {"bytes": c, "path": "x.png"} for c in content],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "flat": pa.array([i.ravel().tolist() for i in IMAGES], pa.list_(pa.uint8())),
            "nested": pa.array([i.tolist() for i in IMAGES], pa.list_(pa.list_(pa.list_(pa.uint8())))),
            "fixed": pa.array([i.ravel().tolist() for i in IMAGES], pa.list_(pa.uint8(), 60)),
            "tensor": tensors,
        }
    )


def write_parquet(table, path):
    pq.write_table(table, path, row_group_size=5)


def write_ipc(table, path, compression=None, new=pa.ipc.new_file):
    options = pa.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=new is pa.ipc.new_file)
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=5)


FORMATS = {
    "parquet": write_parquet,
    "file": write_ipc,
    "compressed file": lambda table, path: write_ipc(table, path, "zstd"),
    "stream": lambda table, path: write_ipc(table, path, new=pa.ipc.new_stream),
    "compressed stream": lambda table, path: write_ipc(table, path, "lz4", pa.ipc.new_stream),
    "feather": lambda table, path: pa.feather.write_feather(table, str(path), chunksize=5),
}


@pytest.fixture(params=FORMATS)
def path(request, tmp_path) -> str:
    """The whole table in each format; what a file is called decides nothing."""
    FORMATS[request.param](whole_table(), tmp_path / "data.bin")
    return str(tmp_path / "data.bin")


def order(count: int) -> list[int]:
    """Forward, then backward, then across: streams have to start again."""
    return [*range(count), *reversed(range(count)), *range(0, count, 7)]


@pytest.mark.parametrize("column", ["png", "large_png", "image"])
def test_encoded_images(path, column):
    dataset = Table(path, column, id_column="name", label_column="class", split_column="part").open()
    assert list(dataset.ids) == [f"n{i:02d}" for i in range(COUNT)]
    for position in order(COUNT):
        datum = dataset.read(position)
        assert (datum.id, datum.index) == (dataset.ids[position], position)
        assert datum.label == ["cat", "dog", None][position % 3]
        assert datum.split == ("train" if position < 20 else None)
        if position in (3, 4):
            assert datum.content is None
        else:
            assert (datum.content == IMAGES[position]).all()
    assert "holds null here" in dataset.read(3).error
    assert dataset.read(4).error == "not an image, or an image format that cannot be read"


@pytest.mark.parametrize(
    ("column", "shape"), [("flat", [4, 5, 3]), ("nested", None), ("fixed", [4, 5, 3]), ("tensor", None)]
)
def test_arrays(path, column, shape):
    dataset = Table(path, column, label_column="number", shape=shape).open()
    assert dataset.ids[7] == "row-0000007"
    for position in order(COUNT):
        datum = dataset.read(position)
        assert (datum.content == IMAGES[position]).all()
        assert datum.content.dtype == np.uint8
        assert datum.content.flags.writeable
        assert datum.label == 100 + position
    assert Table(path, "tensor", shape=[60]).open().read(1).content.shape == (60,)
    assert "holds 60 values" in Table(path, column, shape=[7]).open().read(0).error


def test_large_row_groups_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "_CHUNK_BYTES", 300)
    pq.write_table(whole_table(), tmp_path / "one.parquet", row_group_size=20)
    dataset = Table(str(tmp_path / "one.parquet"), "png").open()
    assert len(dataset._chunks) > 6
    for position in (*order(COUNT), 22, 0, 21):
        if position not in (3, 4):
            assert (dataset.read(position).content == IMAGES[position]).all()


def test_one_chunk_is_held_at_a_time(path):
    dataset = Table(path, "png").open()
    loads = []
    opened = dataset._opened(0)

    class Watched:
        def chunk(self, index):
            loads.append(index)
            return opened.chunk(index)

    dataset._opened = lambda part: Watched()
    for position in range(COUNT):
        dataset.read(position)
    assert loads == [0, 1, 2, 3, 4]


def test_a_folder_is_read_in_order_of_name(tmp_path):
    table = whole_table()
    (tmp_path / "sub").mkdir()
    write_parquet(table.slice(0, 9), tmp_path / "a.parquet")
    write_ipc(table.slice(9, 5), tmp_path / "b.arrow")
    write_ipc(table.slice(14), tmp_path / "sub" / "c.arrows", new=pa.ipc.new_stream)
    (tmp_path / "_metadata.parquet").write_bytes(b"not for us")
    dataset = Table(str(tmp_path), "flat", id_column="number", label_column="class", shape=[4, 5, 3]).open()
    assert list(dataset.ids) == [str(100 + i) for i in range(COUNT)]
    assert dataset.ids[2:4] == ["102", "103"]
    for position in order(COUNT):
        datum = dataset.read(position)
        assert (datum.content == IMAGES[position]).all()
        assert datum.label == ["cat", "dog", None][position % 3]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"column": "img"}, r"dataset.column: 'data.bin' has no column 'img'; its columns: name, number, class"),
        ({"id_column": "key"}, r"dataset.id_column: .* has no column 'key'"),
        ({"label_column": "score"}, r"'score' of 'data.bin' holds double; expected integers or strings"),
        ({"split_column": "number"}, r"'number' holds integers; expected names such as train and test"),
        ({"id_column": "class"}, r"the column 'class' is null at position 2"),
        ({"column": "name"}, r"the column 'name' holds string; expected encoded images .* or arrays of numbers"),
        ({"shape": [2, 0]}, r"dataset.shape is a list of positive lengths"),
        ({"shape": [60]}, r"dataset.shape is for columns of arrays, and the column 'png' holds encoded files"),
    ],
)
def test_what_does_not_fit_is_the_callers_mistake(path, keys, message):
    with pytest.raises(CallerError, match=message):
        Table(path, **({"column": "png"} | keys)).open()


def test_ids_occur_once(tmp_path):
    table = pa.table({"id": ["a", "b", "a"], "x": pa.array([[1], [2], [3]], pa.list_(pa.float32()))})
    write_parquet(table, tmp_path / "t.parquet")
    with pytest.raises(CallerError, match=r"column 'id': the id 'a' stands at positions 0 and 2"):
        Table(str(tmp_path / "t.parquet"), "x", id_column="id").open()


def test_labels_are_of_one_type_in_all_files(tmp_path):
    for name, label in (("a", 1), ("b", "one")):
        write_parquet(pa.table({"y": [label], "x": [[1.0]]}), tmp_path / f"{name}.parquet")
    with pytest.raises(CallerError, match=r"'y' is int64 in 'a.parquet' and large_string in 'b.parquet'"):
        Table(str(tmp_path), "x", label_column="y").open()


def test_cells_that_are_no_array_have_a_reason(tmp_path):
    cells = [[[1, 2], [3, 4]], [[1], [2, 3]], [[1, None]], [None], None, []]
    write_parquet(pa.table({"x": pa.array(cells, pa.list_(pa.list_(pa.uint8())))}), tmp_path / "t.parquet")
    dataset = Table(str(tmp_path / "t.parquet"), "x").open()
    assert dataset.read(0).content.tolist() == [[1, 2], [3, 4]]
    reasons = [dataset.read(position).error for position in range(1, 5)]
    assert reasons[0].startswith("lists of 1 to 2 values")
    assert reasons[1:] == ["a value inside the cell is null", "a list inside the cell is null", reasons[3]]
    assert "null here" in reasons[3]
    assert dataset.read(5).content.shape == (0, 0)


def test_a_cell_that_names_a_file_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(IMAGES[0]))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], kind)
    write_ipc(pa.table({"image": cells}), tmp_path / "t.arrow")
    datum = Table(str(tmp_path / "t.arrow"), "image").open().read(0)
    assert datum.content is None
    assert "holds no bytes" in datum.error


def test_wild_offsets_are_a_reason_and_not_the_end_of_the_process(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1 << 30, 8], np.int32).tobytes())
    wild = pa.Array.from_buffers(pa.binary(), 2, [None, offsets, pa.py_buffer(b"12345678")])
    write_ipc(pa.table({"image": wild}), tmp_path / "t.arrow")
    datum = Table(str(tmp_path / "t.arrow"), "image").open().read(0)
    assert datum.content is None
    assert "offset" in datum.error
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"12345678")])
    write_ipc(pa.table({"image": [b"", b""], "id": text}), tmp_path / "t.arrow")
    for key in ("id_column", "label_column", "split_column"):
        with pytest.raises(CallerError, match=r"cannot read 't.arrow': .*offset"):
            Table(str(tmp_path / "t.arrow"), "image", **{key: "id"}).open()


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1", b"ARROW1\0\0", b"FEA1", b"\xff\xff\xff\xff\x08\0\0\0"])
def test_files_that_are_no_tables(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(CallerError, match=r"cannot read 't.parquet'"):
        Table(str(tmp_path), "x").open()


def test_damage_found_late_costs_the_data_it_hits(tmp_path):
    pq.write_table(whole_table().select(["flat"]), tmp_path / "t.parquet", row_group_size=5, compression="zstd")
    place = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(2).column(0).data_page_offset
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[place : place + 40] = b"\xff" * 40
    (tmp_path / "t.parquet").write_bytes(content)
    dataset = Table(str(tmp_path / "t.parquet"), "flat").open()
    data = [dataset.read(position) for position in range(COUNT)]
    assert [d.index for d in data if d.content is None] == [10, 11, 12, 13, 14]
    assert all(d.error for d in data[10:15])


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(CallerError, match="no file or folder"):
        Table(str(tmp_path / "none"), "x").open()
    with pytest.raises(CallerError, match="end in one of"):
        Table(str(tmp_path), "x").open()
    write_parquet(pa.table({"x": pa.array([], pa.binary())}), tmp_path / "t.parquet")
    with pytest.raises(CallerError, match="no rows"):
        Table(str(tmp_path), "x").open()
