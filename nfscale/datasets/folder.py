"""Anyone's files in a folder: ids are the paths below it, labels optionally the parents' or a CSV's.

What a file holds is its medium's matter. Names and links are hostile, and each bad one is a datum with a reason:

- Opening a pipe would wait forever, and a link may lead to anything; so only regular files inside the folder are read.
- Names are bytes. In ids, what is no UTF-8 or what a terminal would obey is escaped.
- An object may have any size: one that no datum needs is refused by the size that its listing gives.
"""

import io
import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO, Protocol

from nfscale.datasets.base import Dataset, Datum, Label, require
from nfscale.datasets.labels import labels_of_csv
from nfscale.datasets.places import MAX_ENCODED_BYTES, located, matches, opening
from nfscale.files import Entry, ObjectFiles, StoreError
from nfscale.hostile import escaped, escaped_path, reason_of
from nfscale.media import MEDIA

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True)
class Folder:
    """Files below `path` that match `pattern`; without a pattern, files with a suffix that the signal's medium reads.

    Below a URI: one listing, and one request for each datum that is read.
    """

    path: str
    pattern: str | None = None
    label_from: str | None = None
    """`parent`: the name of the folder that a file lies in. Otherwise the path or URI of a CSV with a header and the
    columns `id` (the path below the folder), `label` and optionally `split`."""
    modality: str = "image"
    """The kind of the signal, whose medium reads the files."""

    def open(self) -> "FolderDataset":
        files, _ = located(self.path, "folder")
        if self.pattern is not None:
            parts = PurePath(self.pattern).parts
            require(
                bool(parts) and ".." not in parts and not PurePath(self.pattern).is_absolute(),
                f"dataset.pattern: {self.pattern!r} leads out of the folder; write one that goes down from "
                "dataset.path, such as **/*.png",
            )
            require(
                all("**" not in part or part == "**" for part in parts),
                f"dataset.pattern: in {self.pattern!r} a ** is not a whole part; write **/*.png for all folders",
            )
        suffixes = MEDIA[self.modality].suffixes
        below = (
            _ObjectsBelow(files, self.pattern, suffixes)
            if isinstance(files, ObjectFiles)
            else (_FilesBelow(Path(self.path), self.pattern, suffixes))
        )
        dataset = FolderDataset(below, self.label_from, self.modality)
        wanted = f"match {self.pattern!r}" if self.pattern else f"end in one of {' '.join(sorted(suffixes))}"
        with opening("dataset.path"):
            require(bool(dataset.ids), f"dataset.path: no files below {self.path!r} {wanted}")
        if self.label_from not in (None, "parent"):
            dataset.labels = labels_of_csv(self.label_from, dataset.ids, below.has_file)
        return dataset


class FolderDataset(Dataset):
    """Whatever matches is a datum, but for folders: a link that leads nowhere or a pipe is one with a reason."""

    def __init__(self, below: "_Below", label_from: str | None, modality: str) -> None:
        self._below, self.label_from, self._medium = below, label_from, MEDIA[modality]
        self.labels: dict[str, tuple[Label, str | None]] = {}

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._below.names())

    @cached_property
    def ids(self) -> Sequence[str]:
        return [escaped_path(name) for name in self._names]

    def read(self, position: int) -> Datum:
        datum_id, name = self.ids[position], self._names[position]
        label, split = self.labels.get(datum_id, (None, None))
        if self.label_from == "parent":
            label = escaped(f"{self._below.title}/{name}".split("/")[-2])
        try:
            with self._below.opened(name) as stream:
                content = self._medium.read(stream, name, _Beside(self._below, name))
                return Datum(datum_id, position, content, label, split)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            return Datum(datum_id, position, None, label, split, reason_of(error))


@dataclass(frozen=True)
class _Beside:
    """Other files of the dataset, by their paths relative to one that is being read."""

    below: "_Below"
    name: str

    def __call__(self, relative: str) -> BinaryIO:
        return self.below.opened(self._path(relative))

    def names(self, folder: str) -> list[str]:
        return sorted(self.below.listed(self._path(folder)))

    def _path(self, relative: str) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.name), relative))
        if relative.startswith("/") or path.split("/")[0] == "..":
            raise ValueError(f"it names {escaped(relative)}, which leads out of the dataset's folder")
        return path


