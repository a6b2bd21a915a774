"""Columns of Arrow and Parquet files as datasets: what the kinds `table` and `hf` share.

Of the narrow columns (ids, labels, splits) all rows are held, as Arrow arrays; of the column with the data, one
chunk at a time: a record batch, a row group, or a piece of a row group that is too large to hold.

Of a file in an object store no more is fetched than those columns and that chunk: row groups by Parquet's own index,
record batches by the headers that `arrow_ipc` finds.

Files come from strangers. Whatever a file says about offsets is checked before it is followed
(`validate(full=True)`), since a memory-mapped file with wild offsets would end the process and not the datum; a cell
that names a path instead of holding bytes is not opened. Files that shrink while they are mapped end the process.
"""

import io
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow import types

from nfscale.datasets.arrow_ipc import Batches, batches_of_file, batches_of_stream
from nfscale.datasets.base import ComputedIds, Dataset, Datum, refuse_duplicates, require, row_id
from nfscale.errors import CallerError
from nfscale.files import Files, StoreError
from nfscale.hostile import reason_of
from nfscale.media import MEDIA, Medium, nothing_beside

_CHUNK_BYTES = 64 << 20
"""What a worker holds of a row group. Larger: fewer passes over a huge row group when reads are in no order;
smaller: more workers in a machine's memory."""
_READ_BYTES = 1 << 20  # of a Parquet column at a time; without it a whole column of a row group lies in memory
_OPEN_FILES = 16  # a folder may hold more files than a process may open
_IDS_AT_ONCE = 4096

_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, EOFError)

Decoder = Callable[[pa.Array], Any]
"""A cell, as an array of one valid row, -> the content of its datum. Raises ValueError with the reason."""


@dataclass(frozen=True)
class ArrowColumns:
    """Which columns hold what."""

    data: str
    id: str | None = None
    label: str | None = None
    split: str | None = None
    shape: list[int] | None = None
    modality: str = "image"
    """The kind of the signal, whose medium reads cells that hold the bytes of a file."""

    @property
    def narrow(self) -> list[str]:
        return [name for name in dict.fromkeys((self.id, self.label, self.split)) if name is not None]


def open_columns(files: Files, named: Sequence[tuple[str, str | None]], columns: ArrowColumns) -> "ArrowDataset":
    """A dataset over (name, split) in this order; a file's split counts where no column gives splits.

    Raises:
        CallerError: if a file cannot be read, a column is missing or of a wrong type, or ids are not unique.
    """
    require(
        columns.shape is None or (bool(columns.shape) and min(columns.shape) > 0),
        f"dataset.shape is a list of positive lengths, such as [28, 28], got {columns.shape}",
    )
    parts: list[_Part] = []
    narrow: list[pa.Table] = []
    batches: dict[int, Batches] = {}
    open_part = lru_cache(maxsize=_OPEN_FILES)(
        lambda part: _open(files, named[part][0], columns.data, batches.get(part))
    )
    for path, split in named:
        name = path.rpartition("/")[2]
        try:
            opened = open_part(len(parts))
            if isinstance(opened, _IpcFile) and opened.batches is not None:
                batches[len(parts)] = opened.batches
            _require_columns(name, opened.schema, columns)
            decode = _decoder(opened.schema.field(columns.data), columns)
            part = _Part(name, split, opened.rows, decode)
            if columns.narrow:
                narrow.append(opened.narrow(columns.narrow))
                narrow[-1].validate(full=True)
            parts.append(part)
        except StoreError:
            raise
        except _ARROW_ERRORS as error:
            raise CallerError(f"dataset.path: cannot read {name!r}: {reason_of(error)}") from error
    held = {
        column: [(part.name, table.column(column)) for part, table in zip(parts, narrow, strict=True)]
        for column in columns.narrow
    }
    del narrow
    count = sum(sum(part.rows) for part in parts)
    require(count > 0, "dataset.path: the table has no rows")
    ids = _numbered_ids(parts) if columns.id is None else _ids_of_column(columns.id, held[columns.id])
    labels = None if columns.label is None else _labels_of_column("label", columns.label, held[columns.label])
    splits = None if columns.split is None else _labels_of_column("split", columns.split, held[columns.split])
    require(
        splits is None or not types.is_integer(splits.type),
        f"dataset.split_column: column {columns.split!r} holds integers; expected names such as train and test",
    )
    return ArrowDataset(open_part, parts, columns.data, ids, labels, splits)


