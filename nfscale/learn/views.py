"""The table as other libraries take it.

DuckDB, Polars and Ray Data read the files as they are: `duckdb.sql("from read_parquet($files)")`,
`polars.scan_parquet(table.files())`, `ray.data.read_parquet(table.files())`. Hugging Face `datasets` knows no maps, so
it has to be told which columns to read: `hf_arguments`.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from nfscale.errors import CallerError
from nfscale.learn.data import ALL_OK, Rows
from nfscale.store.ipc import COLUMNS
from nfscale.store.table import WeightsTable


def hf_arguments(table: WeightsTable, columns: Sequence[str] = COLUMNS) -> dict[str, Any]:
    """What `datasets.load_dataset("parquet", split="train", **arguments)` needs to read a run's files as they are.

    Raises:
        CallerError: if a column is unknown, or is `metrics`, a map, for which `datasets` has no type.
    """
    from datasets import Features

    features = Features.from_arrow_schema(_typed(table, columns))
    return {"data_files": table.files(), "columns": list(columns), "features": features}


def hf_dataset(table: WeightsTable, rows: Rows = ALL_OK, columns: Sequence[str] = COLUMNS) -> Any:
    """Rows as a Hugging Face `datasets.Dataset` in memory, sorted by index, with weights that decode: float32."""
    from datasets import Dataset

    schema = _typed(table, columns)
    read = table.to_arrow(list(columns), rows.expression)
    if "weights" in columns:
        matrix = pa.array(table.matrix(read["weights"]).ravel())
        place = schema.get_field_index("weights")
        schema = schema.set(place, pa.field("weights", pa.list_(pa.float32(), table.layout.size)))
        weights = pa.FixedSizeListArray.from_arrays(matrix, table.layout.size)
        read = read.set_column(place, "weights", weights)
    return Dataset(read.cast(schema))


def _typed(table: WeightsTable, columns: Sequence[str]) -> pa.Schema:
    """The schema of these columns in types that `datasets` has."""
    if unknown := set(columns) - set(table.schema.names):
        raise CallerError(f"unknown columns {sorted(unknown)}; the table has {', '.join(table.schema.names)}")
    fields = [table.schema.field(name) for name in columns]
    if maps := [field.name for field in fields if pa.types.is_map(field.type)]:
        raise CallerError(f"{', '.join(maps)} is a map, which Hugging Face datasets cannot hold; leave it out")
    return pa.schema([_plain(field) for field in fields])


def _plain(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    elif pa.types.is_fixed_size_list(kind):
        kind = pa.list_(kind.value_type, kind.list_size)
    return pa.field(field.name, kind)
