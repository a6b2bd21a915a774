"""Where the record batches of an Arrow IPC file lie, found by reading headers alone.

pyarrow reads one column of one batch by ranges, from a file that ends with an index of its batches. Two things are
missing where files are far away and not memory-mapped: a stream (what Hugging Face's `save_to_disk` writes) has no
such index, so pyarrow would read it from its start; and the number of rows of a batch is told with its content. Both
stand in headers of a few hundred bytes, which are read here (flatbuffers: Message.fbs and File.fbs of Arrow).

Files come from strangers: a header that lies gives a ValueError here, or one of pyarrow, which checks what it reads.
"""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

_MAGIC = b"ARROW1"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # kinds of messages
_HEADER_BYTES = 64 << 20  # of one header; real ones hold a schema, or 40 bytes for each column
_BATCH_BYTES = 4 << 30
"""A batch of more is refused: a worker would hold its column whole. pyarrow writes 65,536 rows into one by default."""


@dataclass(frozen=True)
class _Message:
    kind: int
    offset: int
    header_bytes: int
    """With the 8 bytes before it that tell its length."""
    body_bytes: int
    rows: int
    header: bytes
    """The flatbuffer."""


@dataclass(frozen=True)
class Batches:
    """What the headers say of the record batches of a file or a stream."""

    rows: list[int]
    """Of each."""
    index: bytes
    """What, put behind a stream, makes a file of it; empty for a file."""

    def behind(self, file: BinaryIO) -> BinaryIO:
        """The file, or the stream as a file."""
        return cast("BinaryIO", _Longer(file, self.index)) if self.index else file


def batches_of_file(file: BinaryIO) -> Batches:
    """
    Raises:
        ValueError: if the file's index or a header is damaged, or a batch is too large to be held.
    """
    size = file.seek(0, os.SEEK_END)
    rows = []
    for offset in _offsets_of_batches(file, size):
        message = _message_at(file, offset, size)
        if message is None or message.kind != _BATCH:
            raise ValueError(f"there is no record batch at byte {offset}, where the index of the file has one")
        rows.append(message.rows)
    return Batches(rows, b"")


def batches_of_stream(stream: BinaryIO) -> Batches:
    """
    Raises:
        ValueError: if a header is damaged, the stream ends within a batch, or a batch is too large to be held.
    """
    messages = list(_messages(stream, stream.seek(0, os.SEEK_END)))
    if not messages or messages[0].kind != _SCHEMA:
        raise ValueError("it starts with no schema")
    footer = _footer(messages)
    rows = [message.rows for message in messages if message.kind == _BATCH]
    return Batches(rows, footer + struct.pack("<i", len(footer)) + _MAGIC)


def _messages(stream: BinaryIO, size: int) -> Iterator[_Message]:
    offset = 0
    while message := _message_at(stream, offset, size):
        yield message
        offset += message.header_bytes + message.body_bytes


def _message_at(file: BinaryIO, offset: int, size: int) -> _Message | None:
    """The message whose header starts here; None where the stream ends."""
    if offset < 0:
        raise ValueError(f"a place before the start of the file: {offset}")
    file.seek(offset)
    prefix = file.read(8)
    if not prefix or prefix == b"\xff\xff\xff\xff\0\0\0\0":
        return None
    if len(prefix) < 8 or prefix[:4] != b"\xff\xff\xff\xff":
        raise ValueError(f"there is no header at byte {offset}")
    length = int.from_bytes(prefix[4:], "little", signed=True)
    if not 0 < length <= _HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes at byte {offset}")
    header = file.read(length)
    try:
        body_bytes, kind, rows = _facts(header)
    except (struct.error, IndexError) as error:
        raise ValueError(f"the header at byte {offset} is damaged") from error
    if len(header) < length or body_bytes < 0 or rows < 0 or offset + 8 + length + body_bytes > size:
        raise ValueError(f"the header at byte {offset} is damaged, or the file ends behind it")
    if body_bytes > _BATCH_BYTES:
        raise ValueError(
            f"a record batch of {body_bytes:,} bytes, of which every worker would hold a column; write batches of "
            "fewer rows, or Parquet"
        )
    return _Message(kind, offset, 8 + length, body_bytes, rows, header)


