"""`nfscale verify`: re-open, decode back, re-measure, check sums."""

from dataclasses import asdict

import typer
from rich.console import Console
from rich.progress import Progress

from nfscale.cli.common import JsonOption, RunArgument, write_json
from nfscale.errors import ExitCode
from nfscale.store import RunFolder
from nfscale.verify import verify as verify_run

_MISMATCHES_SHOWN = 20


def verify(run: RunArgument, json_file: JsonOption = None) -> None:
    """Check that every row is what was committed and decodes to the quality that was recorded.

    Example: `nfscale verify runs/digits`
    """
    console = Console(soft_wrap=True, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verify", total=None)
        found = verify_run(RunFolder(run), lambda done, total: progress.update(task, completed=done, total=total))
    write_json(json_file, asdict(found) | {"ok": not found.mismatches})
    console.print(
        f"{found.files} files, {found.rows:,} rows, {found.decoded:,} decoded; quality differs by at most "
        f"{found.largest_difference:.4f} (allowed: {found.tolerance:g})"
    )
    for mismatch in found.mismatches[:_MISMATCHES_SHOWN]:
        console.print(f"mismatch  {mismatch}", markup=False)
    if len(found.mismatches) > _MISMATCHES_SHOWN:
        console.print(f"... and {len(found.mismatches) - _MISMATCHES_SHOWN:,} more; --json lists them all")
    if found.mismatches:
        raise typer.Exit(int(ExitCode.MISMATCH))
