"""A column of images or arrays in Parquet, Arrow IPC or Feather files, labelled by other columns."""

from dataclasses import dataclass
from pathlib import Path

from nfscale.datasets.base import Dataset, require

_SUFFIXES = {".parquet", ".pq", ".arrow", ".arrows", ".ipc", ".feather"}


@dataclass(frozen=True)
class Table:
    """Rows of a Parquet, Arrow IPC (file or stream) or Feather file, or of such files in a folder, in order of name.

    Rows are read by row group or record batch; a worker never holds the table. Parquet files with row groups of
    hundreds of rows are read fastest; very large row groups are streamed through.
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

    def open(self) -> Dataset:
        from nfscale.datasets.arrow import ArrowColumns, open_files  # pyarrow is needed by those who read tables

        root = Path(self.path)
        require(root.exists(), f"dataset.path: no file or folder {self.path!r}; it is looked up from {Path.cwd()}")
        files = [root]
        if root.is_dir():
            found = (path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
            files = sorted(path for path in found if not path.name.startswith((".", "_")))
            require(
                bool(files), f"dataset.path: no files below {self.path!r} end in one of {' '.join(sorted(_SUFFIXES))}"
            )
        columns = ArrowColumns(self.column, self.id_column, self.label_column, self.split_column, self.shape)
        return open_files([(path, None) for path in files], columns)