# --- flatbuffers: a table is a place, its fields are found by a list of 16-bit offsets


def _number(buffer: bytes, place: int, format: str) -> int:
    if place < 0:
        raise IndexError(place)  # Python would count from the end
    return struct.unpack_from(format, buffer, place)[0]


def _below(buffer: bytes, place: int) -> int:
    """The place that an offset stored here leads to."""
    return place + _number(buffer, place, "<I")


def _field(buffer: bytes, table: int, index: int) -> int | None:
    """Where a field of a table is stored; None if it has its default."""
    fields = table - _number(buffer, table, "<i")
    if 4 + 2 * index >= _number(buffer, fields, "<H"):
        return None
    return table + offset if (offset := _number(buffer, fields + 4 + 2 * index, "<H")) else None


def _scalar(buffer: bytes, table: int, index: int, format: str) -> int:
    place = _field(buffer, table, index)
    return 0 if place is None else _number(buffer, place, format)


def _facts(header: bytes) -> tuple[int, int, int]:
    """(bytes of the body, kind, rows if it is a batch) of a message."""
    message = _below(header, 0)
    kind = _scalar(header, message, 1, "<B")
    content = _field(header, message, 2)
    rows = _scalar(header, _below(header, content), 0, "<q") if kind == _BATCH and content is not None else 0
    return _scalar(header, message, 3, "<q"), kind, rows


def _offsets_of_batches(file: BinaryIO, size: int) -> list[int]:
    """Where the index at the end of a file says that its record batches start."""
    file.seek(max(0, size - len(_MAGIC) - 4))
    end = file.read(len(_MAGIC) + 4)
    length = int.from_bytes(end[:4], "little", signed=True)
    if end[4:] != _MAGIC or not 0 < length <= size - len(end):
        raise ValueError("it ends without the index of an IPC file, so it is cut off")
    file.seek(size - len(end) - length)
    footer = file.read(length)
    try:
        place = _field(footer, _below(footer, 0), 3)
        if place is None:
            return []
        blocks = _below(footer, place)
        count = _number(footer, blocks, "<I")
        if count > length // 24:
            raise IndexError(count)
        return [_number(footer, blocks + 4 + 24 * index, "<q") for index in range(count)]
    except (struct.error, IndexError) as error:
        raise ValueError("the index at its end is damaged") from error


def _footer(messages: list[_Message]) -> bytes:
    """The index of a file: its schema, and where dictionaries and batches lie."""
    header = messages[0].header
    message = _below(header, 0)
    content = _field(header, message, 2)
    if content is None:
        raise ValueError("it starts with an empty schema")
    blocks = [
        b"".join(struct.pack("<qi4xq", m.offset, m.header_bytes, m.body_bytes) for m in messages if m.kind == kind)
        for kind in (_DICTIONARY, _BATCH)
    ]
    # Vectors are 4 bytes of length and blocks aligned to 8; the schema is left where it is in its message.
    dictionaries = 36
    batches = dictionaries + 4 + len(blocks[0]) + 4
    schema = batches + 4 + len(blocks[1])
    table = struct.pack(
        "<IHHHHHHih2xIII",
        16,  # the table
        *(12, 20, 4, 8, 12, 16),  # its fields: 12 bytes that describe a table of 20, and where each lies in it
        12,  # from the table back to its fields
        _scalar(header, message, 0, "<h"),  # version of the format
        schema + _below(header, content) - 24,
        dictionaries - 28,
        batches - 32,
    )
    vectors = [struct.pack("<I", len(part) // 24) + part for part in blocks]
    return table + vectors[0] + b"\0\0\0\0" + vectors[1] + header


class _Longer(io.BufferedIOBase):
    """A file with some bytes behind its own."""

    def __init__(self, file: BinaryIO, more: bytes) -> None:
        self._file, self._size, self._more, self._at = file, file.seek(0, os.SEEK_END), more, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size + len(self._more)}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size + len(self._more) if size is None or size < 0 else self._at + size
        content = b""
        if self._at < self._size:
            self._file.seek(self._at)
            content = self._file.read(min(stop, self._size) - self._at)
        if stop > self._size:
            content += self._more[max(0, self._at - self._size) : stop - self._size]
        self._at += len(content)
        return content
