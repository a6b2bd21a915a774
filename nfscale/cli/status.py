"""`nfscale status`: what is committed, in flight, failed and why."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, RunArgument, percentages, write_json
from nfscale.cli.progress import clock
from nfscale.driver import BEAT_SECONDS
from nfscale.plan import actual
from nfscale.store import RunFolder
from nfscale.store.run_folder import Commit, Plan
from nfscale.store.schema import FAILED_STATUSES, STATUS, quality_text

_REASONS_SHOWN = 20
_WATCH_SECONDS = 2.0  # between two looks
_WATCH_SHARE = 4.0  # and at least that many times what a look took: listing a store costs
_WATCH_PATIENCE = 30.0  # seconds in which a driver may still be starting

_Failures = tuple[Counter, dict[tuple[str, str], str]]
_DEAD_AFTER = 6  # signs of life that a driver may miss, on a file system that is slow to show them


def status(
    run: RunArgument,
    json_file: JsonOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until no driver is at work.")] = False,
) -> None:
    """Show what of a run is committed, in flight, and failed and why.

    Example: `nfscale status runs/digits`, or `nfscale status runs/digits --watch`
    """
    folder = RunFolder(run)
    plan, known = folder.plan(), _Known(folder)
    console = Console(soft_wrap=True, highlight=False)
    if not watch:
        figures = known.figures(plan)
        write_json(json_file, figures)
        for line in _lines(figures):
            console.print(line, markup=False)
        return
    for figures in _watched(known, plan):
        write_json(json_file, figures)
        lines = [*_pace(figures, known.before), *_lines(figures)]
        if console.is_terminal:
            console.clear()
        console.print("\n".join([*lines, ""]), markup=False)


def _watched(known: "_Known", plan: Plan) -> Iterator[dict[str, Any]]:
    """The figures now and then, the last time when no driver is at work any more."""
    waited = 0.0
    while True:
        started = time.monotonic()
        figures = known.figures(plan)
        yield figures
        standing = figures["standing"]
        if standing in ("complete", "killed") or (standing == "stopped" and waited >= _WATCH_PATIENCE):
            return
        if standing == "running":
            waited = _WATCH_PATIENCE  # it need not be waited for again
        pause = max(_WATCH_SECONDS, _WATCH_SHARE * (time.monotonic() - started))
        waited += pause
        time.sleep(pause)


class _Known:
    """What is known of a run's commits, so that looking again reads only what is new."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.before: dict[str, Any] | None = None
        """The figures of the first look."""
        self._failures: dict[str, _Failures] = {}

    def figures(self, plan: Plan) -> dict[str, Any]:
        """How the run stands."""
        folder, commits = self.folder, self.folder.commits()
        counts: Counter[str] = Counter()
        for commit in commits:
            counts.update(commit.counts)
        damaged = [c.shard for c in commits if folder.files.size(c.file) != c.bytes]
        reasons, examples = self._reasons([c for c in commits if c.failed and c.shard not in damaged])
        medians = [c.quality["p50"] for c in commits if c.quality]
        driver = folder.driver()
        standing, state = state_of(folder, driver)
        figures = {
            "output": str(folder),
            "name": plan.job["name"],
            "data": plan.data_count,
            "committed": sum(counts.values()),
            "shards": len(commits),
            "complete": folder.is_complete,
            "standing": standing,
            "state": state,
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
            "at": time.time(),
        }
        if (expected := folder.estimate()).get("fingerprint") == plan.fingerprint and commits and not damaged:
            figures |= {"estimate": expected, "actual": actual(folder)}
        self.before = self.before or figures
        return figures

    def _reasons(self, commits: list[Commit]) -> "_Failures":
        """Failed rows by (status, reason), and an example of each; reads only files that hold some."""
        reasons: Counter = Counter()
        examples: dict[tuple[str, str], str] = {}
        for commit in commits:
            if commit.file not in self._failures:
                self._failures[commit.file] = _failures(self.folder, commit)
            found, some = self._failures[commit.file]
            reasons.update(found)
            examples = some | examples
        return reasons, examples


