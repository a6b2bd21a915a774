"""WebDataset: tars whose members share a key up to the first dot of their names, such as 017.png, 017.cls, 017.json.

Headers are read once per process, with `tarfile`; members are then read by their offsets, so a worker reads
nothing but its range. Nothing is extracted to the disk. In an object store a header is a request of a few kilobytes,
after which its content is jumped over (labels lie beside it, and are read with it), and many tars are gone through at
a time.

Inputs are hostile. A header may claim any size, lead backwards or name a path above the tar; a tar may end
anywhere. What a sample is to blame for costs its own row. Where a tar is damaged, what follows cannot be found:
that is one more row, so that the loss is seen.
"""

import glob
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from nfscale.datasets.base import Dataset, Datum, Label, require
from nfscale.datasets.places import MAX_ENCODED_BYTES, located, matches, opening
from nfscale.errors import CallerError
from nfscale.files import Entry, Files, LocalFiles, ObjectFiles, StoreError, is_uri
from nfscale.hostile import escaped, escaped_path, reason_of
from nfscale.media import MEDIA, Medium, nothing_beside

_TARS_AT_ONCE = 16  # in an object store, where a tar is indexed by one small request after the other
_MAX_HEADER_BYTES = 8 << 20  # of one extended header; real ones hold a path
_MAX_LABEL_BYTES = 1 << 20
_HEADER_ERRORS = (tarfile.TarError, OSError, ValueError, LookupError, OverflowError, RecursionError, MemoryError)
_INT64 = range(-(1 << 63), 1 << 63)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class WebDataset:
    """Samples of a tar, of the tars below a folder, or of those that match a pattern; ids are TAR/KEY."""

    path: str
    key: str | None = None
    """The extension of the datum's member, such as png or seg.png; by default the first that the signal's medium
    reads."""
    label: str | None = None
    """`cls`: the member of that extension. `json:FIELD`: a field of the json member. Integers or text, as the first
    label is; a label that is missing, damaged or of the other kind is null."""
    modality: str = "image"
    """The kind of the signal, whose medium reads the members."""

    def open(self) -> "WebDatasetDataset":
        require(self.key is None or bool(self.key.strip(".")), "dataset.key is an extension such as png, or null")
        known = self.label in (None, "cls") or (self.label.startswith("json:") and self.label != "json:")
        require(known, f"dataset.label is cls, json:FIELD or null, got {self.label!r}")
        with opening("dataset.path"):
            key = self.key and self.key.strip(".").lower()
            dataset = WebDatasetDataset(_tars(self.path), key, self.label, MEDIA[self.modality])
            require(bool(dataset.ids), f"dataset.path: no samples in the tars of {self.path!r}")
        return dataset


@dataclass(frozen=True)
class _Tar:
    files: Files = field(compare=False)
    name: str
    place: str
    entry: Entry
    """With the place it tells whether this is still the tar that was read."""


def _tars(path: str) -> list[_Tar]:
    """The tars in the order of their names without the suffix, below the folder that they share.

    Raises:
        CallerError: if there are none.
    """
    files, entries = _objects(path) if is_uri(path) else _local_tars(path)
    found = [_Tar(files, name, files.place(name), entry) for name, entry in entries.items()]
    return sorted(found, key=lambda tar: tar.name.removesuffix(".tar"))


def _local_tars(path: str) -> tuple[LocalFiles, dict[str, Entry]]:
    if os.path.isfile(path):
        found, root = [path], os.path.dirname(path)
    elif os.path.isdir(path):
        found, root = [str(tar) for tar in Path(path).glob("**/*.tar")], path
    else:
        found = glob.glob(path, recursive=True)
        root = os.path.commonpath([os.path.dirname(tar) for tar in found]) if found else ""
    found = [tar for tar in found if os.path.isfile(tar)]
    if not found:
        packed = os.path.isdir(path) and any(Path(path).glob("**/*.t*gz"))
        hint = "; those that are compressed have to be decompressed first" if packed else ""
        raise CallerError(
            f"dataset.path: no tar at {path!r}; it is a .tar, a folder of them or a pattern such as 'shards/*.tar', "
            f"looked up from {Path.cwd()}{hint}"
        )
    files = LocalFiles(root or ".")
    names = [Path(os.path.relpath(tar, root or ".")).as_posix() for tar in found]
    return files, {name: entry for name in names if (entry := files.entry(name)) is not None}


