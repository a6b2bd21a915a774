"""`nfscale decode`: data out of weights, at any resolution."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from nfscale.cli.common import RunArgument
from nfscale.errors import CallerError
from nfscale.review.pictures import encoded, to_uint8
from nfscale.store import WeightsTable, open_weights

_MAX_SAMPLES = 64 << 20


def decode(
    run: RunArgument,
    datum: Annotated[str, typer.Option("--id", help="Id or index of the datum.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png or .npy file.", show_default=False)],
    shape: Annotated[
        str | None, typer.Option(help="Height x width, such as 256x256; the fitted one if left out.", metavar="HxW")
    ] = None,
) -> None:
    """Decode one field back to a datum, at any resolution.

    Example: `nfscale decode runs/digits --id 17 --shape 256x256 -o 17.png`
    """
    if out.suffix.lower() not in (".png", ".npy"):
        raise CallerError(f"cannot write {out.name!r}: decode writes .png and .npy")
    table = open_weights(run)
    image = table.decode([_key(table, datum)], _shape(shape))[0]
    try:
        if out.suffix.lower() == ".npy":
            np.save(out, image)
        else:
            out.write_bytes(encoded(to_uint8(image), "PNG"))
    except OSError as error:
        raise CallerError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"{out}: datum {datum}, {image.shape[0]} x {image.shape[1]}, {image.shape[2]} channels")


def _key(table: WeightsTable, datum: str) -> str | int:
    """An id where one has this text, else an index."""
    return datum if datum in table or not datum.isdecimal() else int(datum)


def _shape(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CallerError(f"cannot read --shape {text!r}; write height x width, such as 256x256")
    height, width = int(parts[0]), int(parts[1])
    if height * width > _MAX_SAMPLES:
        raise CallerError(f"--shape {text} asks for {height * width:,} pixels; at most {_MAX_SAMPLES:,} are decoded")
    return height, width
