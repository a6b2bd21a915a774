"""Where the time of a whole `nfscale encode` goes: a job as users run it, into a folder that is removed afterwards.

Rows are what the workers' wall time went into between the first lease and the last commit (`share` is of all workers
together), then the seconds of the command before and after. `waiting` is what is left: workers that start, that have
nothing to do while one calibrates or the last shard is fitted, and what passes between a worker and the driver.
Everything but torch and numpy is imported by the command itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfscale.benchmark.timing import print_rows
from nfscale.errors import CallerError

HELP = "where the time of a whole encode goes, first lease to last commit, and before and after"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", default="pipelines/photos.yaml", help="a job file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the job, as for encode")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: part, seconds (of all workers together), share."""
    figures = figures_of(arguments.job, arguments.overrides)
    rows = rows_of(figures)
    print_rows(rows)
    speed = f"{figures['fields_per_second']:.2f} fields/s"
    print(f"{figures['fitted_here']:,} fields, {figures['workers']} workers, {speed}")
    return rows


def figures_of(job: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What `nfscale encode --json` says of a job that is run into a folder of its own.

    Raises:
        CallerError: if there is no such job, or it fails.
    """
    if not Path(job).is_file():
        raise CallerError(f"there is no job file {job!r}; give one, such as pipelines/photos.yaml of a clone")
    with tempfile.TemporaryDirectory(prefix="nfscale-benchmark-") as folder:
        said = Path(folder) / "figures.json"
        output = Path(folder) / "runs" / "encode"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "nfscale", "encode", job, *overrides),
                *(f"output={output}", "--json", str(said)),
            ],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode not in (0, 3):  # 3: some data failed, which costs time too
            raise CallerError(f"nfscale encode {job} ended with {done.returncode}, see above")
        return json.loads(said.read_text())


def rows_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what `nfscale encode --json` wrote."""
    whole = figures["workers"] * figures["seconds"]
    parts = dict(figures["spent"])
    parts["waiting"] = whole - sum(parts.values())
    rows: list[dict[str, Any]] = [{"part": part, "seconds": s, "share": s / whole} for part, s in parts.items()]
    for part in ("starting", "finishing"):
        rows.append({"part": part, "seconds": figures[f"{part}_seconds"], "share": None})
    return rows