def _pace(figures: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """A line on how fast it goes, since the first look."""
    share = figures["committed"] / max(1, figures["data"])
    line = f"{'#' * int(40 * share):<40} {100 * share:.1f} %"
    if before is not None and figures["committed"] > before["committed"]:
        rate = (figures["committed"] - before["committed"]) / max(figures["at"] - before["at"], 1e-9)
        left = (figures["data"] - figures["committed"]) / rate
        line += f", {rate:.1f} data/s, {clock(left)} left"
    return [line]


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures for a person."""
    share = f"{figures['committed']:,} of {figures['data']:,} data committed in {figures['shards']} shards"
    yield f"{figures['name']}: {share}; {figures['state']}"
    if figures["driver"] is not None:
        for worker, shard in figures["driver"]["in_flight"].items():
            yield f"in flight {shard} on {worker}"
    if figures["counts"]:
        yield f"rows      {percentages(figures['counts'])}"
    if figures["shard_median_quality"] is not None:
        name = figures["quality_name"]
        yield f"quality   median of the shards' median {name} {quality_text(name, figures['shard_median_quality'])}"
    if "estimate" in figures:
        yield from _against_estimate(figures["estimate"], figures["actual"])
    if damaged := figures["damaged"]:
        yield f"damaged   {', '.join(damaged[:5])}: files gone or of another size; `nfscale verify` says more"
    if left := figures["uncommitted_files"]:
        yield f"attempts  {len(left)} files that no commit names; `nfscale gc` removes them once no driver runs"
    for entry in figures["failed"][:_REASONS_SHOWN]:
        yield f"failed    {entry['count']:,} x {entry['status']}: {entry['reason']} (such as {entry['example']})"


def _against_estimate(expected: dict[str, Any], found: dict[str, float]) -> Iterator[str]:
    """Lines that say, for each figure of an estimate, its interval and what the run has come to."""
    name = expected["quality_name"]
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "device_hours": ("device-hours", lambda hours: f"{hours:.4g}"),
        "bytes": ("MB of table", lambda size: f"{size / 1e6:.1f}"),
        "median_quality": (f"median {name}", lambda quality: quality_text(name, quality)),
        "share_at_target": ("share at target", lambda share: f"{share:.3f}"),
    }
    for key, (what, text) in forms.items():
        if expected.get(key) is None or key not in found:
            continue
        interval = expected.get(f"{key}_interval")
        within = f" [{text(interval[0])} to {text(interval[1])}]" if interval and None not in interval else ""
        yield f"estimate  {what}: {text(expected[key])}{within} for all; so far {text(found[key])}"


def state_of(folder: RunFolder, driver: dict[str, Any] | None) -> tuple[str, str]:
    """`complete`, `running`, `killed` or `stopped`, and the same in words."""
    if driver is not None:
        age = time.time() - driver["at"]
        where = f"on {driver['host']}, process {driver['pid']}, last sign of life {age:.0f} s ago"
        if age < _DEAD_AFTER * BEAT_SECONDS:
            return "running", f"running {where}"
        return "killed", f"its driver was killed ({where}); the same encode command continues it"
    if folder.is_complete:
        return "complete", "complete"
    return "stopped", "stopped; the same encode command continues it"


def _failures(folder: RunFolder, commit: Commit) -> _Failures:
    """Failed rows of a commit by (status, reason), and an example of each."""
    reasons: Counter = Counter()
    examples: dict[tuple[str, str], str] = {}
    rows = pq.read_table(folder.files.source(commit.file), columns=["datum_id", "status", "reason"])
    for row in rows.filter(STATUS.isin(FAILED_STATUSES)).to_pylist():
        key = (row["status"], row["reason"])
        reasons[key] += 1
        examples.setdefault(key, row["datum_id"])
    return reasons, examples