def _objects(uri: str) -> tuple[ObjectFiles, dict[str, Entry]]:
    """A tar, those below a prefix, or those that match a pattern, as in a local folder."""
    parts = uri.rstrip("/").split("/")
    fixed = next((place for place, part in enumerate(parts) if glob.has_magic(part)), None)
    if fixed is None:
        files, name = located(uri)
        assert isinstance(files, ObjectFiles)
        if name is not None and (entry := files.entry(name)) is not None:
            return files, {name: entry}
        found = {name: entry for name, entry in files.entries().items() if name.endswith(".tar")}
        folder = ""
    else:
        files = ObjectFiles("/".join(parts[:fixed]))
        pattern = parts[fixed:]
        found = {name: entry for name, entry in files.entries().items() if _is_globbed(name.split("/"), pattern)}
        folder = posixpath.commonpath([posixpath.dirname(name) for name in found]) if found else ""
    if not found:
        raise CallerError(
            f"dataset.path: no tar at {uri!r}; it is a .tar, a prefix of them or a pattern such as "
            "s3://bucket/shards/*.tar"
        )
    if folder:
        files = ObjectFiles(f"{files.root}/{folder}")
        found = {posixpath.relpath(name, folder): entry for name, entry in found.items()}
    return files, found


def _is_globbed(parts: list[str], pattern: list[str]) -> bool:
    """Whether `glob` would find it: a name that starts with a dot has to be asked for."""
    asked = {part for part in pattern if part.startswith(".")}
    return matches(parts, pattern) and (bool(asked) or not any(part.startswith(".") for part in parts))


class WebDatasetDataset(Dataset):
    def __init__(self, tars: list[_Tar], key: str | None, label: str | None, medium: Medium) -> None:
        self.tars, self.key, self.label, self._medium = tars, key, label, medium

    @cached_property
    def _samples(self) -> list["tuple[_Tar, _Sample]"]:
        """(tar, sample) in the order of the tars and, within them, of first members."""
        at_once = 1 if isinstance(self.tars[0].files, LocalFiles) else _TARS_AT_ONCE
        with ThreadPoolExecutor(at_once) as pool:
            indices = pool.map(lambda tar: _index(tar, self.key, self.label, self._medium.suffixes), self.tars)
            return [(tar, sample) for tar, index in zip(self.tars, indices, strict=True) for sample in index]

    @cached_property
    def ids(self) -> Sequence[str]:
        return [sample.id for _, sample in self._samples]

    @cached_property
    def _label_kind(self) -> type | None:
        """The kind of the first label; those of a dataset are all of one kind."""
        return next((type(sample.label) for _, sample in self._samples if sample.label is not None), None)

    def read(self, position: int) -> Datum:
        tar, sample = self._samples[position]
        label = sample.label if type(sample.label) is self._label_kind else None
        try:
            stream, name = io.BytesIO(_content(tar, sample)), f"{sample.id}.{sample.image_extension}"
            return Datum(sample.id, position, self._medium.read(stream, name, nothing_beside), label)
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            return Datum(sample.id, position, None, label, error=reason_of(error))


def _content(tar: _Tar, sample: "_Sample") -> bytes:
    """The encoded image of a sample.

    Raises:
        OSError: if the tar cannot be read.
        ValueError: with the reason, if the sample has none.
    """
    if sample.error:
        raise ValueError(sample.error)
    if sample.image is None:
        seen = escaped(", ".join(sample.extensions))
        raise ValueError(f"the sample has no member with an image; it has the extensions {seen}")
    if sample.image[1] > MAX_ENCODED_BYTES:
        raise ValueError(f"too large: a member of {sample.image[1]} bytes, at most {MAX_ENCODED_BYTES} are read")
    return tar.files.range(tar.name, *sample.image)


# --- the index of a tar


@dataclass(slots=True)
class _Sample:
    """What a tar holds for one key."""

    id: str
    image: tuple[int, int] | None = None
    """Offset and size in bytes."""
    image_extension: str = ""
    label: Label = None
    error: str | None = None
    extensions: list[str] = field(default_factory=list)
    """The first few, for the reason of a sample without an image."""