class ArrowDataset(Dataset):
    """Rows of the parts, one part after the other."""

    def __init__(
        self,
        open_part: Callable[[int], "_Opened"],
        parts: list["_Part"],
        column: str,
        ids: Sequence[str],
        labels: pa.Array | None,
        splits: pa.Array | None,
    ) -> None:
        self._parts, self._column, self._ids, self._labels, self._splits = parts, column, ids, labels, splits
        self._chunks = [(part, index) for part in range(len(parts)) for index in range(len(parts[part].rows))]
        self._stops = list(accumulate(parts[part].rows[index] for part, index in self._chunks))
        self._opened = open_part
        self._chunk = lru_cache(maxsize=1)(self._load)

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    def read(self, position: int) -> Datum:
        chunk = bisect_right(self._stops, position)
        part = self._parts[self._chunks[chunk][0]]
        row = position - (self._stops[chunk - 1] if chunk else 0)
        label = None if self._labels is None else self._labels[position].as_py()
        split = part.split if self._splits is None else self._splits[position].as_py()
        array, error = None, None
        try:
            cell = _one_row(self._chunk(chunk), row)
            array = part.decode(cell) if cell.null_count == 0 else None
            error = f"the column {self._column!r} holds null here" if array is None else None
        except StoreError:
            raise
        except (*_ARROW_ERRORS, MemoryError) as failed:
            error = reason_of(failed)
        return Datum(self._ids[position], position, array, label, split, error)

    def _load(self, chunk: int) -> pa.ChunkedArray:
        """The rows of a chunk, checked."""
        part, index = self._chunks[chunk]
        rows = self._opened(part).chunk(index)
        if len(rows) != self._parts[part].rows[index]:
            raise ValueError(f"a chunk of {self._parts[part].name!r} has another length than when it was opened")
        rows.validate(full=True)
        return rows


def _one_row(rows: pa.ChunkedArray, row: int) -> pa.Array:
    return next(chunk for chunk in rows.slice(row, 1).chunks if len(chunk))


# --- files


@dataclass(frozen=True)
class _Part:
    """What is remembered of a file that is not open."""

    name: str
    """Without the folders that it lies in, as messages show it."""
    split: str | None
    rows: list[int]
    """Of each chunk."""
    decode: Decoder


class _Opened(Protocol):
    """A file by chunks of its data column."""

    schema: pa.Schema
    rows: list[int]

    def chunk(self, index: int) -> pa.ChunkedArray: ...

    def narrow(self, names: list[str]) -> pa.Table:
        """All rows of some columns."""
        ...


def _open(files: Files, path: str, column: str, batches: Batches | None = None) -> _Opened:
    """A file, by what it starts with, whatever its name says.

    Args:
        batches: of an IPC file in an object store, where they are known.
    """
    source = files.source(path)
    magic = _start_of(source)
    if magic[:4] == b"PAR1":
        return _ParquetFile(source, column)
    if magic == b"ARROW1":
        if isinstance(source, Path):
            return _IpcFile(_mapped(source), column)
        return _remote_ipc(source, column, batches or batches_of_file(source))
    if magic[:4] == b"FEA1":
        raise ValueError("it is of the first version of Feather; write it again with a current pyarrow")
    if magic[:4] == b"\xff\xff\xff\xff":
        if isinstance(source, Path):
            return _IpcStream(source, column)
        return _remote_ipc(source, column, batches or batches_of_stream(source))
    raise ValueError("it is neither Parquet nor Arrow IPC nor Feather, by its first bytes")


def _start_of(source: Path | BinaryIO) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(6)
    source.seek(0)
    return source.read(6)


