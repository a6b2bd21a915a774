"""`nfscale review`: the report of a run, and its MLflow run made whole."""

from typing import Annotated

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, RunArgument, warn, write_json
from nfscale.review import make_report
from nfscale.store import RunFolder
from nfscale.store.run_folder import REPORT
from nfscale.track import Tracker, tracking_uri


def review(
    run: RunArgument,
    json_file: JsonOption = None,
    track: Annotated[bool, typer.Option(help="Write to MLflow what it does not have yet.")] = True,
) -> None:
    """Make report.html of what is committed, and bring the MLflow run up to it.

    Example: `nfscale review runs/digits`
    """
    folder = RunFolder(run)
    figures = make_report(folder)
    plan = folder.plan()
    if track and plan.job["track"]["enabled"]:
        tracker = Tracker(folder, plan, warn)
        tracker.on_start(folder, plan, folder.commits())
        tracker.log_review()
        tracker.close("FINISHED" if folder.is_complete else "RUNNING")
        figures["tracking_uri"] = tracking_uri(folder)
        figures["tracking_problem"] = tracker.problem
    write_json(json_file, figures)
    Console(soft_wrap=True, highlight=False).print(f"report    {folder.files.place(REPORT)}")
