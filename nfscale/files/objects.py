"""Files in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

By obstore (bindings of the Rust crate object_store): one library for the three, with the conditional put on
which commits rest (`If-None-Match: *`, on GCS a generation match). Credentials and endpoints come from the
environment, under the names that the vendors' own tools use: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...

Dangers, each guarded here:
- A put that is repeated after its answer was lost finds its own object and is told that it was late: on that
  answer the object is read, and whose content it is decides.
- A store that does not know conditional puts overwrites without a word: `refuse_shared_names` tries it.
- A key with an empty segment, `.`, `..` or a control character cannot be addressed by object_store, which refuses
  the whole listing that it is in: an error that names the key.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from nfscale.errors import CallerError
from nfscale.files.base import Entry, StoreError, StoreRefusedError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
"""Of the URIs that name an object store."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_BAD_CREDENTIALS = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"),  # S3
    "AuthenticationFailed",  # Azure
)
"""Of a refusal that concerns no single object."""
_NO_CREDENTIALS = "http://169.254.169.254/"  # where a machine of the vendor asks for its own, when nothing else is set
_NO_ADDRESS = "invalid path"
_PAST_THE_END = "416 Range Not Satisfiable"
_RETRY: Any = {  # half a minute: shorter outages are sat out, longer ones end the run, to be repeated
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=8), "base": 3},
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=1),
}
_FIRST_BYTES = 8 << 10  # fetched at a jump: a header, and not what it describes
_AHEAD_BYTES = 1 << 20  # at most, where reading goes on: a request costs tens of milliseconds, a mebibyte about ten
_NEAR_BYTES = 32 << 10  # a gap that is sooner read than jumped over
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

        bucket, slash, prefix = self._rest.partition("/")
        with self._said(""):  # the prefix is meant as it stands: from_url would take `#`, `?` and `%` for its own
            return from_url(
                f"{self._scheme}://{bucket}{slash}{quote(prefix)}",
                client_options=_client_options(),
                retry_config=_RETRY,
            )

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Errors of the store as OSError, in one sentence."""
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.BaseError) as error:
            text = str(error)
            if any(said in text for said in _NO_BUCKET):
                raise StoreRefusedError(f"{self.root}: there is no such bucket") from error
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{self.place(name)} does not exist") from error
            if _NO_CREDENTIALS in text:
                raise StoreRefusedError(
                    f"{self.root}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what "
                    "your store calls them (AWS_SKIP_SIGNATURE=true for a public bucket)"
                ) from error
            if isinstance(error, exceptions.UnauthenticatedError) or any(said in text for said in _BAD_CREDENTIALS):
                raise StoreRefusedError(f"{self.root}: the credentials are refused ({_sentence(error)})") from error
            if isinstance(error, exceptions.PermissionDeniedError):
                raise PermissionError(f"{self.place(name)}: access is denied ({_sentence(error)})") from error
            if _NO_ADDRESS in text or isinstance(error, exceptions.InvalidPathError):
                raise StoreRefusedError(
                    f"{self.place(name)}: a key that no reader can address; remove it, or rename it without empty, "
                    f"`.` and `..` segments and control characters ({_sentence(error)})"
                ) from error
            raise StoreError(f"{self.place(name)}: {_sentence(error)}") from error

    def place(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    def absolute(self) -> str:
        return self.root

    def size(self, name: str) -> int | None:
        found = self.entry(name)
        return None if found is None else found.size

    def entry(self, name: str) -> Entry | None:
        import obstore

        try:
            with self._said(name):
                return _entry(obstore.head(self._store, name))
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        return sorted(self.entries(folder))

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """All objects below a folder by their names, as they are listed."""
        import obstore

        with self._said(folder):
            pages = obstore.list(self._store, folder or None)
            found = {one["path"]: _entry(one) for page in pages for one in page}
        # `a/` is an empty object where a tool has created a folder; it is listed as `a`, and cannot be read.
        if empty := [name for name, entry in found.items() if not entry.size]:
            folders = {name[:end] for name in found for end, letter in enumerate(name) if letter == "/"}
            for name in folders.intersection(empty):
                del found[name]
        return found

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
        return cast("BinaryIO", _Ranges(self, name, size))

    def range(self, name: str, start: int, length: int) -> bytes:
        import obstore
        from obstore.exceptions import GenericError

        if start < 0:
            raise ValueError(f"a place before the start of the file: {start}")
        if length <= 0:
            return b""
        with self._said(name):
            try:
                return bytes(obstore.get_range(self._store, name, start=start, length=length))
            except GenericError as error:
                if _PAST_THE_END in str(error):
                    return b""
                raise

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
        store = FsspecStore(cast("Any", self._scheme), client_options=_client_options(), skip_instance_cache=True)  # type: ignore
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


class _Ranges(io.BufferedIOBase):
    """An object as a file that is read at any place.

    After a jump little is fetched beyond what is asked for, and more each time that reading goes on from there: an
    index of headers costs no content, a file that is read from one end to the other few requests.
    """

    def __init__(self, files: ObjectFiles, name: str, size: int) -> None:
        self._files, self._name, self._size, self._at = files, name, size, 0
        self._held, self._start = b"", -_NEAR_BYTES - 1  # the bytes fetched last, and where they lie
        self._ahead = 0

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

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        content = self._of_held(self._at, stop)
        if self._at + len(content) < stop:
            content += self._fetched(self._at + len(content), stop)
        self._at += len(content)
        return content

    read1 = read

    def _of_held(self, start: int, stop: int) -> bytes:
        inside = 0 <= start - self._start < len(self._held)
        return self._held[start - self._start : stop - self._start] if inside else b""

    def _fetched(self, start: int, stop: int) -> bytes:
        """Bytes from the store, and some more for the next time."""
        goes_on = 0 <= start - (self._start + len(self._held)) <= _NEAR_BYTES
        length = max(stop - start, min(2 * self._ahead, _AHEAD_BYTES) if goes_on else _FIRST_BYTES)
        first = start if goes_on else max(0, min(start, self._size - length))  # what ends a file is read backwards
        fetched = self._files.range(self._name, first, min(length, self._size - first))
        self._ahead = min(length, _AHEAD_BYTES)
        end = first + len(fetched)
        keep = len(fetched) <= _AHEAD_BYTES
        self._held, self._start = (fetched, first) if keep else (b"", end)
        return fetched[start - first : stop - first]


def _entry(found: Any) -> Entry:
    return Entry(found["size"], found["e_tag"] or str(found["last_modified"]))


def _sentence(error: BaseException) -> str:
    """What a store said, without what is for its developers."""
    text = " ".join(str(error).split("Debug source")[0].split())
    return text[:300]
