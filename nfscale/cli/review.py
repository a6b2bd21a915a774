"""`nfscale review`: the report of a run, and its MLflow run made whole; or how a single datum converged."""

import re
from typing import Annotated, Any

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, RunArgument, too_many_failed, warn, write_json
from nfscale.cli.status import state_of
from nfscale.review import curve_of, make_report
from nfscale.store import RunFolder
from nfscale.store.run_folder import REPORT
from nfscale.store.schema import quality_text
from nfscale.track import TOO_MANY_FAILED, Tracker, tracking_uri


def review(
    run: RunArgument,
    json_file: JsonOption = None,
    datum: Annotated[
        str | None, typer.Option("--id", help="Show how this datum converged, by id or index, and nothing else.")
    ] = None,
    track: Annotated[bool, typer.Option(help="Write to MLflow what it does not have yet.")] = True,
) -> None:
    """Make report.html of what is committed, and bring the MLflow run up to it. A run may be under way.

    Example: `nfscale review runs/digits`, or `nfscale review runs/digits --id 17`
    """
    folder = RunFolder(run)
    if datum is not None:
        _show(folder, datum, json_file)
        return
    figures = make_report(folder)
    plan = folder.plan()
    if track and plan.job["track"]["enabled"]:
        tracker = Tracker(folder, plan, warn, drives=False)
        tracker.on_start(folder, plan, folder.commits())
        tracker.log_review()
        tracker.close(*_standing(folder, figures, plan.job["max_failed_fraction"]))
        figures["tracking_uri"] = tracking_uri(folder)
        figures["tracking_problem"] = tracker.problem
    write_json(json_file, figures)
    Console(soft_wrap=True, highlight=False).print(f"report    {folder.files.place(REPORT)}")


def _standing(
    folder: RunFolder, figures: dict[str, Any], max_failed_fraction: float
) -> tuple[str | None, None, str | None]:
    """How the run stands, for `Tracker.close`: status, no limit of time, state."""
    state, _ = state_of(folder, folder.driver())
    if state == "complete" and too_many_failed(figures["failed"], figures["fields"], max_failed_fraction):
        return "FAILED", None, TOO_MANY_FAILED
    return {"complete": "FINISHED", "running": "RUNNING", "killed": "KILLED"}.get(state), None, None


def _show(folder: RunFolder, datum: str, json_file: JsonOption) -> None:
    """The curve of a datum in words, and as a picture in `review/`."""
    figures, picture = curve_of(folder, datum)
    name = figures["quality_name"]
    console = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False)

    where = "".join(f", {key} {figures[key]}" for key in ("split", "label") if figures[key] is not None)
    say(f"datum     {figures['datum_id']} (index {figures['index']}{where})")
    say(f"status    {figures['status']}" + (f": {figures['reason']}" if figures["reason"] else ""))
    if figures["quality"] is not None:
        rank = f"rank {figures['rank']:,} of {figures['ranked']:,}, 1 is the worst"
        say(f"quality   {name} {quality_text(name, figures['quality'])}, {rank}{_aim(figures)}")
        say(f"cost      {figures['steps']} steps, {figures['wall_seconds']:.3g} s of its worker")
    for step, quality in zip(figures["history_step"], figures["history_quality"], strict=True):
        say(f"{step:>9} {quality_text(name, quality)}")
    if picture is not None:
        file = f"review/datum-{figures['index']}-{re.sub(r'[^A-Za-z0-9._-]+', '-', figures['datum_id'])[:80]}.png"
        folder.files.replace(file, picture)
        figures["picture"] = folder.files.place(file)
        say(f"picture   {figures['picture']}")
    write_json(json_file, figures)


def _aim(figures: dict[str, Any]) -> str:
    if figures["target"] is None:
        return ""
    reached = figures["steps_to_target"]
    return f"; target {figures['target']:g} " + ("not reached" if reached is None else f"reached after {reached} steps")
