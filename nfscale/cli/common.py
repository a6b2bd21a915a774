"""What several commands share."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nfscale.errors import CallerError

RunArgument = Annotated[
    str, typer.Argument(help="A run folder, or its URI in an object store.", metavar="DIR", show_default=False)
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.", metavar="FILE")]


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write a command's figures where `--json` wants them.

    Raises:
        CallerError: if the file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    except OSError as error:
        raise CallerError(f"cannot write --json {path}: {error.strerror or error}") from error


def warn(text: str) -> None:
    """Say something that does not stop the command."""
    print(f"warning: {text}", file=sys.stderr)


def percentages(counts: dict[str, int]) -> str:
    """`converged 1,700 (94.6 %), max_steps 97 (5.4 %)`."""
    total = sum(counts.values()) or 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count:,} ({100 * count / total:.1f} %)" for name, count in ranked)


def too_many_failed(failed: int, fields: int, max_failed_fraction: float) -> bool:
    """Whether a run has more failed data than its job allows."""
    return failed > max_failed_fraction * max(fields, 1)
