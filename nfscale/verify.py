"""Is what is stored what was committed, and does it decode to what was measured?

Every committed file is opened again: checksum, schema, rows, ids. Every row that has weights is decoded
at its own samples and its quality measured anew against the dataset.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow.parquet as pq
import torch

from nfscale.engine.step import evaluate, stack_samples
from nfscale.run import OpenRun
from nfscale.signals import Kind, Samples
from nfscale.store.run_folder import Commit, RunFolder
from nfscale.store.schema import FAILED_STATUSES, restored
from nfscale.store.table import as_matrix

_ROUNDING_DB = 100.0
"""Above it an error is a hundred thousandth of the range, which is what float32 leaves of a forward of hundreds of
products: two ways to evaluate the same weights differ by decibels, and qualities count as equal."""


def tolerance_of(quality_name: str) -> float:
    """Largest difference between the quality recorded and the quality measured again, in the quality's unit."""
    return 0.05 if quality_name.endswith("_db") else 0.001


def _difference(recorded: float, measured: float, quality_name: str) -> float:
    """Of two qualities, in their unit; NaN where one of them is."""
    if quality_name.endswith("_db") and min(recorded, measured) >= _ROUNDING_DB:
        return 0.0
    return abs(measured - recorded)


@dataclass
class Verification:
    """What was checked, and each mismatch in a sentence."""

    files: int = 0
    rows: int = 0
    decoded: int = 0
    tolerance: float = 0.0
    """Allowed of the next."""
    largest_difference: float = 0.0
    """Of quality, recorded against measured again."""
    mismatches: list[str] = field(default_factory=list)


def verify(folder: RunFolder, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Check every committed row of a run.

    Args:
        progress: told (rows checked, rows of the run) after each file.

    Raises:
        CallerError: if this is no run folder.
        EncodeError: if the dataset is no longer the one that was encoded.
    """
    run = OpenRun(folder)
    found = Verification(tolerance=tolerance_of(run.plan.quality_name))
    seen: dict[str, str] = {}
    for commit in folder.commits():
        found.files += 1
        for mismatch in _file_mismatches(run, commit, seen):
            found.mismatches.append(f"{commit.shard}: {mismatch}")
            break
        else:
            _measure(run, commit, found)
        found.rows += commit.rows
        progress(found.rows, run.plan.data_count)
    if found.rows != run.plan.data_count:
        what = "the run is not complete" if not folder.is_complete else "the run is marked complete"
        found.mismatches.append(f"{found.rows} rows are committed of {run.plan.data_count} data; {what}")
    return found


def _file_mismatches(run: OpenRun, commit: Commit, seen: dict[str, str]) -> Iterator[str]:
    files = run.folder.files
    if files.size(commit.file) is None:
        yield f"{commit.file} is missing"
    elif (checksum := files.sha256(commit.file)) != commit.sha256:
        yield f"{commit.file} has checksum {checksum[:12]}, {commit.sha256[:12]} was committed; its bytes have changed"
    elif not pq.read_schema(files.source(commit.file)).equals(run.plan.table_schema()):
        yield f"{commit.file} has another schema than the run"
    else:
        ids = pq.read_table(files.source(commit.file), columns=["datum_id"])["datum_id"].to_pylist()
        expected = list(run.dataset.ids[commit.start : commit.stop])
        if sorted(ids) != sorted(expected):
            yield f"{commit.file} holds other ids than the data {commit.start} to {commit.stop - 1}"
        for datum_id in ids:
            if datum_id in seen:
                yield f"datum {datum_id!r} has a second row; the other is in {seen[datum_id]}"
            seen[datum_id] = commit.shard


def _measure(run: OpenRun, commit: Commit, found: Verification) -> None:
    """Decode the rows of a file at their own samples and compare the quality."""
    columns = ["datum_id", "weights", "quality", "status"]
    table = pq.read_table(run.folder.files.source(commit.file), columns=columns)
    place = {datum_id: position for position, datum_id in enumerate(run.dataset.ids[commit.start : commit.stop])}
    by_kind: dict[Kind, list[tuple[str, np.ndarray, float, Samples]]] = {}
    weights = restored(as_matrix(table["weights"]), run.plan.dtype, run.plan.theta0)
    rows = table.drop_columns(["weights"])
    for row, vector in zip(rows.to_pylist(), weights, strict=True):
        if not np.isfinite(vector).all():
            if row["status"] not in FAILED_STATUSES:
                found.mismatches.append(f"{commit.shard}: datum {row['datum_id']!r} is ok and has no finite weights")
            continue
        datum = run.dataset.read(commit.start + place[row["datum_id"]])
        if datum.content is None:
            found.mismatches.append(f"datum {datum.id!r} cannot be read any more: {datum.error}")
            continue
        samples = run.signal.samples(datum.content)
        samples = replace(samples, heldout=None)
        by_kind.setdefault(samples.kind, []).append((datum.id, vector, row["quality"], samples))
    for group in by_kind.values():
        _, quality = evaluate(
            run.field,
            run.signal,
            torch.from_numpy(np.stack([vector for _, vector, _, _ in group])),
            stack_samples([samples for *_, samples in group], torch.device("cpu")),
        )
        for (datum_id, _, recorded, _), measured in zip(group, quality.tolist(), strict=True):
            found.decoded += 1
            difference = _difference(recorded, measured, run.plan.quality_name)
            found.largest_difference = max(found.largest_difference, difference)
            if not difference <= found.tolerance:
                found.mismatches.append(
                    f"{commit.shard}: datum {datum_id!r} decodes to {measured:.2f}, {recorded:.2f} was recorded"
                )