class _Cursor:
    """Batches by index from an iterator that only goes forward; going back starts it again."""

    def __init__(self, start: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self._start, self._batches, self._next = start, start(), 0

    def at(self, index: int) -> pa.RecordBatch:
        if index < self._next:
            self._batches, self._next = self._start(), 0
        while True:
            try:
                batch = next(self._batches, None)
            except StoreError:
                self._next = sys.maxsize  # the iterator has ended with this; the next call starts again
                raise
            if batch is None:
                raise ValueError("the file has fewer rows than when it was opened")
            self._next += 1
            if self._next > index:
                return batch


class _ParquetFile:
    """Row groups whole, or, where their data are more than `_CHUNK_BYTES`, in pieces that are streamed."""

    def __init__(self, source: Path | BinaryIO, column: str) -> None:
        self._file, self._column = pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES), column
        self.schema: pa.Schema = self._file.schema_arrow
        self._places: list[tuple[int, int, int]] = []  # (row group, piece, rows of a whole piece or 0)
        self.rows: list[int] = []
        self._cursor: tuple[int, _Cursor] | None = None
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            facts = metadata.row_group(group)
            leaves = (facts.column(i) for i in range(facts.num_columns))
            size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == column)
            pieces = max(1, min(-(-size // _CHUNK_BYTES), facts.num_rows))
            step = -(-facts.num_rows // pieces)
            for piece, start in enumerate(range(0, facts.num_rows, step or 1)):
                self._places.append((group, piece, step if pieces > 1 else 0))
                self.rows.append(min(step, facts.num_rows - start))

    def chunk(self, index: int) -> pa.ChunkedArray:
        group, piece, step = self._places[index]
        if not step:
            return self._file.read_row_group(group, columns=[self._column]).column(0)
        if self._cursor is None or self._cursor[0] != group:

            def start() -> Iterator[pa.RecordBatch]:
                return self._file.iter_batches(step, row_groups=[group], columns=[self._column])

            self._cursor = (group, _Cursor(start))
        return pa.chunked_array([self._cursor[1].at(piece).column(0)])

    def narrow(self, names: list[str]) -> pa.Table:
        return self._file.read(columns=names)


def _mapped(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _only(schema: pa.Schema, names: list[str]) -> pa.ipc.IpcReadOptions:
    return pa.ipc.IpcReadOptions(included_fields=sorted(schema.names.index(name) for name in names))


def _cheapest(schema: pa.Schema, column: str) -> list[str]:
    """A column to count rows by: where batches are compressed, counting them decompresses it."""
    return [next((field.name for field in schema if types.is_primitive(field.type)), column)]


class _IpcFile:
    """Record batches of an IPC file (Feather), memory-mapped or read by ranges."""

    def __init__(self, source: pa.Buffer | pa.NativeFile, column: str, batches: Batches | None = None) -> None:
        self._source, self.batches = source, batches
        self.schema: pa.Schema = pa.ipc.open_file(source).schema
        if column in self.schema.names:
            self._reader = self._open([column])
            self.rows: list[int] = self._counted(column) if batches is None else batches.rows

    def _counted(self, column: str) -> list[int]:
        counting = self._open(_cheapest(self.schema, column))
        return [counting.get_batch(i).num_rows for i in range(counting.num_record_batches)]

    def _open(self, names: list[str]) -> Any:
        return pa.ipc.open_file(self._source, options=_only(self.schema, names))

    def chunk(self, index: int) -> pa.ChunkedArray:
        return pa.chunked_array([self._reader.get_batch(index).column(0)])

    def narrow(self, names: list[str]) -> pa.Table:
        return self._open(names).read_all()


def _remote_ipc(file: BinaryIO, column: str, batches: Batches) -> _IpcFile:
    """An IPC file or stream of which one column of one batch is fetched at a time."""
    return _IpcFile(pa.PythonFile(batches.behind(file), "r"), column, batches)


class _IpcStream:
    """Record batches of a memory-mapped IPC stream.

    Where they are not compressed they are views into the mapping, and all of them are kept; else they are
    decompressed again as they are asked for, in order.
    """

    def __init__(self, path: Path, column: str) -> None:
        self._buffer = _mapped(path)
        self.schema: pa.Schema = pa.ipc.open_stream(self._buffer).schema
        if column in self.schema.names:
            self._batches: list[pa.RecordBatch] | None = []
            self.rows: list[int] = []
            for batch in self._open([column]):
                self.rows.append(batch.num_rows)
                if self._batches is not None and self._is_view(batch):
                    self._batches.append(batch)
                else:
                    self._batches = None
            self._cursor = None if self._batches is not None else _Cursor(lambda: iter(self._open([column])))

    def _open(self, names: list[str]) -> Any:
        return pa.ipc.open_stream(self._buffer, options=_only(self.schema, names))

    def _is_view(self, batch: pa.RecordBatch) -> bool:
        start, stop = self._buffer.address, self._buffer.address + self._buffer.size
        buffers = [buffer for buffer in batch.column(0).buffers() if buffer is not None and buffer.size]
        return all(start <= buffer.address < stop for buffer in buffers)

    def chunk(self, index: int) -> pa.ChunkedArray:
        batch = self._cursor.at(index) if self._cursor is not None else self._batches[index]  # type: ignore
        return pa.chunked_array([batch.column(0)])

    def narrow(self, names: list[str]) -> pa.Table:
        return self._open(names).read_all()


# --- narrow columns


def _require_columns(file: str, schema: pa.Schema, columns: ArrowColumns) -> None:
    keys = {"column": columns.data, "id_column": columns.id, "label_column": columns.label}
    for key, name in (keys | {"split_column": columns.split}).items():
        count = 1 if name is None else schema.names.count(name)
        require(
            count == 1,
            f"dataset.{key}: {file!r} has {'no column' if not count else f'{count} columns'} {name!r}; "
            f"its columns: {', '.join(schema.names)}",
        )


def _numbered_ids(parts: list[_Part]) -> Sequence[str]:
    """`row-0000017`, or `train/0000017` counted from each split's start."""
    splits: list[str | None] = []
    counts: list[int] = []
    for part in parts:
        if not splits or splits[-1] != part.split:
            splits.append(part.split)
            counts.append(0)
        counts[-1] += sum(part.rows)
    stops = list(accumulate(counts))

    def id_at(position: int) -> str:
        place = bisect_right(stops, position)
        return row_id(position - (stops[place] - counts[place]), splits[place])

    return ComputedIds(stops[-1], id_at)


class _ArrowIds(ComputedIds):
    """Ids in an Arrow array, at the bytes of their text and 8 each."""

    def __init__(self, array: pa.Array) -> None:
        super().__init__(len(array), lambda position: array[position].as_py())
        self._array = array

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._array), _IDS_AT_ONCE):
            yield from self._array.slice(start, _IDS_AT_ONCE).to_pylist()


def _ids_of_column(name: str, columns: list[tuple[str, pa.ChunkedArray]]) -> Sequence[str]:
    array = _plain("id", name, columns).cast(pa.large_string()).combine_chunks()
    if array.null_count:
        position = array.is_null().index(True).as_py()
        raise CallerError(
            f"dataset.id_column: the column {name!r} is null at position {position}; each datum needs an id"
        )
    ids = _ArrowIds(array)
    refuse_duplicates(ids, f"dataset.id_column, column {name!r}")
    return ids


def _labels_of_column(key: str, name: str, columns: list[tuple[str, pa.ChunkedArray]]) -> pa.Array:
    """int64, or a dictionary of strings."""
    values = _plain(key, name, columns)
    if not types.is_integer(values.type):
        values = values.dictionary_encode()
    return values.combine_chunks()


def _plain(key: str, name: str, columns: list[tuple[str, pa.ChunkedArray]]) -> pa.ChunkedArray:
    """A column of all files as int64 or large_string.

    Raises:
        CallerError: if it holds neither integers nor strings, or integers here and strings there.
    """
    chunks: list[pa.Array] = []
    kinds: dict[Any, str] = {}
    for file, column in columns:
        found = column.type.value_type if types.is_dictionary(column.type) else column.type
        is_text = types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
        if not (is_text or types.is_integer(found) or types.is_boolean(found)):
            raise CallerError(
                f"dataset.{key}_column: the column {name!r} of {file!r} holds {found}; expected integers or strings"
            )
        wanted = pa.large_string() if is_text else pa.int64()
        kinds.setdefault(wanted, file)
        try:
            chunks += column.cast(found).cast(wanted).chunks
        except pa.ArrowInvalid as error:
            raise CallerError(f"dataset.{key}_column: the column {name!r} of {file!r}: {error}") from error
    if len(kinds) > 1:
        files = " and ".join(f"{kind} in {file!r}" for kind, file in kinds.items())
        raise CallerError(f"dataset.{key}_column: the column {name!r} is {files}; expected one type in all files")
    return pa.chunked_array(chunks, type=next(iter(kinds)))


# --- cells


def _is_binary(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _decoder(field: pa.Field, columns: ArrowColumns) -> Decoder:
    """How cells of a type become arrays.

    Raises:
        CallerError: if they cannot.
    """
    kind, shape = field.type, columns.shape
    if isinstance(kind, pa.FixedShapeTensorType):
        return lambda cell: _reshaped(cell.to_numpy_ndarray()[0], shape)
    if isinstance(kind, pa.BaseExtensionType):  # such as the arrays of Hugging Face, where its library is imported
        inner = _decoder(field.with_type(kind.storage_type), columns)
        return lambda cell: inner(cell.storage)
    is_struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    if _is_binary(kind) or is_struct:
        require(
            shape is None, f"dataset.shape is for columns of arrays, and the column {field.name!r} holds encoded files"
        )
        medium = MEDIA[columns.modality]
        return partial(_file_in_struct if is_struct else _file, medium)
    leaf = kind
    while _is_list(leaf):
        leaf = leaf.value_type
    if _is_list(kind) and (types.is_integer(leaf) or types.is_floating(leaf) or types.is_boolean(leaf)):
        return lambda cell: _reshaped(_nested(cell), shape)
    raise CallerError(
        f"dataset.column: the column {field.name!r} holds {kind}; expected encoded images (binary, or a struct with "
        "bytes) or arrays of numbers (list, fixed_size_list, fixed_shape_tensor)"
    )


def _file(medium: Medium, cell: pa.Array, name: str = "") -> Any:
    return medium.read(io.BytesIO(cell[0].as_buffer()), name, nothing_beside)


def _file_in_struct(medium: Medium, cell: pa.Array) -> Any:
    content = cell.field("bytes")
    if content.null_count:
        raise ValueError("the cell names a file and holds no bytes; write the dataset with its files embedded")
    named = cell.type.get_field_index("path") >= 0 and cell.field("path")[0].as_py()
    return _file(medium, content, named if isinstance(named, str) else "")


def _nested(cell: pa.Array) -> np.ndarray:
    """Lists in lists, of equal lengths at each level, as an array."""
    shape, values = [], cell
    while _is_list(values.type):
        if values.null_count:
            raise ValueError("a list inside the cell is null")
        lengths = pc.call_function("list_value_length", [values]).unique().to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"lists of {min(lengths)} to {max(lengths)} values in one array; expected equal lengths")
        shape.append(lengths[0] if lengths else 0)
        values = values.flatten()
    if values.null_count:
        raise ValueError("a value inside the cell is null")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _reshaped(array: np.ndarray, shape: list[int] | None) -> np.ndarray:
    """A copy: the cell itself lies in read-only memory that may be unmapped."""
    if shape is not None:
        if array.size != np.prod(shape, dtype=object):
            raise ValueError(f"the cell holds {array.size} values in {list(array.shape)}; dataset.shape is {shape}")
        array = array.reshape(shape)
    return np.array(array)
