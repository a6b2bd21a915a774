"""`nfscale estimate`: what a job will cost and come to, from a few of its data."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, write_json
from nfscale.driver import refuse_foreign
from nfscale.errors import CallerError
from nfscale.job import EncodeJob, load_job
from nfscale.plan.estimate import CONFIDENCE, Estimate, Interval, reckoned
from nfscale.plan.sample import fitted_sample
from nfscale.plan.spend import Spent, refuse_unplannable, spend
from nfscale.store import RunFolder, step_plan
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
    budget: Annotated[
        str | None,
        typer.Option(help="Device time to spend where it buys most, such as 10h, 30m or 90s: writes a step plan."),
    ] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", help="Where to write it, a path or URI; OUTPUT.steps.parquet by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which data are drawn.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Say what a job will cost and come to, from a sample of its data; `nfscale status` compares it with the run.

    With --budget also which data are to have how many steps, so that as many as can be reach the target for that much
    device time: a file that `fit.step_plan` names.

    Example: `nfscale estimate pipelines/photos.yaml --seconds 30 --on-workers 8 --price 2.50`
    """
    job = load_job(job_file, overrides)
    if plan_file is not None and budget is None:
        raise CallerError("--plan says where the plan of a budget goes; give --budget too, such as --budget 10h")
    budget_seconds = None if budget is None else _seconds_in(budget)
    if budget is not None:
        refuse_unplannable(job)
    folder = RunFolder(job.output)
    refuse_foreign(folder)
    device, devices = _here()
    workers = on_workers or (devices if job.workers == "auto" else max(1, job.workers))
    processes = 1 if device == "cuda" else min(workers, devices)
    sample = fitted_sample(job, seconds=seconds, processes=processes, seed=seed, device=device)
    found = reckoned(sample, job, workers=workers, seed=seed, price=price)
    figures = found.figures()
    folder.write_estimate(figures)
    _show(job, found)
    if budget_seconds is not None:
        spent = spend(job, sample, budget_seconds, seconds=seconds, seed=seed, device=device)
        plan_file = plan_file or f"{job.output.rstrip('/')}.steps.parquet"
        figures |= {"plan": spent.figures() | {"file": plan_file}}
        step_plan.write(plan_file, spent.steps, spent.figures())
        _show_plan(spent, f"nfscale encode {job_file} fit.step_plan={plan_file}")
    write_json(json_file, figures)


_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _seconds_in(text: str) -> float:
    """A time such as 10h, 1.5h, 30m or 90s."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) *([a-z]*)", text.strip())
    seconds = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not seconds:
        raise CallerError(f"--budget {text!r} is no time; write a number above 0 with s, m, h or d, such as 10h or 30m")
    return seconds


def _here() -> tuple[str, int]:
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


def _show_plan(spent: Spent, command: str) -> None:
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    figures = spent.figures()
    lengths = ", ".join(f"{length} steps for {count:,}" for length, count in figures["data_by_steps"].items())
    console.print(f"\nplan      {lengths}; {spent.sampled} data fitted at each length")
    if not spent.knows_difficulty:
        console.print("          the data are no grids, so that nothing says which of them are hard")
    console.print(f"device    {_in_hours(spent.device_hours)} of a budget of {_in_hours(spent.budget_hours)}")
    console.print(
        f"target    {100 * spent.share_at_target:.1f} % of the data; for the same budget one length of "
        f"{spent.uniform_steps} steps for all brings {100 * spent.uniform_share_at_target:.1f} % there, for which "
        f"a plan takes {_in_hours(spent.equal_share_hours)}"
    )
    console.print(f"follow    {command}")


def _in_hours(hours: float) -> str:
    """In the unit that it deserves."""
    unit, name = next(((u, n) for u, n in ((1, "h"), (1 / 60, "min")) if hours >= 2 * u), (1 / 3600, "s"))
    return f"{hours / unit:,.1f} {name}"


def _in_quality(found: Estimate, percentile: int) -> str:
    low, value, high = (quality_text(found.quality_name, number) for number in found.quality[percentile])
    return f"{value} [{low} to {high}]"


def _in_percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f} to {100 * share.high:.1f}]"


def _in_time(seconds: Interval) -> str:
    """In the unit that the largest of them deserves."""
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds.high >= 2 * u), (1, "s"))
    return f"{seconds.value / unit:,.1f} {name} [{seconds.low / unit:,.1f} to {seconds.high / unit:,.1f}]"
