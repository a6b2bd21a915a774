"""NumPy's own files: an array [N, ...] in a .npy or .npz, one datum for each index of its first axis.

Arrays are memory-mapped where they lie: a .npy, and a member of a .npz that is stored without compression (what
`np.savez` writes; `np.savez_compressed` does not), or, in an object store, read by ranges of rows. A compressed
member is read whole, once per process.

Pickle is never read, so arrays of Python objects are refused. A file that shrinks while it is mapped ends the
process.
"""

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from nfscale.datasets.base import ComputedIds, Dataset, Datum, Label, refuse_duplicates, require, row_id
from nfscale.datasets.places import located, opening
from nfscale.errors import CallerError
from nfscale.files import Files, StoreError
from nfscale.hostile import reason_of

_USUAL = ("images", "data", "array", "arrays", "x", "X", "arr_0")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of its name and its extra field
_READ_ERRORS = (
    *(OSError, ValueError, EOFError, OverflowError, NotImplementedError),
    *(zipfile.BadZipFile, struct.error, zlib.error),
)
_MAPPED_VALUES = 16 << 20
"""Of one datum: one with more is handed out as it is mapped, for signals that read some of its values at a time."""
_HELD_BYTES = 8 << 30
"""A member of more is refused where it cannot be read by rows: every worker of a machine would hold it."""


@dataclass(frozen=True)
class Npz:
    """A .npy file, or members of a .npz file."""

    path: str
    array: str | None = None
    """The member [N, ...] with the data; without one the only array of two axes or more, or one of the usual name."""
    labels: str | None = None
    """The member [N] with labels: integers or text."""
    ids: str | None = None
    """The member [N] with ids, all different: text or integers; without one, data are `row-0000017`."""
    splits: str | None = None
    """The member [N] with the names of splits."""

    def open(self) -> "NpzDataset":
        files, name = located(self.path, "file")
        assert name is not None
        try:
            with opening("dataset.path"):
                is_zip = files.range(name, 0, 2) == b"PK"
                return self._open_npz(files, name) if is_zip else self._open_npy(files, name)
        except StoreError:
            raise
        except _READ_ERRORS as error:
            raise CallerError(f"dataset.path: cannot read {name!r}: {error}") from error

    def _open_npy(self, files: Files, path: str) -> "NpzDataset":
        named = {key: getattr(self, key) for key in ("array", "labels", "ids", "splits")}
        for key, name in named.items():
            require(
                name is None,
                f"dataset.{key}: {path!r} holds one array without a name; a .npz (np.savez) has members",
            )
        array = _mapped(files.source(path), 0, None, "the array")
        return NpzDataset(_require_data(array, "the array"), None, None, None)

    def _open_npz(self, files: Files, path: str) -> "NpzDataset":
        members = _Members(files, path)
        data = members.read("array", self.array if self.array is not None else members.usual())
        _require_data(data, "the array" if self.array is None else repr(self.array))
        columns = dict.fromkeys(("labels", "ids", "splits"))
        for key in columns:
            if (name := getattr(self, key)) is not None:
                columns[key] = _require_column(np.asarray(members.read(key, name)), key, name, len(data))
        require(
            columns["splits"] is None or columns["splits"].dtype.kind in "US",
            f"dataset.splits: {self.splits!r} holds numbers; expected names such as train and test",
        )
        return NpzDataset(data, columns["labels"], columns["ids"], columns["splits"])


class NpzDataset(Dataset):
    """Slices of an array [N, ...]."""

    def __init__(
        self, data: "np.ndarray | _Rows", labels: np.ndarray | None, ids: np.ndarray | None, splits: np.ndarray | None
    ) -> None:
        self._data, self._labels, self._splits = data, labels, splits
        self._ids = ComputedIds(len(data), row_id if ids is None else lambda position: str(_plain(ids[position])))
        if ids is not None:
            refuse_duplicates(self._ids, "dataset.ids")

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    def read(self, position: int) -> Datum:
        label = None if self._labels is None else _plain(self._labels[position])
        split = None if self._splits is None else str(_plain(self._splits[position])) or None
        try:
            data = self._data[position]
            if isinstance(data, np.memmap) and data.size > _MAPPED_VALUES and data.dtype.isnative:
                return Datum(self._ids[position], position, data, label, split)
            array = np.array(data, dtype=data.dtype.newbyteorder("="))  # a copy: the mapping is read-only
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            return Datum(self._ids[position], position, None, label, split, reason_of(error))
        return Datum(self._ids[position], position, array, label, split)