@lru_cache(maxsize=4096)  # tars; a run opens its dataset several times, for the plan, the work, the review
def _index(tar: _Tar, key: str | None, label: str | None, suffixes: frozenset[str]) -> list[_Sample]:
    """The samples of a tar, and one with an error where it is damaged.

    Args:
        key: extension of the datum's member; without one, the first of one of the `suffixes`.
        label: as the job names it.

    Raises:
        CallerError: if it is compressed.
        OSError: if it cannot be opened.
    """
    name, size = escaped_path(tar.name.removesuffix(".tar")), tar.entry.size
    label_extension = "json" if (label or "").startswith("json:") else label
    samples: dict[str, _Sample] = {}
    extra: list[_Sample] = []  # of which the key says too little: repeats, and where the tar is damaged
    with tar.files.open(tar.name) as file:
        _refuse_compressed(file, tar.place)
        try:
            for member in _members(file, size):
                sample_key, extension = _key_and_extension(member.name)
                if member.isdir() or not extension or sample_key.rpartition("/")[2].startswith("__"):
                    continue
                is_image = extension == key if key else f".{extension.rpartition('.')[2]}" in suffixes
                datum_id = f"{name}/{escaped_path(sample_key)}"
                sample = samples.setdefault(datum_id, _Sample(datum_id))
                if len(sample.extensions) < 4 and not sample.image:
                    sample.extensions.append(extension)
                if label is not None and extension == label_extension:
                    sample.label = _label_at(file, member, label)
                elif is_image and sample.image and extension == sample.image_extension:
                    twin = _Sample(f"{datum_id}@{member.offset}")
                    twin.error = "the key occurs before in its tar; a key is for one image"
                    extra.append(twin)
                elif is_image and sample.image is None:
                    sample.image, sample.image_extension = (member.offset_data, member.size), extension
                    sample.error = _fault_of(member, size)
        except _DamagedError as error:
            extra.append(_Sample(f"{name}/@{error.offset}", error=str(error)))
    return [*samples.values(), *(sample for sample in extra if sample.id not in samples)]


def _key_and_extension(name: str) -> tuple[str, str]:
    """`a/b.c.png` -> `a/b`, `c.png`, the rule of WebDataset; a name without a dot has no extension."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _fault_of(member: tarfile.TarInfo, size: int) -> str | None:
    """Why a member cannot be read as an image, if so."""
    if member.issym() or member.islnk():
        return "a link in a tar; archive the file itself (GNU tar: --dereference --hard-dereference)"
    if not member.isreg():
        return "not a regular file in its tar"
    if member.issparse():
        return "a sparse file in a tar; archive it without --sparse"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name in the tar leads out of the tar; archive it by a relative name without .."
    if member.offset_data + member.size > size:
        return f"truncated: the tar ends within this member of {member.size} bytes"
    return None


class _DamagedError(Exception):
    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"the tar is damaged at byte {offset}, so nothing behind it was found: {what}")
        self.offset = offset


class _Headers(io.RawIOBase):
    """A tar's file for `tarfile`, which reads as much as a header claims, and everything if that is negative."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _refuse_compressed(file: BinaryIO, place: str) -> None:
    start = file.read(8)
    for magic, packer in _COMPRESSED.items():
        if start.startswith(magic):
            raise CallerError(
                f"dataset.path: {place!r} is compressed ({packer}), so its members cannot be read one by one; "
                "decompress it, the images in it are compressed anyway"
            )


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, by their headers.

    Raises:
        _DamagedError: where it goes on and the next header cannot be read.
    """
    offset = 0
    file.seek(0)
    try:
        # The first header is read here; the tarfile is not closed, for it would only close `file`.
        tar = tarfile.open(fileobj=_Headers(file), mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            yield member
            if tar.offset <= offset:  # type: ignore[attr-defined]
                raise ValueError("a header leads backwards")
            offset = tar.offset  # type: ignore[attr-defined]
            if offset > size:
                break
    except StoreError:
        raise
    except _HEADER_ERRORS as error:
        raise _DamagedError(offset, escaped(str(error)) or type(error).__name__) from error
    file.seek(min(offset, size))
    rest = file.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise _DamagedError(offset, "it ends without the empty block that ends a tar")
    if rest.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
        raise _DamagedError(offset, "no tar header")


def _label_at(file: BinaryIO, member: tarfile.TarInfo, label: str) -> Label:
    """What a member says of its sample; None if it is damaged."""
    if not member.isreg() or member.issparse() or member.size > _MAX_LABEL_BYTES:
        return None
    try:
        file.seek(member.offset_data)
        text = file.read(member.size).decode("utf-8").strip()
        value = json.loads(text).get(label.removeprefix("json:")) if label != "cls" else text
    except StoreError:
        raise
    except (OSError, ValueError, AttributeError, RecursionError):  # JSON may be no object, or nested without end
        return None
    return _as_label(value, parse=label == "cls")


def _as_label(value: Any, parse: bool) -> Label:
    """Integers that fit the table, or text without lone surrogates; anything else is no label."""
    if parse and value.removeprefix("-").isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, int):
        return int(value) if value in _INT64 else None
    return escaped(value) if isinstance(value, str) and value else None
