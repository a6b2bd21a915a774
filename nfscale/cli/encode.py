"""`nfscale encode`: plan, fit, store, record, review. Run again, it resumes."""

import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, percentages, too_many_failed, warn, write_json
from nfscale.cli.progress import ProgressDisplay
from nfscale.cli.workers import device_of, leave_at_once, pool_of
from nfscale.datasets import DATASETS
from nfscale.driver import Share, Summary, open_run, serve, totals
from nfscale.engine.sampling import Sampling
from nfscale.errors import ExitCode, NfscaleError, SupersededError
from nfscale.fields import FIELDS
from nfscale.fields.activations import ACTIVATIONS
from nfscale.fields.encodings import ENCODINGS
from nfscale.fields.initializations import INITIALIZATIONS
from nfscale.job import EncodeJob, load_job
from nfscale.machine import measured
from nfscale.optim import METHODS
from nfscale.pool import Pool
from nfscale.review import make_report
from nfscale.signals import SIGNALS
from nfscale.signals.transforms import TransformName
from nfscale.store import RunFolder
from nfscale.store.ipc import write_ipc_copy
from nfscale.store.run_folder import IPC_COPY, Plan
from nfscale.store.schema import quality_text
from nfscale.termination import Termination
from nfscale.track import TOO_MANY_FAILED, Tracker, page_of, tracking_uri

_TRACKER_SECONDS = 120.0  # that MLflow may take at the end; the next start writes what is missing then


def encode(
    job_file: Annotated[Path, typer.Argument(help="A job file (YAML).", metavar="JOB.yaml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the job, as section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    json_file: JsonOption = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Fit the data that failed anew.")] = False,
    shards: Annotated[
        str | None,
        typer.Option(help="Every n-th shard from the i-th on, beside processes with the others.", metavar="I/N"),
    ] = None,
) -> None:
    """Encode a dataset as neural fields; run again to resume.

    Example: `nfscale encode pipelines/digits.yaml output=runs/digits fit.max_steps=500 workers=2`
    """
    started = time.monotonic()
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    share = None if shards is None else Share.parsed(shards)
    job = load_job(job_file, overrides)
    folder, plan = open_run(job, device_of(job))
    whole = folder.is_complete and folder.has_report and (not job.track.enabled or folder.is_tracked)
    whole = whole and (not job.store.ipc_copy or folder.files.size(IPC_COPY) is not None)
    if whole and not (retry_failed and any(commit.failed for commit in folder.commits())):
        summary = totals(folder, Summary(str(folder), job.name, was_complete=True))
        console.print(f"{folder} is complete; nothing to do")
    else:
        summary = _encode(job, folder, plan, console, retry_failed, share)
    if share is not None and not (summary.completed or summary.was_complete):
        _finish_share(console, share, summary, plan, json_file, started)
        return
    figures = _figures(folder, summary, job.track.enabled)
    figures |= _seconds(summary, started)
    write_json(json_file, figures)
    _print_summary(console, figures)
    if too_many_failed(summary.failed, summary.fields, job.max_failed_fraction):
        print(
            f"error: {summary.failed:,} of {summary.fields:,} data failed, more than max_failed_fraction="
            f"{job.max_failed_fraction:g}; `nfscale status {folder}` says why",
            file=sys.stderr,
        )
        raise typer.Exit(int(ExitCode.TOO_MANY_FAILED))


def _finish_share(
    console: Console, share: Share, summary: Summary, plan: Plan, json_file: JsonOption, started: float
) -> None:
    """Say what a share has come to; the report is for whoever completes the run."""
    figures = asdict(summary) | {"shards": str(share), "data": plan.data_count} | _seconds(summary, started)
    del figures["first_lease_at"]
    write_json(json_file, figures)
    console.print(
        f"share {share} is done, {summary.fitted_here:,} fields of it here; {summary.fields:,} of "
        f"{plan.data_count:,} data of the run are committed"
    )


def _names() -> str:
    """The words that a job may use where names are known, for the help."""
    kinds = {"dataset": DATASETS, "signal": SIGNALS, "field": FIELDS, "optimizer": [*METHODS, "auto"]}
    known = {f"{section}.kind": kinds_of for section, kinds_of in kinds.items()}
    known |= {"field.activation": ACTIVATIONS, "field.encoding": ENCODINGS, "field.initialization": INITIALIZATIONS}
    known |= {"signal.transform": get_args(TransformName), "fit.sampling": get_args(Sampling)}
    return "\n\n".join(f"{key}: {', '.join(names)}" for key, names in known.items())


encode.__doc__ = f"{encode.__doc__}\n\n{_names()}"


