"""`nfscale estimate`: what a job will cost and come to, from a few of its data."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, write_json
from nfscale.driver import refuse_foreign
from nfscale.job import EncodeJob, load_job
from nfscale.plan.estimate import CONFIDENCE, Estimate, Interval
from nfscale.plan.estimate import estimate as estimate_job
from nfscale.store import RunFolder
from nfscale.store.schema import quality_text


def estimate(
    job_file: Annotated[Path, typer.Argument(help="A job file (YAML).", metavar="JOB.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the job, as section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long the fits of the sample may take.")] = 30.0,
    on_workers: Annotated[
        int | None,
        typer.Option("--on-workers", min=1, help="Workers like this machine's to reckon with, in place of the job's."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a device-hour, in any currency.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which data are drawn.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Say what a job will cost and come to, from a sample of its data; `nfscale status` compares it with the run.

    Example: `nfscale estimate pipelines/photos.yaml --seconds 30 --on-workers 8 --price 2.50`
    """
    job = load_job(job_file, overrides)
    folder = RunFolder(job.output)
    refuse_foreign(folder)
    device, devices = here()
    workers = on_workers or (devices if job.workers == "auto" else max(1, job.workers))
    processes = 1 if device == "cuda" else min(workers, devices)
    found = estimate_job(
        job, seconds=seconds, workers=workers, processes=processes, seed=seed, device=device, price=price
    )
    figures = found.figures()
    write_json(json_file, figures)
    folder.write_estimate(figures)
    _show(job, found)


def here() -> tuple[str, int]:
    """The device of this machine's workers, and how many it has."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show(job: EncodeJob, found: Estimate) -> None:
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    console.print(
        f"{found.name}: {found.sampled:,} of {found.data:,} data fitted; "
        f"in brackets, intervals of {CONFIDENCE:.0%} confidence"
    )
    workers = f"{found.workers} worker{'s' if found.workers > 1 else ''}"
    console.print(f"device    {_in_time(Interval(*(3600 * value for value in found.device_hours)))} of all workers")
    console.print(f"wall      {_in_time(found.wall_seconds)} on {workers}, start and report included")
    if found.money is not None:
        console.print(f"money     {found.money.value:,.2f} [{found.money.low:,.2f} to {found.money.high:,.2f}]")
    if found.quality:
        parts = {5: "5th percentile", 50: "median", 95: "95th percentile"}
        console.print(
            f"quality   {found.quality_name}: "
            + ", ".join(f"{name} {_in_quality(found, p)}" for p, name in parts.items())
        )
    if found.share_at_target is not None:
        console.print(f"target    {_in_percent(found.share_at_target)} of the data reach {job.fit.target:g}")
    if found.failed_share.value:
        console.print(f"failed    {_in_percent(found.failed_share)} of the data")
    console.print(
        f"table     {found.bytes / 1e6:,.1f} MB; a worker fits {found.batch:,} fields together "
        f"in {found.memory_bytes / 1e6:,.0f} MB of memory"
    )


def _in_quality(found: Estimate, percentile: int) -> str:
    low, value, high = (quality_text(found.quality_name, number) for number in found.quality[percentile])
    return f"{value} [{low} to {high}]"


def _in_percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f} to {100 * share.high:.1f}]"


def _in_time(seconds: Interval) -> str:
    """In the unit that the largest of them deserves."""
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds.high >= 2 * u), (1, "s"))
    return f"{seconds.value / unit:,.1f} {name} [{seconds.low / unit:,.1f} to {seconds.high / unit:,.1f}]"