def _plain(value: Any) -> Label:
    """A NumPy scalar as Python's int or str."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value) if isinstance(value, str) else int(value)


def _require_data(array: "np.ndarray | _Rows", name: str) -> "np.ndarray | _Rows":
    require(
        len(array.shape) >= 2 and len(array) > 0 and array.dtype.kind in "biuf",
        f"dataset.path: {name} is {array.dtype} {list(array.shape)}; expected numbers [N, ...], one datum per index",
    )
    return array


def _require_column(array: np.ndarray, key: str, name: str, count: int) -> np.ndarray:
    if array.shape == (count, 1):
        array = array[:, 0]
    require(
        array.shape == (count,) and array.dtype.kind in "biuUS",
        f"dataset.{key}: {name!r} is {array.dtype} {list(array.shape)}; expected integers or text [{count}]",
    )
    return array


class _Members:
    """The arrays inside a .npz."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        with self._archive() as archive:
            self._infos = {
                i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")
            }
        require(bool(self._infos), f"dataset.path: {name!r} is a zip file without arrays; expected a .npz")

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with self._files.open(self._name) as file, zipfile.ZipFile(file) as archive:
            yield archive

    def usual(self) -> str:
        """The name of the array with the data, where the job does not say it."""
        names = list(self._infos)
        if len(names) > 1:
            names = [name for name in names if len(self._shape(name)) >= 2]
        found = names if len(names) == 1 else [name for name in _USUAL if name in names]
        require(
            len(found) == 1,
            f"dataset.array: {self._name!r} holds several arrays, and none or several have a usual name; "
            f"name one of: {', '.join(self._infos)}",
        )
        return found[0]

    def _shape(self, name: str) -> tuple[int, ...]:
        with self._archive() as archive, archive.open(self._infos[name]) as file:
            return _header(file, name)[0]

    def read(self, key: str, name: str) -> "np.ndarray | _Rows":
        """A member, memory-mapped or by rows if it can be.

        Raises:
            CallerError: if there is none of this name, or it is not to be read.
        """
        require(
            name in self._infos,
            f"dataset.{key}: {self._name!r} has no array {name!r}; its arrays: {', '.join(self._infos)}",
        )
        info = self._infos[name]
        if info.flag_bits & 0x1:
            raise CallerError(f"dataset.{key}: {name!r} is encrypted; write it with np.savez")
        if info.compress_type == zipfile.ZIP_STORED:
            header = self._files.range(self._name, info.header_offset, _LOCAL_HEADER.size)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\x03\x04":
                raise ValueError(f"{name!r} does not lie where the directory of the zip file says")
            offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            return _mapped(self._files.source(self._name), offset, info.file_size, repr(name))
        require(
            info.file_size <= _HELD_BYTES,
            f"dataset.{key}: {name!r} is compressed and takes {info.file_size >> 30} GiB of memory in every worker; "
            "np.savez writes it uncompressed, and it is then read from the disk as it is needed",
        )
        with self._archive() as archive, archive.open(info) as file:
            shape, fortran, dtype = _header(file, repr(name))
            content = file.read(_bytes_of(shape, dtype) + 1)
        if len(content) != _bytes_of(shape, dtype):
            raise ValueError(f"{name!r} claims {_bytes_of(shape, dtype)} bytes of values and has {len(content)}")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of a .npy whose start the file is at; it is left at the values."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name} is of version {version} of the .npy format")
    # Version 3 differs from 2 in the encoding of names of structured types, which are refused anyway.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise CallerError(
            f"dataset.path: {name} holds Python objects, which only pickle reads, and pickle can run anything; "
            "save text with .astype(str) and arrays of one shape with np.stack"
        )
    return shape, fortran, dtype


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _mapped(source: Path | BinaryIO, offset: int, size: int | None, name: str) -> "np.ndarray | _Rows":
    """The .npy of `size` bytes (None: all there are) at an offset of a file: memory-mapped, or by rows."""
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        behind = file.seek(0, os.SEEK_END) - offset
        file.seek(offset)
        shape, fortran, dtype = _header(file, name)
        start = file.tell()
    available = (behind if size is None else min(size, behind)) - (start - offset)
    wanted = _bytes_of(shape, dtype)
    if wanted > available:
        raise ValueError(f"{name} claims {wanted} bytes of values and has {available}: it is cut off")
    if not wanted:
        return np.empty(shape, dtype)
    if isinstance(source, Path):
        return np.memmap(source, dtype, "r", start, shape, "F" if fortran else "C")
    if shape and not fortran:
        return _Rows(source, start, shape, dtype)
    require(
        wanted <= _HELD_BYTES,
        f"dataset.path: {name} lies in Fortran order, so a datum is spread over all of its {wanted >> 30} GiB; "
        "np.save(..., np.ascontiguousarray(array)) writes data one after the other",
    )
    source.seek(start)
    return np.frombuffer(source.read(wanted), dtype).reshape(shape, order="F")


class _Rows:
    """An array [N, ...] in a file that is read a row at a time; the file reads ahead where rows follow each other."""

    def __init__(self, file: BinaryIO, start: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._file, self._start = file, start
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """
        Raises:
            OSError: if the file cannot be read.
            ValueError: if it has become shorter.
        """
        return self._read(row, 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(0, len(self))

    def _read(self, first: int, count: int) -> np.ndarray:
        row_bytes = _bytes_of(self.shape[1:], self.dtype)
        self._file.seek(self._start + first * row_bytes)
        content = self._file.read(count * row_bytes)
        if len(content) < count * row_bytes:
            raise ValueError("the file ends before this row; it has become shorter since it was opened")
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
