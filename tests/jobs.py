"""Small jobs that several tests run."""

from pathlib import Path
from typing import Any

from nfscale.driver import Summary, open_run, serve, totals
from nfscale.encode import Progress
from nfscale.job import EncodeJob, job_from_settings
from nfscale.pool import InProcessPool
from nfscale.store.run_folder import Commit, Plan, RunFolder


def tiny_settings(output: Path | str, **sections: Any) -> dict[str, Any]:
    """48 digits, fitted for at most 60 steps: a second of work."""
    settings = {
        "name": "tiny",
        "dataset": {"kind": "digits", "limit": 48},
        "signal": {"kind": "image"},
        "field": {"kind": "mlp", "width": 16, "depth": 2},
        "optimizer": {"kind": "esgd", "calibration_data": 8, "warmup": 20},
        "fit": {"max_steps": 60, "samples": "full", "check_every": 20},
        "store": {"shard_fields": 16},
        "workers": 0,
        "output": str(output),
    }
    return settings | sections


def tiny_job(output: Path | str, *overrides: str, **sections: Any) -> EncodeJob:
    return job_from_settings(tiny_settings(output, **sections), list(overrides))


class Recorder:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.before: list[Commit] = []
        self.fields = 0
        self.commits: list[Commit] = []

    def on_start(self, folder: RunFolder, plan: Plan, commits: list[Commit]) -> None:
        self.before = commits

    def on_progress(self, progress: Progress) -> None:
        self.fields += len(progress.qualities)

    def on_commit(self, commit: Commit) -> None:
        self.commits.append(commit)

    def on_waiting(self, what: str | None) -> None: ...

    def on_tick(self) -> None: ...


def encode_in_process(job: EncodeJob, *observers: Any) -> tuple[RunFolder, Summary]:
    """The whole run, without the command line."""
    folder, plan = open_run(job)
    for observer in observers:
        observer.on_start(folder, plan, folder.commits())
    summary = serve(folder, plan, InProcessPool(folder), list(observers))
    return folder, totals(folder, summary)