def _encode(
    job: EncodeJob, folder: RunFolder, plan: Plan, console: Console, retry_failed: bool, share: Share | None
) -> Summary:
    console.print(
        f"{job.name}: {plan.data_count:,} data, fields of {plan.layout.size:,} weights, "
        f"{len(plan.shards())} shards, into {folder}"
    )
    is_tracked = job.track.enabled and (share is None or folder.is_complete)  # else by who completes it
    tracker = Tracker(folder, plan, warn, _nodes(job)) if is_tracked else None
    display = ProgressDisplay(console)
    observers = [display, tracker] if tracker else [display]
    pool: Pool | None = None
    state, tag, code, is_starting = "FAILED", None, None, False
    summary = Summary(str(folder), job.name, was_complete=folder.is_complete)
    termination = Termination()
    try:
        with termination:
            commits = folder.commits()
            for observer in observers:
                observer.on_start(folder, plan, commits)
            if not folder.is_complete or retry_failed:
                is_starting = True
                pool = pool_of(job, folder)
                is_starting = False
                termination.install()
                summary = serve(folder, plan, pool, observers, retry_failed, share)
                display.close()
                pool.close()
                pool = None
                if share is not None and not summary.completed:
                    return totals(folder, summary)
                if job.track.enabled and tracker is None:
                    tracker = Tracker(folder, plan, warn)
                    tracker.on_start(folder, plan, folder.commits())
            if job.store.ipc_copy:
                write_ipc_copy(folder)
            make_report(folder)
            if tracker:
                tracker.log_review()
            totals(folder, summary)
            beyond = too_many_failed(summary.failed, summary.fields, job.max_failed_fraction)
            state, tag = ("FAILED", TOO_MANY_FAILED) if beyond else ("FINISHED", None)
            return summary
    except SupersededError:
        state = "RUNNING"  # by the other driver
        raise
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise NfscaleError(f"{what}; what is committed stays, and the same command continues") from error
    except BaseException as error:
        code = termination.exit_code_of(error)
        if code is None:
            raise
        state = "KILLED"
        print("interrupted; what is committed stays, and the same command continues", file=sys.stderr)
        raise typer.Exit(int(code)) from error
    finally:
        display.close()
        if pool is not None:
            pool.close()
        if tracker:
            tracker.close(state, _TRACKER_SECONDS, tag)
            summary.tracking = tracker.seconds
        if code is not None and is_starting:
            leave_at_once(int(code))


def _nodes(job: EncodeJob) -> Callable[[], dict[str, dict[str, float]]]:
    """What asks the nodes that work on a job what they are doing."""
    if job.workers == 0:
        return lambda: {socket.gethostname(): measured()}
    from nfscale.distributed.nodes import measured_nodes

    return measured_nodes


def _seconds(summary: Summary, started: float) -> dict[str, float]:
    """Of this command: all, before its first lease, and after its last commit."""
    now = time.monotonic()
    seconds = {"wall_seconds": now - started}
    if summary.first_lease_at is not None:
        seconds["starting_seconds"] = summary.first_lease_at - started
        seconds["finishing_seconds"] = now - summary.first_lease_at - summary.seconds
    return seconds


def _figures(folder: RunFolder, summary: Summary, tracked: bool) -> dict:
    """What the command reports, on the screen and as JSON."""
    figures = asdict(summary) | {"fields_per_second": summary.fields_per_second}
    del figures["first_lease_at"]  # by a clock of this process
    figures |= folder.review_figures()
    figures["table"] = folder.files.place("data")
    figures["tracking_uri"] = tracking_uri(folder) if tracked else None
    figures["tracking_page"] = page_of(folder) if tracked else None
    return figures


def _print_summary(console: Console, figures: dict) -> None:
    unit = figures["quality_name"]

    def text(which: str) -> str:
        return quality_text(unit, figures[f"quality_{which}"])

    console.print()
    if not figures["was_complete"]:
        speed = f"{figures['seconds']:.1f} s, {figures['fields_per_second']:.2f} fields/s"
        console.print(f"fields    {figures['fitted_here']:,} in {speed}")
        if "starting_seconds" in figures:
            console.print(f"time      {_time_text(figures)}")
    console.print(f"rows      {figures['fields']:,}: {percentages(figures['counts'])}")
    if "quality_median" in figures:
        console.print(
            f"quality   median {unit} {text('median')}, 5th percentile {text('p05')}, worst {text('min')}; "
            f"{figures['steps_mean']:.0f} steps on average"
        )
    if "quality_heldout_median" in figures:
        console.print(f"held back median {unit} {text('heldout_median')} on samples that no step saw")
    console.print(f"table     {figures['table']}  (nfscale.open_weights({figures['output']!r}))")
    console.print(f"report    {figures['report']}")
    if uri := figures["tracking_uri"]:
        console.print(f"MLflow    {figures['tracking_page'] or f'{uri}  (mlflow ui --backend-store-uri {uri})'}")


def _time_text(figures: dict) -> str:
    """Where the workers' time went, from the first lease to the last commit, and what came before and after."""
    whole = figures["workers"] * figures["seconds"]
    parts = [f"{what} {100 * seconds / whole:.0f} %" for what, seconds in figures["spent"].items() if whole]
    return (
        f"of {figures['workers']} workers: {', '.join(parts) or 'none'}; {figures['starting_seconds']:.1f} s before "
        f"the first lease, {figures['finishing_seconds']:.1f} s after the last commit"
    )
