"""A run folder as large as one likes, without fitting anything: rows are drawn, commits say what workers might.

python -m tests.synthetic runs/large 1000000
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nfscale.driver import open_run
from nfscale.job import job_from_settings
from nfscale.store.run_folder import Commit, RunFolder, Shard
from nfscale.store.schema import Row, to_table, write_parquet

_CHECKS = 20
_STEPS_PER_CHECK = 50
_TARGET = 38.0
_WORKERS = 12
_SHARD_FIELDS = 4096
_EPOCH = 1_800_000_000.0


class Noise:
    """`count` square images, the smoother the smaller their index modulo 100."""

    def __init__(self, count: int = 1000, side: int = 8) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        drawn = np.random.default_rng(index).random((self.side, self.side, 1))
        smooth = np.full_like(drawn, drawn.mean())
        share = (index % 100) / 100
        return (share * drawn + (1 - share) * smooth).astype(np.float32)


def synthetic_run(output: Path | str, count: int, seed: int = 0) -> RunFolder:
    """A complete run of `count` fields of 25 weights; one in 2,000 has failed."""
    settings = {
        "name": "synthetic",
        "dataset": {"kind": "function", "target": "tests.synthetic:Noise", "arguments": {"count": count}},
        "field": {"kind": "mlp", "width": 4, "depth": 1},
        "optimizer": {"kind": "adam"},
        "fit": {"max_steps": _CHECKS * _STEPS_PER_CHECK, "target": _TARGET, "check_every": _STEPS_PER_CHECK},
        "store": {"shard_fields": _SHARD_FIELDS},
        "track": {"enabled": False},
        "output": str(output),
    }
    folder, plan = open_run(job_from_settings(settings, []))
    draw = np.random.default_rng(seed)
    free = np.full(_WORKERS, _EPOCH)
    for order, shard in enumerate(plan.shards()):
        table = to_table(_rows(plan, shard, draw), plan.table_schema(), plan.theta0)
        table = table.set_column(0, table.schema.field(0), pa.array(_ids(folder, shard), pa.string()))
        name = folder.data_file(shard, "synthetic")
        with folder.files.writing(name) as stream:
            write_parquet(table, stream)
        worker = int(free.argmin())
        seconds = float(draw.uniform(8, 16)) * (2.0 if worker == 3 else 1.0)
        free[worker] += seconds
        folder.commit(
            _commit(folder, shard, table, name, order, f"node-{worker // 4}-worker-{worker}", free[worker], seconds)
        )
    folder.finish(count)
    return folder


def _ids(folder: RunFolder, shard: Shard) -> list[str]:
    return [f"row-{position:07d}" for position in range(shard.start, shard.stop)]


def _rows(plan: Any, shard: Shard, draw: np.random.Generator) -> list[Row]:
    size, checks = plan.layout.size, np.arange(_CHECKS + 1) * _STEPS_PER_CHECK
    rows = []
    for position in range(shard.start, shard.stop):
        row = Row(f"row-{position:07d}", position, "max_steps", shard.index, "synthetic", position)
        row.label, row.split = f"kind {position % 37}", ("train", "train", "test")[position % 3]
        if draw.random() < 0.0005:
            row.status = "decode_error" if position % 2 else "diverged"
            row.reason = "not an image" if position % 2 else "diverged in each of 4 attempts"
            rows.append(row)
            continue
        final = 42 - 0.1 * (position % 100) + draw.normal(0, 2)
        history = 8 + (final - 8) * (1 - np.exp(-checks / draw.uniform(100, 300)))
        reached = np.flatnonzero(history >= _TARGET)
        last = int(reached[0]) if len(reached) else _CHECKS
        row.status = "converged" if len(reached) else "max_steps"
        row.weights = (plan.theta0 + draw.normal(0, 0.1, size)).astype(np.float32)
        row.quality, row.loss = float(history[last]), float(10 ** (-history[last] / 10))
        row.steps = int(checks[last])
        row.steps_to_target = row.steps if len(reached) else None
        row.history_step, row.history_quality = checks[: last + 1].tolist(), history[: last + 1].tolist()
        row.metrics = {"height": 8.0, "width": 8.0}
        row.wall_seconds = row.steps * float(draw.uniform(2e-5, 4e-5))
        rows.append(row)
    return rows


def _commit(
    folder: RunFolder, shard: Shard, table: pa.Table, name: str, order: int, worker: str, ended: float, seconds: float
) -> Commit:
    quality = table["quality"].drop_null().to_numpy()
    status, counts = np.unique(table["status"].to_pylist(), return_counts=True)
    p05, p50, p95 = np.percentile(quality, [5, 50, 95]).tolist()
    return Commit(
        shard=shard.name,
        index=shard.index,
        start=shard.start,
        stop=shard.stop,
        file=name,
        rows=len(table),
        bytes=folder.files.size(name) or 0,
        sha256=folder.files.sha256(name),
        attempt="synthetic",
        order=order,
        worker=worker,
        committed_at=float(ended),
        seconds=seconds,
        fit_seconds=0.9 * seconds,
        counts=dict(zip(status.tolist(), counts.tolist(), strict=True)),
        quality={"mean": float(quality.mean()), "p05": p05, "p50": p50, "p95": p95},
        steps_mean=float(np.mean(table["steps"].drop_null().to_numpy())),
        spent={"steps": 0.8 * seconds, "checks": 0.05 * seconds, "reading": 0.05 * seconds, "writing": 0.05 * seconds},
    )


if __name__ == "__main__":
    print(synthetic_run(sys.argv[1], int(sys.argv[2])))
