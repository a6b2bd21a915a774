"""A column of images or arrays in Parquet, Arrow IPC or Feather files, labelled by other columns."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from nfscale.datasets.base import Dataset, require
from nfscale.datasets.places import located, opening

_SUFFIXES = {".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather"}


@dataclass(frozen=True)
class Table:
    """Rows of a Parquet, Arrow IPC (file or stream) or Feather file, or of such files in a folder, in order of name.

    Rows are read by row group or record batch; a worker never holds the table, nor does it fetch all of it. Parquet
    files with row groups of hundreds of rows are read fastest; very large row groups are streamed through.
    """

    path: str
    column: str
    """Encoded images (binary, or struct<bytes, path> as Hugging Face writes them), or arrays (lists, fixed-size
    lists, fixed-shape tensors)."""
    id_column: str | None = None
    """Strings or integers, all different; without one, data are `row-0000017`."""
    label_column: str | None = None
    """Strings or integers."""
    split_column: str | None = None
    shape: list[int] | None = None
    """Of an array that the column holds flat."""
    modality: str = "image"
    """The kind of the signal, whose medium reads cells that hold files."""

    def open(self) -> Dataset:
        from nfscale.datasets.arrow import ArrowColumns, open_columns  # pyarrow is needed by those who read tables

        columns = ArrowColumns(
            self.column, self.id_column, self.label_column, self.split_column, self.shape, self.modality
        )
        files, name = located(self.path)
        with opening("dataset.path"):
            names = [name] if name is not None else [one for one in files.names() if _is_table(one)]
            require(
                bool(names), f"dataset.path: no files below {self.path!r} end in one of {' '.join(sorted(_SUFFIXES))}"
            )
            names.sort(key=lambda one: one.split("/"))
            return open_columns(files, [(one, None) for one in names], columns)


def _is_table(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith((".", "_"))
