"""The contract of a place where files lie.

What a run needs of it is little: a file appears whole or not at all, and one of several writers of the same
name can be told that it was not the first. Both a local file system and an object store can do that.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from nfscale.errors import EncodeError


class StoreError(EncodeError, OSError):
    """The place itself fails, and no other file of it would fare better: an object store that does not answer."""


class StoreRefusedError(StoreError):
    """The place will not serve this caller: there is no such bucket, or the credentials are wrong or have expired."""


class Entry(NamedTuple):
    """What a listing tells of a file."""

    size: int
    """In bytes."""
    version: str
    """Another one when the content is another."""


class Files(Protocol):
    """Files below a root, named by relative paths with slashes.

    What cannot be reached, read or written raises OSError with a message for the user; what is not there
    FileNotFoundError, what may not be read PermissionError; where that is no fault of the file, StoreError.
    """

    root: str
    """As the user wrote it."""

    def place(self, name: str = "") -> str:
        """Path or URI of a file, or of the root, as messages show it."""
        ...

    def absolute(self) -> str:
        """The root as any other process finds it, whatever folder it works in."""
        ...

    def size(self, name: str) -> int | None:
        """Size in bytes; None where there is no such file."""
        ...

    def entry(self, name: str) -> Entry | None:
        """Size and version; None where there is no such file."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder, sorted; without those that are still being written."""
        ...

    def unfinished(self) -> list[str]:
        """What writers left that were killed before their files had appeared."""
        ...

    def some_entries(self, count: int) -> list[str]:
        """A few of the files and folders directly below the root, for a message; empty where there are none.

        Raises:
            NotADirectoryError: if the root is a file.
        """
        ...

    def read(self, name: str) -> bytes: ...

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Small files, where the answer of each is slow to come several at a time."""
        ...

    def range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file; fewer where it ends before."""
        ...

    def source(self, name: str) -> Path | BinaryIO:
        """A file as pyarrow opens it best."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A file for reading at any place; of an object little more is fetched than what is read."""
        ...

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Create a file with this content; False, and nothing changed, if another has this name already."""
        ...

    def replace(self, name: str, content: bytes) -> None:
        """Create a file or replace it; a reader sees the old content or the new."""
        ...

    def writing(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A stream whose content becomes the file when the block ends well."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        ...

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content, as hex."""
        ...

    def local_copy(self, name: str) -> AbstractContextManager[Path]:
        """A file of this machine with the content and the name of this one, to be read while the block runs."""
        ...

    def arrow(self) -> tuple[Any, str]:
        """(file system, prefix of names) with which pyarrow opens many files; (None, ...) for local paths."""
        ...

    def refuse_shared_names(self, name: str) -> None:
        """Check, on a file that exists, that a second writer of a name is refused here: commits rest on it.

        Raises:
            CallerError: if it is not.
        """
        ...
