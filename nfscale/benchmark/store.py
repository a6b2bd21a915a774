"""Sizes and read speeds of a table of weights: as nfscale stores it, and as a user would who has torch and numpy.

Each way is written, read whole, and read one row at a time at random places, all in turns; the page cache is warm for
all of them. With a run folder its own weights are taken; without one, theta0 of a field of width 64 and depth 4 plus
normal differences of a hundredth, which compress like those of fits that moved little.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nfscale.benchmark.timing import in_turns, print_rows
from nfscale.fields import MLP, theta0_of

HELP = "sizes and read speeds of the formats that weights are stored in"

_RANDOM_ROWS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a run folder whose weights are taken")
    parser.add_argument("--fields", type=int, default=2048, help="rows, at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: format, bytes_per_field, size_ratio, write_mb_per_s, read_mb_per_s, read_ratio, row_ms, largest_error."""
    weights, theta0 = _weights(arguments.run, arguments.fields)
    positions = np.random.default_rng(0).integers(0, len(weights), _RANDOM_ROWS)
    with tempfile.TemporaryDirectory(prefix="nfscale-benchmark-") as folder:
        ways = _ways(Path(folder), weights, theta0)
        writes = in_turns({name: write for name, (write, _, _) in ways.items()}, arguments.rounds)
        reads = in_turns({name: read for name, (_, read, _) in ways.items()}, arguments.rounds)
        picks = in_turns({name: partial(_each, row, positions) for name, (_, _, row) in ways.items()}, arguments.rounds)
        sizes = {name: _size_below(Path(folder) / name) for name in ways}
        errors = {name: float(np.abs(read() - weights).max()) for name, (_, read, _) in ways.items()}
    first = next(iter(ways))
    rows = [
        {
            "format": name,
            "bytes_per_field": sizes[name] / len(weights),
            "size_ratio": sizes[name] / sizes[first],
            "write_mb_per_s": weights.nbytes / writes[name].median / 1e6,
            "read_mb_per_s": weights.nbytes / reads[name].median / 1e6,
            "read_ratio": reads[first].median / reads[name].median,
            "row_ms": 1e3 * picks[name].median / _RANDOM_ROWS,
            "largest_error": errors[name],
        }
        for name in ways
    ]
    print(f"{len(weights):,} fields of {weights.shape[1]:,} weights, {weights.nbytes / 1e6:.0f} MB as float32")
    print_rows(rows)
    return rows


def _weights(run_folder: str | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 [rows, P], and what they start from [P]."""
    if run_folder is not None:
        from nfscale.store import open_weights

        table = open_weights(run_folder)
        weights = table.weights()[:count]
        weights = np.ascontiguousarray(weights[np.isfinite(weights).all(axis=1)])
        return weights, np.zeros(weights.shape[1], np.float32) if table.theta0 is None else table.theta0
    field: Any = MLP(2, 3, width=64, depth=4)
    theta0 = theta0_of(field, seed=0).numpy()
    moved = np.random.default_rng(0).normal(0, 0.01, (count, len(theta0))).astype(np.float32)
    return theta0 + moved, theta0


def _each(row: Callable[[int], np.ndarray], positions: np.ndarray) -> None:
    for position in positions:
        row(int(position))


def _size_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _ways(folder: Path, weights: np.ndarray, theta0: np.ndarray) -> dict[str, tuple[Callable, Callable, Callable]]:
    """(write, read all, read one row) of each format; the first is what the others are compared with."""
    ways = {"torch.save per field": _torch_files(folder / "torch.save per field", weights)}
    ways["npz compressed"] = _npz(folder / "npz compressed", weights)
    ways["npy mapped"] = _npy(folder / "npy mapped", weights)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        print("pyarrow is not installed: the formats of nfscale are left out")
        return ways
    for dtype in ("float32", "float16", "delta_float16"):
        name = f"nfscale {dtype}"
        ways[name] = _parquet(folder / name, weights, theta0, dtype)
    ways["nfscale ipc copy"] = _ipc(folder / "nfscale ipc copy", weights)
    return ways


def _torch_files(folder: Path, weights: np.ndarray) -> tuple[Callable, Callable, Callable]:
    folder.mkdir()

    def write() -> None:
        for position, row in enumerate(weights):
            torch.save(torch.from_numpy(row.copy()), folder / f"{position}.pt")

    def row(position: int) -> np.ndarray:
        return torch.load(folder / f"{position}.pt", weights_only=True).numpy()

    return write, lambda: np.stack([row(position) for position in range(len(weights))]), row


def _npz(folder: Path, weights: np.ndarray) -> tuple[Callable, Callable, Callable]:
    folder.mkdir()
    path = folder / "weights.npz"

    def read() -> np.ndarray:
        with np.load(path) as archive:
            return archive["weights"]

    return lambda: np.savez_compressed(path, weights=weights), read, lambda position: read()[position]


def _npy(folder: Path, weights: np.ndarray) -> tuple[Callable, Callable, Callable]:
    folder.mkdir()
    path = folder / "weights.npy"
    return (
        lambda: np.save(path, weights),
        lambda: np.array(np.load(path, mmap_mode="r")),
        lambda position: np.array(np.load(path, mmap_mode="r")[position]),
    )


def _parquet(folder: Path, weights: np.ndarray, theta0: np.ndarray, dtype: Any) -> tuple[Callable, Callable, Callable]:
    """Through the functions that write a run's own table."""
    import pyarrow.parquet as pq

    from nfscale.layout import Layout
    from nfscale.store.schema import ROW_GROUP_ROWS, Row, restored, table_schema, to_table, write_parquet
    from nfscale.store.table import as_matrix

    folder.mkdir()
    path = folder / "weights.parquet"
    layout = Layout.of([("weights", (weights.shape[1],))])
    schema = table_schema(layout, "int64", "psnr_db", "", 1, dtype)
    rows = [Row(f"{i:07d}", i, "converged", 0, "a", i, weights=row) for i, row in enumerate(weights)]
    table = to_table(rows, schema, theta0)

    def write() -> None:
        with path.open("wb") as stream:
            write_parquet(table, stream)

    def read() -> np.ndarray:
        return restored(as_matrix(pq.read_table(path, columns=["weights"])["weights"]), dtype, theta0)

    def row(position: int) -> np.ndarray:
        with pq.ParquetFile(path) as opened:
            group = opened.read_row_group(position // ROW_GROUP_ROWS, columns=["weights"])
        return restored(as_matrix(group["weights"].slice(position % ROW_GROUP_ROWS, 1)), dtype, theta0)[0]

    return write, read, row


def _ipc(folder: Path, weights: np.ndarray) -> tuple[Callable, Callable, Callable]:
    import pyarrow as pa

    from nfscale.store.table import as_matrix

    folder.mkdir()
    path = folder / "weights.arrow"
    values = pa.FixedSizeListArray.from_arrays(pa.array(weights.ravel()), weights.shape[1])
    table = pa.table({"weights": values})

    def write() -> None:
        with path.open("wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=256)

    def mapped() -> Any:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()["weights"]

    opened: list[Any] = []

    def row(position: int) -> np.ndarray:
        if not opened:
            opened.append(mapped())  # once, as a training loop does
        return as_matrix(opened[0].slice(position, 1))[0]

    return write, lambda: as_matrix(mapped()), row
