"""`nfscale decode`: data out of weights, at any resolution."""

from pathlib import Path
from typing import Annotated

import typer

from nfscale.cli.common import RunArgument
from nfscale.errors import CallerError
from nfscale.media import MEDIA
from nfscale.store import open_weights


def decode(
    run: RunArgument,
    datum: Annotated[
        str, typer.Option("--id", help="Id or index of the datum; of one block of it: ID@2,1.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)],
    shape: Annotated[
        str | None,
        typer.Option(help="As the signal has it: 256x256 for an image; the fitted one if left out.", metavar="SHAPE"),
    ] = None,
) -> None:
    """Decode one field back to a datum, at any resolution; of data that were cut into blocks, all of them together.

    Example: `nfscale decode runs/digits --id 17 --shape 256x256 -o 17.png`
    """
    table = open_weights(run)
    medium = MEDIA[table.plan.job["signal"]["kind"]]
    if not out.name.lower().endswith(medium.written):
        raise CallerError(f"cannot write {out.name!r}: decode writes {' and '.join(medium.written)} of this run")
    key = table.key_of(datum)
    (wanted,) = table.shapes([key], shape)
    content = table.decode([key], wanted)[0]
    try:
        medium.write(content, out)
    except OSError as error:
        raise CallerError(f"cannot write {out}: {error.strerror or error}") from error
    whole = table.whole(str(key))
    blended = f", {whole.blocks} blocks blended" if whole else ""
    print(f"{out}: datum {datum}, {' x '.join(str(size) for size in wanted if isinstance(size, int))}{blended}")
