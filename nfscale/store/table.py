"""Reading a table of weights: lazily, by the files that the commits name, and back to data.

Nothing here needs the dataset or the fitter: the layout, the forward and theta0 are in the run folder.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nfscale.engine.step import predicted_at
from nfscale.errors import CallerError, MismatchError
from nfscale.fields import FIELDS, Field
from nfscale.layout import Layout
from nfscale.signals import SIGNALS, Signal
from nfscale.signals.tiles import by_whole
from nfscale.store.run_folder import Commit, Plan, RunFolder
from nfscale.store.schema import OK_STATUSES, ROW_GROUP_ROWS, STATUS, restored
from nfscale.store.wholes import Whole

DatumKey = str | int
"""The id of a datum, or its index in the dataset."""


def open_weights(path: str | Path) -> "WeightsTable":
    """The committed rows of a run folder: a local path, or a URI such as `s3://bucket/runs/digits`.

    Raises:
        CallerError: if this is no run folder.
    """
    return WeightsTable(RunFolder(path))


class WeightsTable:
    """Committed rows: weights, quality and history of every datum that has one."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.plan: Plan = folder.plan()
        self.commits: list[Commit] = folder.commits()

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def theta0(self) -> np.ndarray | None:
        """What all fields started from: float32 [P], or None where each started from its own."""
        return self.plan.theta0

    def __len__(self) -> int:
        return sum(commit.rows for commit in self.commits)

    def __contains__(self, key: object) -> bool:
        """Whether a datum of this id or index has a committed row."""
        if not isinstance(key, str | int):
            return False
        return self._positions([key]) != [None] or key in self._blocks

    @cached_property
    def _blocks(self) -> dict[DatumKey, list[str]]:
        """Ids of the blocks that data were cut into, by the ids of these data; empty where none were."""
        if self.plan.blocks is None:
            return {}
        ids = self._keys["datum_id"].to_pylist()
        return {whole: [ids[place] for place in places] for whole, places in by_whole(ids).items()}

    def whole(self, datum_id: str) -> Whole | None:
        """A datum that was cut into blocks; None if there is none of this id.

        Raises:
            CallerError: if some of its blocks are not committed, or none could be read.
        """
        blocks = self._blocks.get(datum_id)
        return None if blocks is None else Whole(self, datum_id, blocks)

    @property
    def schema(self) -> pa.Schema:
        return self.plan.table_schema()

    @cached_property
    def field(self) -> Field:
        """The field whose weights these are."""
        described = self.plan.forward["field"]
        return built(FIELDS, described)

    @cached_property
    def signal(self) -> Signal:
        """The signal that the fields represent."""
        return built(SIGNALS, self.plan.forward["signal"])

    def dataset(self) -> pds.FileSystemDataset:
        """The committed files as a pyarrow dataset: filters and columns are pushed down."""
        filesystem, prefix = self.folder.files.arrow()
        files = [prefix + commit.file for commit in self.commits]
        return pds.dataset(files, schema=self.schema, format="parquet", filesystem=filesystem)  # type: ignore

    def files(self) -> list[str]:
        """Paths or URIs of the committed Parquet files, as DuckDB, Polars, Ray Data and Hugging Face take them."""
        root = self.folder.files.absolute()
        return [f"{root}/{commit.file}" for commit in sorted(self.commits, key=lambda commit: commit.start)]

    def to_arrow(self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
        """The rows as an Arrow table, sorted by `index`.

        Raises:
            CallerError: if a column is unknown.
        """
        if unknown := set(columns or ()) - set(self.schema.names):
            raise CallerError(f"unknown columns {sorted(unknown)}; the table has {', '.join(self.schema.names)}")
        wanted = list(columns or self.schema.names)
        read = list(dict.fromkeys([*wanted, "index"]))
        if filter is not None:
            return self.dataset().to_table(columns=read, filter=filter).sort_by("index").select(wanted)
        schema = self.schema.empty_table().select(read).schema
        # File by file, in the order of the dataset: a scanner that reads ahead takes several times the memory.
        ordered = sorted(self.commits, key=lambda commit: commit.start)
        parts = [pq.read_table(self.file_of(commit), columns=read).cast(schema) for commit in ordered]
        return pa.concat_tables([schema.empty_table(), *parts]).select(wanted)

    def weights(self, filter: pc.Expression | None = None) -> np.ndarray:
        """The weights alone, sorted by `index`: float32 [rows, P]."""
        rows = self.training_table() if filter is None else self.to_arrow(["weights"], filter)
        return self.matrix(rows["weights"])

    def training_table(self) -> pa.Table:
        """What training needs of each row, sorted by `index`: ids, labels, splits, weights, status, quality.

        Memory-mapped where the job has made a copy for that (`store.ipc_copy`), else read from the Parquet files.
        """
        from nfscale.store import ipc  # it reads this module

        mapped = ipc.ipc_copy(self)
        return self.to_arrow(list(ipc.COLUMNS)) if mapped is None else mapped

    def matrix(self, column: pa.ChunkedArray) -> np.ndarray:
        """A column of weights, whatever it is rounded to, as the weights that decode: float32 [rows, P]."""
        return restored(as_matrix(column), self.plan.dtype, self.theta0)

    def key_of(self, text: str) -> DatumKey:
        """What a user typed as a datum: an id where one has this text, else an index."""
        return text if text in self or not text.isdecimal() else int(text)

    def rows(self, keys: Sequence[DatumKey]) -> pa.Table:
        """The rows of these data, in the order asked for.

        Raises:
            CallerError: if a datum has no committed row.
        """
        positions = self._positions(keys)
        if missing := [key for key, position in zip(keys, positions, strict=True) if position is None]:
            examples = self._keys["datum_id"].slice(0, 3).to_pylist()
            raise CallerError(f"no committed row for {missing[:5]}; ids look like {examples}")
        by_group: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for order, position in enumerate(p for p in positions if p is not None):
            file, row = self._split(position)
            by_group.setdefault((file, row // ROW_GROUP_ROWS), []).append((row % ROW_GROUP_ROWS, order))
        parts, orders = [self.schema.empty_table()], []
        for (file, group), wanted in sorted(by_group.items()):
            with pq.ParquetFile(self.file_of(self.commits[file])) as opened:
                parts.append(opened.read_row_group(group).take([row for row, _ in wanted]).cast(self.schema))
            orders += [order for _, order in wanted]
        return pa.concat_tables(parts).take(np.argsort(orders)) if orders else parts[0]

    @cached_property
    def _keys(self) -> pa.Table:
        """Ids and indices of all rows, in the order of the commits and of the rows in their files."""
        parts = [pq.read_table(self.file_of(commit), columns=["datum_id", "index"]) for commit in self.commits]
        empty = self.schema.empty_table().select(["datum_id", "index"])
        return pa.concat_tables([empty, *(part.cast(empty.schema) for part in parts)]).combine_chunks()

    def _positions(self, keys: Sequence[DatumKey]) -> list[int | None]:
        """Where the rows of these data are in `_keys`; None where there is none."""
        found: list[int | None] = [None] * len(keys)
        for kind, name in ((str, "datum_id"), (int, "index")):
            asked = [(order, key) for order, key in enumerate(keys) if isinstance(key, str) is (kind is str)]
            if asked and len(self._keys):
                column = self._keys[name]
                values = pa.array([key for _, key in asked], column.type)
                places = pc.index_in(values, value_set=column)  # type: ignore[attr-defined]
                for (order, _), place in zip(asked, places.to_pylist(), strict=True):
                    found[order] = place
        return found

    @cached_property
    def _firsts(self) -> np.ndarray:
        """Where the rows of each commit begin in `_keys`."""
        return np.cumsum([0] + [commit.rows for commit in self.commits])

    def _split(self, position: int) -> tuple[int, int]:
        """A position in `_keys` as (commit, row in its file)."""
        file = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return file, position - int(self._firsts[file])

    def dataset_positions(self, keys: Sequence[DatumKey]) -> list[int]:
        """Where these data are in the dataset that was encoded: rows lie in its order within a shard."""
        splits = [self._split(position) for position in self._positions(keys) if position is not None]
        return [self.commits[file].start + row for file, row in splits]

    def file_of(self, commit: Commit) -> Path | BinaryIO:
        """The file that a commit names, for pyarrow to open.

        Raises:
            MismatchError: if it is gone.
        """
        if self.folder.files.size(commit.file) is None:
            place = self.folder.files.place(commit.file)
            raise MismatchError(f"{place} is missing, and {commit.shard} is committed; `nfscale verify` lists all")
        return self.folder.files.source(commit.file)

    def decode(self, keys: Sequence[DatumKey], shape: tuple[Any, ...] | str | None = None) -> Any:
        """Data out of weights, in the data's own unit: images of one shape as an array [len(keys), H, W, C].

        Of other signals, and where shapes differ, a list. Of data that were cut into blocks, the id of the datum is
        that of the whole, blended, and `ID@2,1` that of a block.

        Args:
            keys: ids or indices.
            shape: see `shapes`.

        Raises:
            CallerError: if a datum has no row or no weights, or the shape cannot be read.
        """
        if any(key in self._blocks for key in keys):
            return alike([self._decoded_one(key, shape) for key in keys])
        rows = self.rows(keys)
        weights = self.matrix(rows["weights"])
        if empty := [key for key, row in zip(keys, weights, strict=True) if not np.isfinite(row).all()]:
            reasons = dict(zip(keys, rows["reason"].to_pylist(), strict=True))
            raise CallerError(f"no weights for {empty[:5]}: {reasons[empty[0]]}")
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for place, wanted in enumerate(self._shapes(rows, shape)):
            by_shape.setdefault(wanted, []).append(place)
        if len(by_shape) == 1:
            return self._reconstructed(weights, *by_shape)
        decoded: list[Any] = [None] * len(weights)
        for wanted, places in by_shape.items():
            for place, datum in zip(places, self._reconstructed(weights[places], wanted), strict=True):
                decoded[place] = datum
        return decoded

    def _decoded_one(self, key: DatumKey, shape: tuple[Any, ...] | str | None) -> Any:
        whole = self.whole(str(key)) if key in self._blocks else None
        return self.decode([key], shape)[0] if whole is None else whole.decoded(self._asked([whole.fitted], shape)[0])

    def shapes(self, keys: Sequence[DatumKey], shape: tuple[Any, ...] | str | None = None) -> list[tuple[Any, ...]]:
        """The shape of each of these data, as its signal understands it: what `decode` decodes it at.

        Args:
            keys: ids or indices.
            shape: for all; or a text, which `nfscale decode --shape` takes too; without one, that of each fit.

        Raises:
            CallerError: if a datum has no row, or the text cannot be read.
        """
        if any(key in self._blocks for key in keys):
            wholes = [self.whole(str(key)) if key in self._blocks else None for key in keys]
            fitted = [whole.fitted if whole else self.shapes([key])[0] for key, whole in zip(keys, wholes, strict=True)]
            return self._asked(fitted, shape)
        return self._shapes(self.rows(keys), shape)

    def _shapes(self, rows: pa.Table, shape: tuple[Any, ...] | str | None) -> list[tuple[Any, ...]]:
        if isinstance(shape, tuple) and not self.signal.fixed_shape:
            return [shape] * len(rows)
        fitted = [self.signal.shape_of(dict(metrics)) for metrics in rows["metrics"].to_pylist()]
        return self._asked(fitted, shape)

    def _asked(self, fitted: list[tuple[Any, ...]], shape: tuple[Any, ...] | str | None) -> list[tuple[Any, ...]]:
        """The shapes that are asked for, of data of these shapes."""
        if shape is None:
            return fitted
        try:
            wanted = [shape if isinstance(shape, tuple) else self.signal.shape_from(shape, one) for one in fitted]
        except ValueError as error:
            raise CallerError(f"shape: {error}") from error
        if self.signal.fixed_shape and wanted != fitted:
            raise CallerError(
                f"shape: {shape} is asked for, and the fields hold moved pixels, which decode at the size of their fit "
                f"alone ({fitted[0]}); leave the shape out"
            )
        return wanted

    def _reconstructed(self, weights: np.ndarray, shape: tuple[Any, ...]) -> Any:
        return self.signal.reconstruct(self.values(torch.from_numpy(weights), shape), shape)

    def values(self, weights: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What fields say a datum of this shape is, before the signal makes one of it: [F, P] -> [F, N, ...]."""
        try:
            coordinates = self.signal.coordinates(shape)
        except ValueError as error:
            raise CallerError(f"shape: {error}") from error
        return predicted_at(self.field, self.signal, weights, coordinates)

    def torch_dataset(self, standardize: Literal["train", "all"] | None = "train") -> torch.utils.data.TensorDataset:
        """(weights - theta0, label) of the rows that are ok, standardised per weight: float32 [P], int64.

        Args:
            standardize: by the mean and deviation of the train split ("all": of every row; also what is used
                where the dataset has no splits); None leaves them as they are. Text labels become their
                ranks in sorted order.
        """
        table = self.training_table().filter(STATUS.isin(OK_STATUSES))
        weights = torch.from_numpy(self.matrix(table["weights"]))
        if self.theta0 is not None:
            weights = weights - torch.from_numpy(self.theta0)
        if standardize is not None:
            splits = np.array([s == "train" for s in table["split"].to_pylist()])
            fitted = weights[splits] if standardize == "train" and splits.any() else weights
            weights = (weights - fitted.mean(dim=0)) / fitted.std(dim=0).clamp(min=1e-12)
        labels = table["label"].to_pylist()
        if any(isinstance(label, str) for label in labels):
            rank = {label: position for position, label in enumerate(sorted({x for x in labels if x is not None}))}
            labels = [rank.get(label) for label in labels]
        numbers = torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)
        return torch.utils.data.TensorDataset(weights, numbers)


def alike(data: list[Any]) -> Any:
    """Arrays of one shape as one array, anything else as the list."""
    first = data[0]
    stacks = isinstance(first, np.ndarray) and all(one.shape == first.shape for one in data)
    return np.stack(data) if stacks else data


def as_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of weights as it is stored: float32 or float16 [rows, P]."""
    chunks = matrices(column)
    return np.concatenate(chunks) if chunks else np.empty((0, column.type.list_size), dtype=np.float32)


def matrices(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The same chunk by chunk, in Arrow's own memory, which is not to be written to."""
    size = column.type.list_size
    return [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, size) for chunk in column.chunks]


def as_array(content: Any) -> np.ndarray:
    """The numbers of a decoded datum, float32: of a sound its amplitudes, of a solid its levels on a grid."""
    for name in ("values", "levels"):
        content = getattr(content, name, content)
    return np.asarray(content, dtype=np.float32)


def built(kinds: dict[str, type], described: dict[str, Any]) -> Any:
    """An instance of a kind from what a forward says of it.

    Raises:
        CallerError: if this nfscale does not know the kind.
    """
    kind = described["kind"]
    if kind not in kinds:
        raise CallerError(f"this run's {kind!r} is not known to this nfscale; it knows {', '.join(sorted(kinds))}")
    return kinds[kind](**described["keys"])
