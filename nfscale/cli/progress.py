"""Progress of an encode: one bar on a terminal, a plain line every few seconds elsewhere."""

import statistics
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nfscale.encode import Progress as ShardProgress
from nfscale.store.run_folder import Commit, Plan, RunFolder
from nfscale.store.schema import quality_text

_LINE_SECONDS = 10.0
_RECENT = 2000  # qualities that the running median looks back on


class ProgressDisplay:
    """Fields done, fields per second, median quality, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done = self._before = self._total = 0
        self._qualities: deque[float] = deque(maxlen=_RECENT)
        self._uncommitted: dict[str, int] = {}
        self._started = self._printed = time.monotonic()
        self._unit = ""
        self._waiting: str | None = None
        self._bar: Progress | None = None

    def on_start(self, folder: RunFolder, plan: Plan, commits: list[Commit]) -> None:
        self._total, self._unit = plan.data_count, plan.quality_name
        self._done = self._before = sum(commit.rows for commit in commits)
        if self._before:
            self._console.print(f"resuming: {self._before:,} of {self._total:,} fields are committed")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self._console
            )
            self._task = self._bar.add_task(plan.job["name"], total=self._total, completed=self._done, text="")
            self._bar.start()
        self._started = self._printed = time.monotonic()

    def on_progress(self, progress: ShardProgress) -> None:
        self._qualities.extend(progress.qualities)
        self._uncommitted[progress.shard] = self._uncommitted.get(progress.shard, 0) + len(progress.qualities)

    def on_commit(self, commit: Commit) -> None:
        self._uncommitted.pop(commit.shard, None)
        self._done += commit.rows

    def on_waiting(self, what: str | None) -> None:
        self._waiting = what

    def on_tick(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._fields, text=self._text(now))
        elif now - self._printed >= _LINE_SECONDS:
            self._printed = now
            self._console.print(self._text(now))

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._fields, text=self._text(time.monotonic()))
            self._bar.stop()

    @property
    def _fields(self) -> int:
        return min(self._total, self._done + sum(self._uncommitted.values()))

    def _text(self, now: float) -> str:
        here = self._fields - self._before
        parts = [f"{self._fields:,}/{self._total:,} fields"]
        if here:
            rate = here / max(now - self._started, 1e-9)
            parts.append(f"{rate:.1f} fields/s")
            if self._qualities:
                parts.append(f"median {self._unit} {quality_text(self._unit, statistics.median(self._qualities))}")
            parts.append(f"{clock((self._total - self._fields) / rate)} left")
        else:
            parts.append(f"{clock(now - self._started)} of preparation")
        if self._waiting:
            parts.append(f"waiting for {self._waiting}")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """A duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
