"""A step plan: how many steps the field of each datum may take, a Parquet file with the columns datum_id and steps.

`fit.step_plan` names one, `nfscale estimate --budget` writes one. A run keeps a copy of its own (`steps.parquet`): its
workers may be where the user's file is not.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nfscale.errors import CallerError
from nfscale.files import Files, is_uri, open_files

_SCHEMA = pa.schema([pa.field("datum_id", pa.string(), nullable=False), pa.field("steps", pa.int32(), nullable=False)])


def to_bytes(steps: Mapping[str, int], figures: dict[str, Any] | None = None) -> bytes:
    """The file's content; with the figures that the plan was made by in its metadata."""
    schema = _SCHEMA.with_metadata({"nfscale.step_plan": json.dumps(figures or {})})
    table = pa.table([pa.array(steps.keys(), pa.string()), pa.array(steps.values(), pa.int32())], schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def parsed(content: bytes) -> dict[str, int]:
    """Steps by datum's id.

    Raises:
        ValueError: if this is no step plan.
    """
    table = pq.read_table(io.BytesIO(content))  # pyarrow's own errors of a damaged file are ValueErrors
    if missing := {"datum_id", "steps"} - set(table.column_names):
        raise ValueError(f"it has no column {' and no column '.join(sorted(missing))}, but {table.column_names}")
    ids, steps = table["datum_id"], table["steps"]
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)) or not pa.types.is_integer(steps.type):
        raise ValueError(f"datum_id is a string and steps an integer, got {ids.type} and {steps.type}")
    if ids.null_count or steps.null_count:
        raise ValueError("some of its ids or steps are null")
    if len(ids.unique()) < len(ids):
        raise ValueError("it names a datum twice")
    return dict(zip(ids.to_pylist(), steps.to_pylist(), strict=True))


def digest(steps: Mapping[str, int]) -> str:
    """SHA-256 of what a plan says, in whatever order and file."""
    return hashlib.sha256(json.dumps(sorted(steps.items())).encode()).hexdigest()


def read(location: str) -> dict[str, int]:
    """The plan at a path or URI.

    Raises:
        CallerError: if it is not there, or no step plan.
    """
    files, name = _placed(location)
    try:
        return parsed(files.read(name))
    except FileNotFoundError as error:
        raise CallerError(
            f"fit.step_plan: no file {location!r}; `nfscale estimate JOB --budget 10h` writes one"
        ) from error
    except OSError as error:
        raise CallerError(f"fit.step_plan: cannot read {location!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise CallerError(f"fit.step_plan: {location!r} is no step plan: {' '.join(str(error).split())}") from error


def write(location: str, steps: Mapping[str, int], figures: dict[str, Any]) -> None:
    """Put a plan at a path or URI.

    Raises:
        CallerError: if it cannot be written.
    """
    files, name = _placed(location)
    try:
        files.replace(name, to_bytes(steps, figures))
    except OSError as error:
        raise CallerError(f"cannot write the step plan {location!r}: {error.strerror or error}") from error


def _placed(location: str) -> tuple[Files, str]:
    if is_uri(location):
        folder, _, name = location.rpartition("/")
        return open_files(folder), name
    return open_files(Path(location).parent), Path(location).name
