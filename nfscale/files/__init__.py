"""Files by name below a root: a folder of this machine, or a prefix in an object store (S3, GCS, Azure)."""

from pathlib import Path

from nfscale.files.base import Entry, Files, StoreError, StoreRefusedError
from nfscale.files.local import LocalFiles
from nfscale.files.objects import SCHEMES, ObjectFiles, is_uri

__all__ = [
    "SCHEMES",
    "Entry",
    "Files",
    "LocalFiles",
    "ObjectFiles",
    "StoreError",
    "StoreRefusedError",
    "is_uri",
    "open_files",
]


def open_files(location: str | Path) -> Files:
    """The files below a local path or a URI such as `s3://bucket/prefix`.

    Raises:
        CallerError: if the URI is not one that is known.
    """
    return ObjectFiles(str(location)) if is_uri(location) else LocalFiles(location)
