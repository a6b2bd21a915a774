"""A weights table of fields that were not fitted here: sampled by a model, converted, made for a test.

The folder is a run like any other: a plan, files, commits that name them, `_SUCCESS`. Writing it again over a folder
that is there is refused.
"""

import time
import uuid
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from nfscale.errors import CallerError
from nfscale.store.run_folder import Commit, Plan, RunFolder, Shard
from nfscale.store.schema import write_parquet


def write_run(folder: RunFolder, plan: Plan, tables: Iterable[pa.Table]) -> None:
    """Write tables of the plan's schema, each as a shard of its own, and mark the run as complete.

    Raises:
        CallerError: if the folder holds a run.
    """
    if folder.has_plan:
        raise CallerError(f"{folder} holds a run already; choose another place, or remove it")
    folder.freeze(plan)
    start = 0
    for order, table in enumerate(tables):
        shard = Shard(order, start, start + len(table))
        attempt = uuid.uuid4().hex[:12]
        name = folder.data_file(shard, attempt)
        began = time.perf_counter()
        with folder.files.writing(name) as stream:
            write_parquet(table, stream)
        quality = table["quality"].drop_null().to_numpy()
        summary: dict[str, float] = {}
        if len(quality):
            p05, p50, p95 = np.percentile(quality, [5, 50, 95]).tolist()
            summary = {"mean": float(quality.mean()), "p05": p05, "p50": p50, "p95": p95}
        folder.commit(
            Commit(
                shard=shard.name,
                index=order,
                start=shard.start,
                stop=shard.stop,
                file=name,
                rows=len(table),
                bytes=folder.files.size(name) or 0,
                sha256=folder.files.sha256(name),
                attempt=attempt,
                order=order,
                worker="written",
                committed_at=time.time(),
                seconds=time.perf_counter() - began,
                fit_seconds=0.0,
                counts=dict(Counter(table["status"].to_pylist())),
                quality=summary,
                steps_mean=0.0,
            )
        )
        start = shard.stop
    folder.finish(start)
