"""`nfscale gc`: remove attempts that no commit names."""

import time
from typing import Annotated

import typer
from rich.console import Console

from nfscale.cli.common import JsonOption, RunArgument, write_json
from nfscale.driver import BEAT_SECONDS
from nfscale.errors import CallerError
from nfscale.store import RunFolder

_ALIVE_SECONDS = 12 * BEAT_SECONDS


def gc(
    run: RunArgument,
    json_file: JsonOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove files that killed or late attempts left behind. Refused while a driver runs.

    Example: `nfscale gc runs/digits --dry-run`
    """
    folder = RunFolder(run)
    folder.plan()
    driver = folder.driver()
    if driver is not None and time.time() - driver["at"] < _ALIVE_SECONDS:
        raise CallerError(
            f"a driver runs on {driver['host']} (process {driver['pid']}), whose attempts look like leftovers; "
            "wait for its end, or stop it"
        )
    found = folder.uncommitted()
    figures = {"files": found, "bytes": sum(folder.files.size(name) or 0 for name in found)}
    if not dry_run:
        for name in found:
            folder.files.remove(name)
    write_json(json_file, figures | {"removed": not dry_run})
    verb = "would be removed" if dry_run else "removed"
    Console(soft_wrap=True, highlight=False).print(f"{len(found)} files, {figures['bytes'] / 1e6:.1f} MB {verb}")
