"""`nfscale compare`: is one run better than another, datum by datum?"""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, warn, write_json
from nfscale.errors import CallerError
from nfscale.review import compare_runs, comparison_page, words_of
from nfscale.store import RunFolder
from nfscale.store.schema import json_bytes, quality_text
from nfscale.track import log_files

_WORSE_SHOWN = 5


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Run folders or URIs; the others are compared with the first.", metavar="DIR1 DIR2..."),
    ],
    json_file: JsonOption = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the page here, instead of into review/ of the last run.", metavar="FILE")
    ] = None,
    track: Annotated[bool, typer.Option(help="Add the page to the MLflow runs that are compared.")] = True,
) -> None:
    """Compare runs of the same data datum by datum: who is better, by how much, how sure, at what cost.

    Example: `nfscale compare runs/digits runs/digits-adam`
    """
    if len(runs) < 2:
        raise CallerError("compare needs two run folders or more, such as `nfscale compare runs/one runs/other`")
    folders = [RunFolder(run) for run in runs]
    found = [compare_runs(folders[0], other) for other in folders[1:]]
    comparisons = [comparison for comparison, _ in found]
    console = Console(soft_wrap=True, highlight=False)
    for comparison in comparisons:
        console.print(f"{comparison.other} against {comparison.one}: {words_of(comparison)}", markup=False)
        for note in comparison.notes:
            console.print(f"note      {note}", markup=False)
        for row in comparison.worst[:_WORSE_SHOWN]:
            one, other = (quality_text(comparison.quality_name, row[side]) for side in ("one", "other"))
            console.print(f"worse     {row['datum_id']}: {one} then {other}", markup=False)
    figures = comparisons[0].to_json() | {"comparisons": [comparison.to_json() for comparison in comparisons]}
    page = comparison_page(found)
    name = f"review/compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', _name_of(folders))}"
    last = folders[-1]
    if html is not None:
        try:
            html.write_text(page)
        except OSError as error:
            raise CallerError(f"cannot write --html {html}: {error.strerror or error}") from error
    else:
        last.files.replace(f"{name}.html", page.encode())
        last.files.replace(f"{name}.json", json_bytes(figures))
        if track:
            for folder in folders:
                if problem := log_files(folder, last, [f"{name}.html", f"{name}.json"], "compare"):
                    warn(f"the MLflow run of {folder} does not have this: {problem}")
    write_json(json_file, figures)
    console.print(f"page      {html or last.files.place(f'{name}.html')}", markup=False)


def _name_of(folders: list[RunFolder]) -> str:
    """The last parts of the folders' names: `digits-with-digits-adam`."""
    return "-with-".join(str(folder).rstrip("/").rpartition("/")[2] for folder in folders)[:150]
