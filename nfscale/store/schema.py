"""The weights table: one row per datum, its columns, their order and what the files say of themselves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nfscale.layout import Layout

LabelType = Literal["string", "int64"]
StoreDtype = Literal["float32", "float16", "delta_float16"]
"""How weights are rounded for storage; delta_float16 is half precision of weights - theta0, which costs no quality."""

OK_STATUSES = ("converged", "plateau", "max_steps")
FAILED_STATUSES = ("diverged", "decode_error", "crashed")
STATUS = pc.field("status").cast(pa.string())
"""The status as text, for filters: `STATUS.isin(FAILED_STATUSES)`."""

ROW_GROUP_ROWS = 64
"""Rows that are read together. At 10,000 weights one row out of 64 costs 12 ms, out of 1,000 ten times that."""


@dataclass
class Row:
    """One datum in the table. `weights` is None where there are none; they are stored as NaN."""

    datum_id: str
    index: int
    status: str
    shard: int
    attempt: str
    seed: int
    split: str | None = None
    label: str | int | None = None
    weights: np.ndarray | None = None
    reason: str | None = None
    loss: float | None = None
    quality: float | None = None
    quality_heldout: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int | None = None
    steps_to_target: int | None = None
    history_step: list[int] = field(default_factory=list)
    history_quality: list[float] = field(default_factory=list)
    wall_seconds: float | None = None


def table_schema(
    layout: Layout,
    label_type: LabelType,
    quality_name: str,
    fingerprint: str,
    format_version: int,
    dtype: StoreDtype = "float32",
) -> pa.Schema:
    """The columns, in their order; layout and dtype in the metadata of `weights`, the fingerprint in the file's."""
    text = pa.dictionary(pa.int32(), pa.string())
    element = pa.float32() if dtype == "float32" else pa.float16()
    weights = pa.list_(pa.field("element", element, nullable=False), layout.size)
    described = {"nfscale.layout": layout.to_json(), "nfscale.dtype": dtype}
    return pa.schema(
        [
            pa.field("datum_id", pa.string(), nullable=False),
            pa.field("index", pa.int64(), nullable=False),
            pa.field("split", text),
            pa.field("label", pa.string() if label_type == "string" else pa.int64()),
            pa.field("weights", weights, nullable=False, metadata=described),
            pa.field("status", text, nullable=False),
            pa.field("reason", pa.string()),
            pa.field("loss", pa.float32()),
            pa.field("quality", pa.float32(), metadata={"nfscale.quality": quality_name}),
            pa.field("quality_heldout", pa.float32()),
            pa.field("metrics", pa.map_(pa.string(), pa.float32())),
            pa.field("steps", pa.int32()),
            pa.field("steps_to_target", pa.int32()),
            pa.field("history_step", pa.list_(pa.field("element", pa.int32()))),
            pa.field("history_quality", pa.list_(pa.field("element", pa.float32()))),
            pa.field("seed", pa.uint64(), nullable=False),
            pa.field("wall_seconds", pa.float32()),
            pa.field("shard", pa.int32(), nullable=False),
            pa.field("attempt", pa.string(), nullable=False),
        ],
        metadata={"nfscale.fingerprint": fingerprint, "nfscale.format": str(format_version)},
    )


def to_table(rows: Sequence[Row], schema: pa.Schema, theta0: np.ndarray | None = None) -> pa.Table:
    """Rows as an Arrow table of this schema; their weights are float32, and rounded here as the schema says."""
    size = schema.field("weights").type.list_size
    matrix = np.full((len(rows), size), np.nan, dtype=np.float32)
    for position, row in enumerate(rows):
        if row.weights is not None:
            matrix[position] = row.weights
    columns: dict[str, Any] = {
        f.name: [getattr(row, f.name) for row in rows] for f in fields(Row) if f.name != "weights"
    }
    columns["metrics"] = [list(row.metrics.items()) for row in rows]
    weights_type = schema.field("weights").type
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(stored(matrix, dtype_of(schema), theta0).ravel()), type=weights_type)
        if name == "weights"
        else pa.array(columns[name], type=schema.field(name).type)
        for name in schema.names
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_parquet(table: pa.Table, file: BinaryIO) -> None:
    """The table as Parquet: zstd, weights byte-stream-split, small row groups, a page index."""
    text = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_dictionary(f.type)]
    by_column: dict[str, Any] = {
        "use_dictionary": text,
        "use_byte_stream_split": ["weights.list.element"],
        "write_statistics": ["index", "quality", "steps", "seed", "shard"],
    }
    pq.write_table(
        table,
        file,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=1,
        write_page_index=True,
        **by_column,
    )


def dtype_of(schema: pa.Schema) -> StoreDtype:
    """How the weights of a table are rounded."""
    return (schema.field("weights").metadata or {}).get(b"nfscale.dtype", b"float32").decode()


def stored(weights: np.ndarray, dtype: StoreDtype, theta0: np.ndarray | None) -> np.ndarray:
    """Weights as they lie in the table: float32 [rows, P] -> float32 or float16 [rows, P]."""
    if dtype == "float32":
        return weights
    return (weights if dtype == "float16" else weights - _start(theta0)).astype(np.float16)


def restored(matrix: np.ndarray, dtype: StoreDtype, theta0: np.ndarray | None) -> np.ndarray:
    """What `stored` gave, as the weights that decode: [rows, P] -> float32 [rows, P]."""
    weights = matrix.astype(np.float32, copy=False)
    return weights + _start(theta0) if dtype == "delta_float16" else weights


def _start(theta0: np.ndarray | None) -> np.ndarray:
    if theta0 is None:
        raise ValueError("store.dtype=delta_float16 stores differences from theta0, and these fields share none")
    return theta0


def layout_of(schema: pa.Schema) -> Layout:
    """The layout that a table carries with its weights."""
    return Layout.from_json((schema.field("weights").metadata or {})[b"nfscale.layout"].decode())


def quality_text(name: str, value: float) -> str:
    """A quality with as many digits as its unit deserves: 41.55 dB, but an IoU of 0.9871."""
    return f"{value:.2f}" if name.endswith("_db") else f"{value:.4f}"


def json_bytes(content: Any) -> bytes:
    """JSON that a person can read and two writers agree on."""
    return (json.dumps(content, indent=1, sort_keys=False, allow_nan=False) + "\n").encode()
