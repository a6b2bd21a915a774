"""Files of a local or shared file system, which appear whole or not at all, and at most once.

A local link or rename is atomic; a write is not. Every file is therefore written under a name of its own,
flushed to the disk, and only then given the name that others look for.
"""

import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from nfscale.files.base import Entry

_HEX = 32  # digits that make a writer's name its own


class LocalFiles:
    """Files below a folder."""

    def __init__(self, root: str | Path) -> None:
        self.path = Path(root)
        self.root = str(root)

    def place(self, name: str = "") -> str:
        return str(self.path / name)

    def absolute(self) -> str:
        return os.path.abspath(self.path)

    def size(self, name: str) -> int | None:
        found = self.entry(name)
        return None if found is None else found.size

    def entry(self, name: str) -> Entry | None:
        try:
            found = (self.path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(found.st_size, str(found.st_mtime_ns))

    def names(self, folder: str = "") -> list[str]:
        found = (path for path in (self.path / folder).rglob("*") if path.is_file() and not _is_unfinished(path))
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def unfinished(self) -> list[str]:
        found = (path for path in self.path.rglob(".*") if _is_unfinished(path))
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def some_entries(self, count: int) -> list[str]:
        if not self.path.exists():
            return []
        visible = (path.name for path in self.path.iterdir() if not path.name.startswith("."))
        return sorted(islice(visible, count))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def range(self, name: str, start: int, length: int) -> bytes:
        with self.open(name) as file:
            file.seek(start)
            return file.read(length)

    def source(self, name: str) -> Path:
        return self.path / name

    def open(self, name: str) -> io.BufferedReader:
        return (self.path / name).open("rb")

    def put_if_absent(self, name: str, content: bytes) -> bool:
        path = self.path / name
        with _written(path) as (temporary, file):
            file.write(content)
            _finish(file)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    def replace(self, name: str, content: bytes) -> None:
        with self.writing(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        path = self.path / name
        with _written(path) as (temporary, file):
            yield file
            _finish(file)
            temporary.replace(path)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def sha256(self, name: str) -> str:
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self.path / name

    def arrow(self) -> tuple[Any, str]:
        return None, f"{self.path}/"

    def refuse_shared_names(self, name: str) -> None:
        """Links are atomic wherever they exist; where they do not, the first file has said so."""


@contextlib.contextmanager
def _written(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A temporary file beside `path` that is gone afterwards, unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield temporary, file
    finally:
        with contextlib.suppress(OSError):  # a disk that has failed must not hide why
            temporary.unlink(missing_ok=True)


def _finish(file: BinaryIO) -> None:
    """Flush to the disk, and close."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".") and len(path.suffix) == _HEX + 1