class _Below(Protocol):
    """Files by their paths below a folder."""

    title: str
    """The name of the folder itself."""

    def names(self) -> list[str]: ...

    def has_file(self, name: str) -> bool:
        """Whether there is a file of this path below the folder, be it among the data or not."""
        ...

    def opened(self, name: str) -> BinaryIO:
        """A file of a datum.

        Raises:
            OSError: if it cannot be read.
            ValueError: with the reason, if it is not to be read.
        """
        ...

    def listed(self, folder: str) -> list[str]:
        """Names of the files in a folder below this one; none where it is none."""
        ...


class _FilesBelow:
    """Of a folder that may hold links, pipes and whatever else a file system has."""

    def __init__(self, root: Path, pattern: str | None, suffixes: frozenset[str]) -> None:
        self._root, self._pattern, self._suffixes = root, pattern, tuple(suffixes)
        self.title = root.name

    def names(self) -> list[str]:
        """Paths below the root as the file system has them."""
        found = self._root.glob(self._pattern or "**/*")
        if self._pattern is None:
            found = (path for path in found if path.name.lower().endswith(self._suffixes))
        return [path.relative_to(self._root).as_posix() for path in found if not os.path.isdir(path)]

    def has_file(self, name: str) -> bool:
        return ".." not in PurePath(name).parts and os.path.isfile(self._root / name)

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self._root)

    def opened(self, name: str) -> BinaryIO:
        return _opened_inside(self._real_root, name)

    def listed(self, folder: str) -> list[str]:
        path = os.path.realpath(os.path.join(self._real_root, folder))
        if os.path.commonpath([self._real_root, path]) != self._real_root or not os.path.isdir(path):
            return []
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]


class _ObjectsBelow:
    """Below a prefix of an object store."""

    def __init__(self, files: ObjectFiles, pattern: str | None, suffixes: frozenset[str]) -> None:
        self._files, self._pattern, self._suffixes = files, pattern, tuple(suffixes)
        self.title = files.root.rpartition("/")[2]

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return self._files.entries()

    def names(self) -> list[str]:
        if self._pattern is None:
            return [name for name in self._entries if name.lower().endswith(self._suffixes)]
        pattern = PurePosixPath(self._pattern).parts
        return [name for name in self._entries if matches(name.split("/"), pattern)]

    def has_file(self, name: str) -> bool:
        return name in self._entries

    def opened(self, name: str) -> BinaryIO:
        if name not in self._entries:
            raise FileNotFoundError(f"there is no {escaped(name)} in the dataset's folder")
        size = self._entries[name].size
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"too large: an object of {size} bytes, at most {MAX_ENCODED_BYTES} are read")
        return io.BytesIO(self._files.range(name, 0, MAX_ENCODED_BYTES))  # it may have grown since it was listed

    def listed(self, folder: str) -> list[str]:
        start = "" if folder == "." else f"{folder}/"
        return [
            name[len(start) :] for name in self._entries if name.startswith(start) and "/" not in name[len(start) :]
        ]


def _opened_inside(root: str, name: str) -> BinaryIO:
    """A regular file below `root` (a real path), opened for reading.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not a regular file, or if links lead it out of the root.
    """
    path = os.path.realpath(os.path.join(root, name))
    if os.path.islink(path):
        raise ValueError("a link that leads back to itself")
    if os.path.commonpath([root, path]) != root:
        raise ValueError("a link that leads out of the dataset's folder; put the file itself there")
    if not os.path.lexists(path):
        raise FileNotFoundError("a link that leads nowhere, or the file is gone")
    _refuse_irregular(os.stat(path).st_mode)
    # What the path names may have changed since: do not follow a link, do not wait for a pipe, and look again.
    flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # none of them is on every system
    descriptor = os.open(path, sum((getattr(os, flag, 0) for flag in flags), os.O_RDONLY))
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"not a regular file but {_KINDS.get(stat.S_IFMT(mode), 'something else')}")
