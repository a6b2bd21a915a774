"""Weights tables for tests of what learns from them, without a fit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from nfscale.planner import make_plan
from nfscale.store import WeightsTable, open_weights
from nfscale.store.run_folder import RunFolder
from nfscale.store.schema import StoreDtype, stored
from nfscale.store.writer import write_run
from tests.jobs import tiny_job

SPLITS = ("train", "train", "train", "validation", "test")


def made_table(
    place: Path, rows: int, shard_rows: int = 100, spread: float = 0.05, classes: int = 3, dtype: StoreDtype = "float32"
) -> WeightsTable:
    """Rows theta0 + noise around a direction per class, in the layout of a tiny job; index i has label i % classes."""
    plan = replace(make_plan(tiny_job(place, f"store.dtype={dtype}")), data_count=rows, shard_fields=shard_rows)
    draw = np.random.default_rng(0)
    size = plan.layout.size
    towards = draw.standard_normal((classes, size)).astype(np.float32)

    def tables():
        for start in range(0, rows, shard_rows):
            count = min(shard_rows, rows - start)
            index = np.arange(start, start + count)
            noise = draw.standard_normal((count, size), dtype=np.float32)
            weights = plan.theta0 + spread * (towards[index % classes] + noise)
            yield rows_of(plan.table_schema(), index, index % classes, stored(weights, dtype, plan.theta0))

    write_run(RunFolder(place), plan, tables())
    return open_weights(place)


def rows_of(schema: pa.Schema, index: np.ndarray, label: np.ndarray, weights: np.ndarray) -> pa.Table:
    """Rows of a table, quality equal to the index, splits in turn."""
    count = len(index)
    columns = {
        "datum_id": [f"made-{i:07d}" for i in index],
        "index": index,
        "split": pa.array([SPLITS[i % len(SPLITS)] for i in index]).dictionary_encode(),
        "label": label,
        "weights": pa.FixedSizeListArray.from_arrays(
            pa.array(weights.ravel(), schema.field("weights").type.value_type), type=schema.field("weights").type
        ),
        "status": pa.array(["diverged" if i % 50 == 49 else "max_steps" for i in index]).dictionary_encode(),
        "quality": index.astype(np.float32),
        "metrics": [[("height", 8.0), ("width", 8.0)]] * count,
        "seed": np.zeros(count, dtype=np.uint64),
        "shard": np.zeros(count, dtype=np.int32),
        "attempt": ["a"] * count,
    }
    arrays = [
        pa.array(columns[f.name], f.type) if f.name in columns and not isinstance(columns[f.name], pa.Array)
        else columns[f.name].cast(f.type) if f.name in columns
        else pa.nulls(count, f.type)
        for f in schema
    ]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=schema)
