"""Files that appear whole or not at all, and at most once.

A local link or rename is atomic; a write is not. Every file of a run folder is therefore written under a
name of its own, flushed to the disk, and only then given the name that others look for.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def put_if_absent(path: Path, content: bytes) -> bool:
    """Create a file with this content; False, and nothing changed, if it exists already."""
    temporary = _written(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def replace(path: Path, content: bytes) -> None:
    """Create a file or replace it; a reader sees the old content or the new."""
    _written(path, content).replace(path)


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
