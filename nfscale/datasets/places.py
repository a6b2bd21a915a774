"""Where data lie: a path of this machine or a URI such as s3://bucket/prefix, as openers take them.

What goes wrong has one of two causes. An object that is gone, locked or damaged is its datum's: a row with a reason.
A store that does not answer is no datum's: `StoreError`, which every `read` lets pass, so that the lease is tried
again instead of ending as thousands of rows that blame the data.
"""

import contextlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from nfscale.datasets.base import require
from nfscale.errors import CallerError
from nfscale.files import Files, LocalFiles, ObjectFiles, StoreError, StoreRefusedError, is_uri

MAX_ENCODED_BYTES = 512 << 20
"""Of an encoded image: more than the largest image that is decoded takes uncompressed."""


@contextlib.contextmanager
def opening(key: str) -> Iterator[None]:
    """While a dataset is opened: what a store does not have or give is the caller's mistake.

    Raises:
        CallerError: naming the key of the job.
    """
    try:
        yield
    except StoreError as error:
        if isinstance(error, StoreRefusedError):
            raise CallerError(f"{key}: {error}") from error
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise CallerError(f"{key}: {error}") from error


def located(
    path: str, wanted: Literal["file", "folder", "file or folder"] = "file or folder"
) -> tuple[Files, str | None]:
    """Where a path or URI leads: (files, the name of one file), or (files, None) of a folder.

    Raises:
        CallerError: if nothing is there, or not what is wanted.
        StoreError: if the store cannot be reached.
    """
    if is_uri(path):
        return _object_at(path, wanted)
    found = Path(path)
    there = {"file": found.is_file, "folder": found.is_dir}.get(wanted, found.exists)()
    require(there, f"dataset.path: no {wanted} {path!r}; it is looked up from {Path.cwd()}")
    return (LocalFiles(path), None) if found.is_dir() else (LocalFiles(found.parent), found.name)


def _object_at(path: str, wanted: str) -> tuple[Files, str | None]:
    below = ObjectFiles(path)
    with opening("dataset.path"):
        if "file" in wanted and not path.endswith("/") and (one := object_of(path)) and one[0].size(one[1]) is not None:
            return one
        there = bool(below.some_entries(1))  # says too whether there is such a bucket
    kinds = {"file": "no object {0!r}", "folder": "no objects below {0!r}"}
    missing = kinds.get(wanted, "no object {0!r} and none below it").format(path)
    require(there and "folder" in wanted, f"dataset.path: {missing}")
    return below, None


def object_of(uri: str) -> tuple[ObjectFiles, str] | None:
    """The files beside an object, and its name; None where the URI names a bucket alone."""
    scheme, _, rest = uri.partition("://")
    folder, slash, name = rest.rpartition("/")
    return (ObjectFiles(f"{scheme}://{folder}"), name) if slash and folder and name else None


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a name matches, segment by segment, as in a local folder: `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (bool(parts) and matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
