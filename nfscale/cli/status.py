"""`nfscale status`: what is committed, in flight, failed and why."""

import statistics
import time
from collections import Counter
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from nfscale.cli.common import JsonOption, RunArgument, percentages, write_json
from nfscale.driver import BEAT_SECONDS
from nfscale.store import RunFolder
from nfscale.store.run_folder import Commit
from nfscale.store.schema import FAILED_STATUSES, STATUS, quality_text

_REASONS_SHOWN = 20
_DEAD_AFTER = 6  # signs of life that a driver may miss, on a file system that is slow to show them


def status(run: RunArgument, json_file: JsonOption = None) -> None:
    """Show what of a run is committed, in flight, and failed and why.

    Example: `nfscale status runs/digits`
    """
    folder = RunFolder(run)
    plan, commits = folder.plan(), folder.commits()
    counts: Counter[str] = Counter()
    for commit in commits:
        counts.update(commit.counts)
    damaged = [c.shard for c in commits if folder.files.size(c.file) != c.bytes]
    reasons, examples = _failures(folder, [c for c in commits if c.failed and c.shard not in damaged])
    medians = [c.quality["p50"] for c in commits if c.quality]
    driver = folder.driver()
    figures = {
        "output": run,
        "name": plan.job["name"],
        "data": plan.data_count,
        "committed": sum(counts.values()),
        "shards": len(commits),
        "complete": folder.is_complete,
        "state": _state(folder, driver),
        "driver": driver,
        "counts": dict(counts),
        "quality_name": plan.quality_name,
        "shard_median_quality": statistics.median(medians) if medians else None,
        "damaged": damaged,
        "uncommitted_files": folder.uncommitted(),
        "failed": [
            {"status": key[0], "reason": key[1], "count": count, "example": examples[key]}
            for key, count in reasons.most_common()
        ],
    }
    write_json(json_file, figures)
    console = Console(soft_wrap=True, highlight=False)
    share = f"{figures['committed']:,} of {figures['data']:,} data committed in {figures['shards']} shards"
    console.print(f"{figures['name']}: {share}; {figures['state']}")
    if driver is not None:
        for worker, shard in driver["in_flight"].items():
            console.print(f"in flight {shard} on {worker}")
    if counts:
        console.print(f"rows      {percentages(dict(counts))}")
    if figures["shard_median_quality"] is not None:
        console.print(
            f"quality   median of the shards' median {plan.quality_name} "
            + quality_text(plan.quality_name, figures["shard_median_quality"])
        )
    if damaged:
        console.print(f"damaged   {', '.join(damaged[:5])}: files gone or of another size; `nfscale verify` says more")
    if left := figures["uncommitted_files"]:
        console.print(
            f"attempts  {len(left)} files that no commit names; `nfscale gc` removes them once no driver runs"
        )
    for entry in figures["failed"][:_REASONS_SHOWN]:
        what = f"{entry['count']:,} x {entry['status']}: {entry['reason']} (such as {entry['example']})"
        console.print(f"failed    {what}", markup=False)


def _state(folder: RunFolder, driver: dict[str, Any] | None) -> str:
    """In words: complete, running, killed or stopped."""
    if driver is not None:
        age = time.time() - driver["at"]
        where = f"on {driver['host']}, process {driver['pid']}, last sign of life {age:.0f} s ago"
        if age < _DEAD_AFTER * BEAT_SECONDS:
            return f"running {where}"
        return f"its driver was killed ({where}); the same encode command continues it"
    return "complete" if folder.is_complete else "stopped; the same encode command continues it"


def _failures(folder: RunFolder, commits: list[Commit]) -> tuple[Counter, dict[tuple[str, str], str]]:
    """Failed rows by (status, reason), and an example of each; reads only files that hold some."""
    reasons: Counter = Counter()
    examples: dict[tuple[str, str], str] = {}
    for commit in commits:
        rows = pq.read_table(folder.files.source(commit.file), columns=["datum_id", "status", "reason"])
        for row in rows.filter(STATUS.isin(FAILED_STATUSES)).to_pylist():
            key = (row["status"], row["reason"])
            reasons[key] += 1
            examples.setdefault(key, row["datum_id"])
    return reasons, examples
