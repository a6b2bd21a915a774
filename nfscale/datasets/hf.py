"""Folders that Hugging Face `datasets` wrote with `save_to_disk`, read by pyarrow alone."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfscale.datasets.base import Dataset, require
from nfscale.datasets.places import located, opening
from nfscale.errors import CallerError
from nfscale.files import Files, StoreError


@dataclass(frozen=True)
class HuggingFace:
    """A `Dataset` or `DatasetDict` on disk; ids are `train/0000017`, splits in the order of the dictionary."""

    path: str
    column: str
    """Images, or arrays of numbers."""
    label_column: str | None = None
    """A ClassLabel stays the integer that it is stored as."""
    shape: list[int] | None = None
    """Of an array that the column holds flat."""
    modality: str = "image"
    """The kind of the signal, whose medium reads cells that hold files."""

    def open(self) -> Dataset:
        from nfscale.datasets.arrow import ArrowColumns, open_columns  # pyarrow is needed by those who read tables

        columns = ArrowColumns(self.column, label=self.label_column, shape=self.shape, modality=self.modality)
        files, _ = located(self.path, "folder")
        with opening("dataset.path"):
            named = _data_files(files)
            require(bool(named), f"dataset.path: {self.path!r} lists no data files, so it has no rows")
            return open_columns(files, named, columns)


def _data_files(files: Files) -> list[tuple[str, str | None]]:
    """The (name, split) of each file with rows, in their order."""
    folders: list[tuple[str, str | None]] = [("", None)]
    if files.size("dataset_dict.json") is not None:
        names = _json(files, "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(map(_is_plain, names)) or len(names) != len(set(names)):
            raise CallerError(
                "dataset.path: dataset_dict.json names no splits; expected what DatasetDict.save_to_disk wrote"
            )
        folders = [(f"{name}/", name) for name in names]
    found = []
    for folder, name in folders:
        state = _state(files, folder)
        split = name or _split_of(state)
        found += [(folder + file["filename"], split) for file in state["_data_files"]]
    return found


def _state(files: Files, folder: str) -> dict[str, Any]:
    """What state.json says, with file names that stay in the folder."""
    place = files.place(folder.rstrip("/"))
    if files.size(f"{folder}state.json") is None:
        raise CallerError(
            f"dataset.path: no state.json in {place!r}; expected a folder that Dataset.save_to_disk or "
            "DatasetDict.save_to_disk wrote (dataset.kind=table reads Parquet and Arrow files as they are)"
        )
    state = _json(files, f"{folder}state.json")
    listed = state.get("_data_files")
    named = isinstance(listed, list) and all(isinstance(f, dict) and _is_plain(f.get("filename")) for f in listed)
    require(named, f"dataset.path: {folder}state.json names no data files inside its folder")
    require(
        not state.get("_indices_data_files") and not state.get("_indices_files"),
        f"dataset.path: {place!r} is a selection by indices; save dataset.flatten_indices() instead",
    )
    return state


def _json(files: Files, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read(name).decode("utf-8"))
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise CallerError(f"dataset.path: cannot read {name}: {error}") from error
    require(isinstance(content, dict), f"dataset.path: {name} holds no object")
    return content


def _is_plain(name: Any) -> bool:
    """A name that cannot lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\\" not in name


def _split_of(state: dict[str, Any]) -> str | None:
    """The split a single dataset was taken from: `train` of `train[:100]`."""
    found = re.fullmatch(r"(\w+)(\[.*\])?", state.get("_split") or "")
    return found[1] if found else None
