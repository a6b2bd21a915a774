"""`nfscale classify`: classifiers on weights, on what fields say at points, and on the data, on the same splits."""

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nfscale.cli.common import JsonOption, RunArgument, warn, write_json
from nfscale.errors import CallerError
from nfscale.store.schema import json_bytes

_FOLDER = "learn/classify"


def classify(
    run: RunArgument,
    reader: Annotated[
        str, typer.Option(help="What reads the weights: mlp, tokens or equivariant; commas for several.")
    ] = "mlp",
    folds: Annotated[
        int,
        typer.Option(help="Splits by id; every row is tested once. 1: the table's own test rows alone.", min=1, max=20),
    ] = 5,
    epochs: Annotated[float, typer.Option(help="Times the epochs that each reader usually takes.", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of splits and models.")] = 0,
    track: Annotated[bool, typer.Option(help="Log the figures to MLflow.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Train classifiers on the weights of a run, with a function-space probe and a classifier of the data beside them.

    `probe` asks each field for its values at learned coordinates; `pixels` is an MLP on the original data. Accuracies
    are pooled over the splits, with 95 % intervals.

    Example: `nfscale classify runs/mnist --reader mlp,tokens --json accuracy.json`
    """
    from nfscale.learn.classify import PIXELS
    from nfscale.learn.classify import classify as classified
    from nfscale.learn.pictures import confusion
    from nfscale.learn.subject import Subject
    from nfscale.store import open_weights
    from nfscale.track import log_results

    console = Console(soft_wrap=True, highlight=False)
    started = time.monotonic()
    table = open_weights(run)
    subject = Subject.of(table)
    subject.require_classes()
    readers = [name for name in reader.split(",") if name]
    console.print(f"{len(subject):,} fields of {table.layout.size:,} weights, {len(subject.labels)} classes")
    missing = None
    try:
        _ = subject.originals
    except CallerError as error:
        missing = str(error)
        warn(f"no classifier of the data beside it: {missing}")
    wanted = [*readers, "probe", *([] if missing else [PIXELS])]

    def told(name: str, fold: int, accuracy: float) -> None:
        console.print(f"  {name:<12} split {fold + 1} of {folds}: {100 * accuracy:.1f} %")

    found = {one.reader: one for one in classified(subject, wanted, folds, seed, epochs, told)}
    figures: dict[str, Any] = {"run": run, "rows": len(subject), "classes": len(subject.labels), "folds": folds}
    figures["tested"] = found[readers[0]].rows
    figures |= _accuracy("weights", found[readers[0]]) | {"weights_reader": readers[0]}
    figures |= _accuracy("probe", found["probe"]) | _accuracy("pixel", found.get(PIXELS))
    figures["pixel_missing"] = missing
    figures["readers"] = {name: _accuracy("", one) | {"parameters": one.parameters} for name, one in found.items()}
    figures["wall_seconds"] = time.monotonic() - started
    pictures = {
        f"confusion-{name}.png": confusion(one.confusion, subject.labels.names, f"{name}: {100 * one.value:.1f} %")
        for name, one in found.items()
    }
    for name, content in (pictures | {"figures.json": json_bytes(figures)}).items():
        table.folder.files.replace(f"{_FOLDER}/{name}", content)
    write_json(json_file, figures)
    console.print(_table(list(found.values())))
    console.print(f"pictures  {table.folder.files.place(_FOLDER)}")
    if track and table.plan.job["track"]["enabled"]:
        metrics = {f"{name}_accuracy": one.value for name, one in found.items()}
        params = {"folds": folds, "seed": seed, "epochs": epochs}
        problem = log_results(table.folder, "classify", pictures, params, metrics)
        if problem:
            warn(f"MLflow does not have this: {problem}")


def _accuracy(prefix: str, found: Any) -> dict[str, Any]:
    start = f"{prefix}_" if prefix else ""
    if found is None:
        return {f"{start}accuracy": None, f"{start}interval": None}
    return {f"{start}accuracy": found.value, f"{start}interval": list(found.interval)}


def _table(found: list) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("reader", "accuracy", "95 % interval", "parameters"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for one in found:
        low, high = one.interval
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        table.add_row(one.reader, f"{100 * one.value:.1f} %", interval, f"{one.parameters:,}")
    return table
