"""Folders that Hugging Face `datasets` wrote with `save_to_disk`, read by pyarrow alone."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfscale.datasets.base import Dataset, require
from nfscale.errors import CallerError


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

    def open(self) -> Dataset:
        from nfscale.datasets.arrow import ArrowColumns, open_files  # pyarrow is needed by those who read tables

        root = Path(self.path)
        require(root.is_dir(), f"dataset.path: no folder {self.path!r}; it is looked up from {Path.cwd()}")
        if (root / "dataset_dict.json").is_file():
            names = _json(root / "dataset_dict.json").get("splits")
            if not isinstance(names, list) or not all(map(_is_plain, names)) or len(names) != len(set(names)):
                raise CallerError(
                    "dataset.path: dataset_dict.json names no splits; expected what DatasetDict.save_to_disk wrote"
                )
            splits = [(root / name, name) for name in names]
        else:
            splits = [(root, None)]
        files = []
        for folder, name in splits:
            state = _state(folder)
            split = name or _split_of(state)
            files += [(folder / file["filename"], split) for file in state["_data_files"]]
        require(bool(files), f"dataset.path: {self.path!r} lists no data files, so it has no rows")
        columns = ArrowColumns(self.column, label=self.label_column, shape=self.shape)
        return open_files(files, columns)


def _state(folder: Path) -> dict[str, Any]:
    """What state.json says, with file names that stay in the folder."""
    if not (folder / "state.json").is_file():
        raise CallerError(
            f"dataset.path: no state.json in {str(folder)!r}; expected a folder that Dataset.save_to_disk or "
            "DatasetDict.save_to_disk wrote (dataset.kind=table reads Parquet and Arrow files as they are)"
        )
    state = _json(folder / "state.json")
    files = state.get("_data_files")
    named = isinstance(files, list) and all(isinstance(f, dict) and _is_plain(f.get("filename")) for f in files)
    require(named, f"dataset.path: {folder.name}/state.json names no data files inside its folder")
    require(
        not state.get("_indices_data_files") and not state.get("_indices_files"),
        f"dataset.path: {folder.name!r} is a selection by indices; save dataset.flatten_indices() instead",
    )
    return state


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CallerError(f"dataset.path: cannot read {path.name}: {error}") from error
    require(isinstance(content, dict), f"dataset.path: {path.name} holds no object")
    return content


def _is_plain(name: Any) -> bool:
    """A name that cannot lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\\" not in name


def _split_of(state: dict[str, Any]) -> str | None:
    """The split a single dataset was taken from: `train` of `train[:100]`."""
    found = re.fullmatch(r"(\w+)(\[.*\])?", state.get("_split") or "")
    return found[1] if found else None
