"""`nfscale export`: the table in the form that others read, with a card."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nfscale.cli.common import JsonOption, RunArgument, write_json


def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="hf, lance, npz, safetensors or pth.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="float32; with npz also float16 or int8, refused where they cost too much.")
    ] = "float32",
    json_file: JsonOption = None,
) -> None:
    """Write a run's table for Hugging Face, Lance, numpy, safetensors or readers of .pth files, with a card.

    float16 is refused where it costs more than 0.1 dB in the median of the data, int8 where more than 1 dB; what it
    costs each datum is written beside it. A .pth file is a pickle: it is written for others, never read.

    Example: `nfscale export runs/mnist --to hf -o mnist-fields`
    """
    from nfscale.learn.exports import export as exported
    from nfscale.learn.quantize import LIMITS_DB, measured_loss
    from nfscale.store import open_weights

    table = open_weights(run)
    figures: dict[str, Any] = {"run": run, "to": to, "dtype": dtype, "place": str(out)}
    loss = None
    if dtype in LIMITS_DB:
        loss = measured_loss(table, dtype)
        figures |= {"median_loss": loss.median, "worst_loss": loss.worst, "quality_name": loss.quality_name}
        print(f"{dtype} costs {loss.median:.3f} {loss.quality_name} in the median, {loss.worst:.3f} at worst")
        write_json(json_file, figures)
        loss.refuse()
    exported(table, to, out, dtype)
    if loss is not None:
        lines = [f"{name},{value:.4f}" for name, value in zip(loss.ids, loss.losses.tolist(), strict=True)]
        (out / "loss.csv").write_text("\n".join([f"datum_id,loss_{loss.quality_name}", *lines]) + "\n")
    write_json(json_file, figures)
    print(f"{out}: {len(table):,} rows for {to}")
