"""`nfscale status`: what is committed, in flight, failed and why."""

from collections import Counter

import numpy as np
from rich.console import Console

from nfscale.cli.common import JsonOption, RunArgument, percentages, write_json
from nfscale.store import RunFolder, open_weights
from nfscale.store.schema import FAILED_STATUSES, STATUS

_REASONS_SHOWN = 20


def status(run: RunArgument, json_file: JsonOption = None) -> None:
    """Show what of a run is committed, in flight, and failed and why.

    Example: `nfscale status runs/digits`
    """
    folder = RunFolder(run)
    table = open_weights(run)
    rows = table.to_arrow(["datum_id", "status", "reason"])
    counts = Counter(rows["status"].to_pylist())
    failed = rows.filter(STATUS.isin(FAILED_STATUSES))
    reasons = Counter(zip(failed["status"].to_pylist(), failed["reason"].to_pylist(), strict=True))
    examples = {}
    for datum_id, key in zip(
        failed["datum_id"].to_pylist(),
        zip(failed["status"].to_pylist(), failed["reason"].to_pylist(), strict=True),
        strict=True,
    ):
        examples.setdefault(key, datum_id)
    committed = {commit.file for commit in table.commits}
    attempts = sorted(str(p.relative_to(run)) for p in (run / "data").glob("*.parquet"))
    uncommitted = [name for name in attempts if name not in committed]
    quality = table.to_arrow(["quality"])["quality"].drop_null()
    figures = {
        "output": str(run),
        "name": table.plan.job["name"],
        "data": table.plan.data_count,
        "committed": len(rows),
        "shards": len(table.commits),
        "complete": folder.is_complete,
        "counts": dict(counts),
        "quality_name": table.plan.quality_name,
        "quality_median": float(np.median(quality)) if len(quality) else None,
        "uncommitted_files": uncommitted,
        "failed": [
            {"status": key[0], "reason": key[1], "count": count, "example": examples[key]}
            for key, count in reasons.most_common()
        ],
    }
    write_json(json_file, figures)
    console = Console(soft_wrap=True, highlight=False)
    state = "complete" if folder.is_complete else "not complete; the same `nfscale encode` command continues it"
    share = f"{len(rows):,} of {figures['data']:,} data committed in {figures['shards']} shards"
    console.print(f"{figures['name']}: {share}, {state}")
    if counts:
        console.print(f"rows      {percentages(dict(counts))}")
    if figures["quality_median"] is not None:
        console.print(f"quality   median {figures['quality_name']} {figures['quality_median']:.2f}")
    if uncommitted:
        console.print(f"attempts  {len(uncommitted)} files that no commit names: in flight, or left by killed workers")
    for entry in figures["failed"][:_REASONS_SHOWN]:
        what = f"{entry['count']:,} x {entry['status']}: {entry['reason']} (such as {entry['example']})"
        console.print(f"failed    {what}", markup=False)
