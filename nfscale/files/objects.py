"""Files in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

By obstore (bindings of the Rust crate object_store): one library for the three, with the conditional put on
which commits rest (`If-None-Match: *`, on GCS a generation match). Credentials and endpoints come from the
environment, under the names that the vendors' own tools use: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...

Dangers, each guarded here:
- A put that is repeated after its answer was lost finds its own object and is told that it was late: on that
  answer the object is read, and whose content it is decides.
- A store that does not know conditional puts overwrites without a word: `refuse_shared_names` tries it.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from nfscale.errors import CallerError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
"""Of the URIs that name an object store."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_READ_BYTES = 1 << 20  # of an object at a time: a request costs tens of milliseconds, a mebibyte about ten
_READS_AT_ONCE = 32  # 100,000 commits in a minute where each answer takes 20 ms
_SPOOL_BYTES = 64 << 20  # of a file that is being written: larger ones go over the disk


def is_uri(location: str | Path) -> bool:
    """Whether this names an object store and not a local path."""
    return isinstance(location, str) and "://" in location


class ObjectFiles:
    """Objects below a prefix of a bucket or container."""

    def __init__(self, uri: str) -> None:
        scheme, _, rest = uri.partition("://")
        if scheme not in SCHEMES or not rest.strip("/"):
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise CallerError(f"cannot use {uri!r}; expected a local path or a URI with a bucket, by one of {known}")
        self.root = uri.rstrip("/")
        self._scheme, self._rest = scheme, rest.strip("/")

    @cached_property
    def _store(self) -> Any:
        from obstore.store import from_url

        with self._said(""):
            return from_url(self.root, client_options=_client_options())

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Errors of the store as OSError, in one sentence."""
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.BaseError) as error:
            if any(said in str(error) for said in _NO_BUCKET):
                raise OSError(f"{self.root}: there is no such bucket") from error
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{self.place(name)} does not exist") from error
            if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
                raise PermissionError(f"{self.place(name)}: access is denied ({_sentence(error)})") from error
            raise OSError(f"{self.place(name)}: {_sentence(error)}") from error

    def place(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    def absolute(self) -> str:
        return self.root

    def size(self, name: str) -> int | None:
        import obstore

        try:
            with self._said(name):
                return obstore.head(self._store, name)["size"]
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        import obstore

        with self._said(folder):
            pages = obstore.list(self._store, folder or None)
            return sorted(found["path"] for page in pages for found in page)

    def unfinished(self) -> list[str]:
        return []  # an object appears at the end of its put; parts of one that was cut off are no objects

    def some_entries(self, count: int) -> list[str]:
        import obstore

        with self._said(""):
            page = next(iter(obstore.list(self._store, chunk_size=count)), [])
        return [found["path"] for found in page]

    def read(self, name: str) -> bytes:
        import obstore

        with self._said(name):
            return bytes(obstore.get(self._store, name).bytes())

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            return list(pool.map(self.read, names))

    def source(self, name: str) -> BinaryIO:
        return self.open(name)

    def open(self, name: str) -> BinaryIO:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.place(name)} does not exist")
        return cast("BinaryIO", io.BufferedReader(_Ranges(self, name, size), _READ_BYTES))

    def range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of an object."""
        import obstore

        with self._said(name):
            return bytes(obstore.get_range(self._store, name, start=start, length=length))

    def put_if_absent(self, name: str, content: bytes) -> bool:
        return self._created(name, content) or self.read(name) == content

    def _created(self, name: str, content: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._said(name):
            try:
                obstore.put(self._store, name, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def replace(self, name: str, content: bytes) -> None:
        import obstore

        with self._said(name):
            obstore.put(self._store, name, content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        import obstore

        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            yield cast("BinaryIO", spool)
            spool.seek(0)
            with self._said(name):
                obstore.put(self._store, name, cast("BinaryIO", spool))

    def remove(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError), self._said(name):
            obstore.delete(self._store, name)

    def sha256(self, name: str) -> str:
        with self.open(name) as file:
            digest = hashlib.sha256()
            while part := file.read(_SPOOL_BYTES):
                digest.update(part)
        return digest.hexdigest()

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="nfscale-") as folder:
            copy = Path(folder) / name.rpartition("/")[2]
            copy.write_bytes(self.read(name))
            yield copy

    def arrow(self) -> tuple[Any, str]:
        from obstore.fsspec import FsspecStore
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        # Not one from a cache: the environment may name another endpoint by now.
        store = FsspecStore(cast("Any", self._scheme), client_options=_client_options(), skip_instance_cache=True)
        return PyFileSystem(FSSpecHandler(store)), f"{self._rest}/"

    def refuse_shared_names(self, name: str) -> None:
        if self._created(name, self.read(name)):
            raise CallerError(
                f"{self.root}: this store ignores the condition of a put (If-None-Match: *), so two workers could "
                "commit the same shard; use one that knows it (AWS S3, GCS, Azure, current MinIO or Ceph)"
            )


_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT")


def _client_options() -> Any:
    """Plain HTTP for those who name an endpoint that speaks it."""
    return {"allow_http": True} if any(os.environ.get(n, "").startswith("http://") for n in _ENDPOINTS) else {}


class _Ranges(io.RawIOBase):
    """An object as a file that is read at any place."""

    def __init__(self, files: ObjectFiles, name: str, size: int) -> None:
        self._files, self._name, self._size, self._at = files, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"a place before the start of the file: {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        content = self._files.range(self._name, self._at, length)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _sentence(error: BaseException) -> str:
    """What a store said, without what is for its developers."""
    text = " ".join(str(error).split("Debug source")[0].split())
    return text[:300]
