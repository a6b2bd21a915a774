"""How fast a table that memory does not hold is read in shuffled batches, beside what pyarrow takes to read it at all.

The table is that of a run folder, or written by the store's own writer into a folder that is removed afterwards: random
weights around one theta0, labels in sorted order. It is read in turns, in a process for each pass: by pyarrow, which
hands out the same two columns in the order of the files and does nothing with them, as a dataset in one thread and in
as many as it likes, and file by file in one thread; and by `WeightsStream`, shuffled, the first epoch, which begins
with a look for the table's classes, and a later one. The seconds of a pass begin when the run folder is open and torch
and pyarrow are imported. The page cache is warm where the memory allows it.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nfscale.benchmark.timing import print_rows
from nfscale.benchmark.workers import peak_resident
from nfscale.errors import NfscaleError

HELP = "shuffled batches out of a table that memory does not hold, beside a bare scan of its files"

_SHARD_ROWS = 4096
_CLASSES = 10
_SPREAD = 0.01  # of weights around theta0: what little fits of one start move by
_COLUMNS = ["weights", "label"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a run folder whose table is read")
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the table (default: %(default)s)")
    parser.add_argument("--weights", type=int, default=300, help="of a row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="as store.dtype (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--folder", help="where the table is written to; by default, where temporary files are")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: way, rows_per_second, mb_per_second (of weights as float32), wall_ratio, cpu_seconds, cpu_ratio, peak_mb.

    Ratios are the speed over that of the fastest of pyarrow's ways: by wall time, and by seconds of CPU of the whole
    process, of which other work on the machine takes less away. peak_mb is the most that the process held, imports
    included and the page cache not.

    Raises:
        NfscaleError: if a way does not come to all rows.
    """
    if arguments.run is not None:
        return _measured(arguments.run, arguments.batch, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="nfscale-benchmark-", dir=arguments.folder) as folder:
        place = str(Path(folder) / "run")
        seconds = _written(place, arguments.rows, arguments.weights, arguments.dtype)
        print(f"written in {seconds:.0f} s")
        return _measured(place, arguments.batch, arguments.rounds)


def _measured(place: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    from nfscale.store import open_weights

    table = open_weights(place)
    count, weights = len(table), table.layout.size
    megabytes = sum(commit.bytes for commit in table.commits) / 1e6
    print(f"{count:,} rows of {weights:,} weights as {table.plan.dtype}, {megabytes:,.0f} MB")
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, found in passes.items():
            found.append(_in_a_process(name, place, batch))
            _refuse_less(name, found[-1], count)
    middle = {name: _medians(found) for name, found in passes.items()}
    fastest = {key: min(middle[name][key] for name in SCANS) for key in ("wall_seconds", "cpu_seconds")}
    rows = [
        {
            "way": name,
            "rows_per_second": count / one["wall_seconds"],
            "mb_per_second": 4e-6 * count * weights / one["wall_seconds"],
            "wall_ratio": fastest["wall_seconds"] / one["wall_seconds"],
            "cpu_seconds": one["cpu_seconds"],
            "cpu_ratio": fastest["cpu_seconds"] / one["cpu_seconds"],
            "peak_mb": one["peak_mb"],
        }
        for name, one in middle.items()
    ]
    print_rows(rows)
    return rows


def _written(place: str, rows: int, weights: int, dtype: str) -> float:
    """Write the table; seconds."""
    from nfscale.job import FORMAT_VERSION, job_from_settings
    from nfscale.layout import Layout
    from nfscale.store.run_folder import Plan, RunFolder
    from nfscale.store.writer import write_run

    settings = {"dataset": {"kind": "digits"}, "optimizer": {"kind": "adam"}, "output": place}
    job = job_from_settings(settings | {"store": {"dtype": dtype}}, [])
    draw = np.random.default_rng(0)
    plan = Plan(
        id="synthetic",
        fingerprint="",
        job=job.model_dump(mode="json"),
        data_count=rows,
        ids_sha256="",
        label_type="int64",
        samples_per_step=1,
        shard_fields=_SHARD_ROWS,
        layout=Layout.of([("weights", (weights,))]),
        forward={"signal": {"quality_name": "psnr_db"}},
        theta0=draw.uniform(-0.5, 0.5, weights).astype(np.float32),
        format=FORMAT_VERSION,
    )
    started = time.perf_counter()
    write_run(RunFolder(place), plan, _tables(plan, draw))
    return time.perf_counter() - started


def _tables(plan: Any, draw: np.random.Generator) -> Iterator[Any]:
    from nfscale.store.schema import Row, to_table

    schema = plan.table_schema()
    for shard in plan.shards():
        moved = _SPREAD * draw.standard_normal((len(shard), plan.layout.size), dtype=np.float32)
        rows = [
            Row(
                f"row-{index:07d}",
                index,
                "max_steps",
                shard.index,
                "written",
                index,
                split="train",
                label=index * _CLASSES // plan.data_count,
                weights=weights,
                quality=40.0,
                steps=100,
            )
            for index, weights in enumerate(plan.theta0 + moved, shard.start)
        ]
        yield to_table(rows, schema, plan.theta0)


def _in_a_process(name: str, place: str, batch: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_timed, name, place, batch).result()


def _refuse_less(name: str, found: dict[str, float], rows: int) -> None:
    if found["rows"] != rows:
        raise NfscaleError(f"{name} came to {found['rows']:,.0f} rows of {rows:,}")


def _timed(name: str, place: str, batch: int) -> dict[str, float]:
    import torch

    from nfscale import learn  # noqa: F401 (imported before the clock starts)
    from nfscale.store import open_weights

    torch.set_num_threads(1)
    read = WAYS[name](open_weights(place), batch)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = read()
    return {
        "rows": rows,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": (peak_resident() or 0) / 1e6,
    }


Read = Callable[[], int]
"""The rows that it came to."""


def _dataset(use_threads: bool) -> Callable[[Any, int], Read]:
    def of(table: Any, batch: int) -> Read:
        return lambda: sum(map(len, table.dataset().to_batches(columns=_COLUMNS, use_threads=use_threads)))

    return of


def _files(table: Any, batch: int) -> Read:
    import pyarrow.parquet as pq

    def read() -> int:
        rows = 0
        for name in table.files():
            with pq.ParquetFile(name) as opened:
                rows += len(opened.read(columns=_COLUMNS, use_threads=False))
        return rows

    return read


def _first_epoch(table: Any, batch: int) -> Read:
    from nfscale.learn import WeightsStream

    stream = WeightsStream(table, batch)
    return lambda: sum(len(labels) for _, labels in stream)


def _later_epoch(table: Any, batch: int) -> Read:
    from nfscale.learn import WeightsStream

    stream = WeightsStream(table, batch)
    _ = stream.labels
    return lambda: sum(len(labels) for _, labels in stream)


SCANS: dict[str, Callable[[Any, int], Read]] = {
    "pyarrow dataset, one thread": _dataset(use_threads=False),
    "pyarrow dataset, its threads": _dataset(use_threads=True),
    "pyarrow file by file, one thread": _files,
}
WAYS = SCANS | {"stream, first epoch": _first_epoch, "stream, later epoch": _later_epoch}
"""An open table and the rows of a batch -> what is timed."""


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in found) for key in found[0]}
