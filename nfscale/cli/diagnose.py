"""`nfscale diagnose`: activations, spectra, kernel and Hessian of one datum's field, with variants beside it."""

import csv
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nfscale.cli.common import JsonOption, warn, write_json
from nfscale.diagnose import (
    ExtremesMoment,
    HessianMoment,
    Subject,
    extremes_along_training,
    field_spectrum,
    hessian_along_training,
    kernel_along_training,
    layer_statistics,
    power_spectrum,
    rates_compared,
    spectrum_statistics,
    subject_of,
)
from nfscale.errors import CallerError
from nfscale.job import EncodeJob, load_job
from nfscale.review import figures
from nfscale.signals import Image
from nfscale.track import log_folder

app = typer.Typer(
    help="Why a field learns as it does: activations, spectra, the tangent kernel and the Hessian of one datum.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

JobArgument = Annotated[Path, typer.Argument(help="A job file (YAML).", metavar="JOB.yaml", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys of the job, as section.key=value.", metavar="[KEY=VALUE]...")
]
IdOption = Annotated[str | None, typer.Option("--id", help="Id of the datum; the first one if left out.")]
StepsOption = Annotated[str, typer.Option(help="When to look, in optimiser steps.")]
BesideOption = Annotated[
    list[str] | None,
    typer.Option("--beside", help="Another field beside it: KEY=VALUE, with commas for several keys.", metavar="KEYS"),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Where plots and figures go; default: DIR-diagnose beside the run."),
]

Subjects = dict[str, Subject]
_WIDTH = 140  # of tables, whose columns have long names


@app.command()
def init(
    job_file: JobArgument,
    overrides: Overrides = None,
    datum_id: IdOption = None,
    beside: BesideOption = None,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """How the units of each layer are distributed at the start, and how far from the arcsine law.

    Example: `nfscale diagnose init pipelines/photos.yaml --beside field.weight_scale=1 --beside field.weight_scale=3`
    """
    job, subjects = _subjects(job_file, overrides, datum_id, beside)
    rows, values = [], {}
    for name, subject in subjects.items():
        statistics, layers = layer_statistics(subject.field, subject.row, subject.samples.coordinates)
        rows += [{"field": name} | asdict(found) for found in statistics]
        values[name] = [after.flatten().numpy() for _, after in layers]
    _finish("init", job, output, rows, figures.activations(values), json_file)


@app.command()
def spectrum(
    job_file: JobArgument,
    overrides: Overrides = None,
    datum_id: IdOption = None,
    beside: BesideOption = None,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Frequencies in the field at its start, beside those of the datum where that is an image.

    Example: `nfscale diagnose spectrum pipelines/photos.yaml --beside field.weight_scale=1`
    """
    job, subjects = _subjects(job_file, overrides, datum_id, beside)
    curves = {
        name: field_spectrum(subject.field, subject.row, subject.signal.dimensions)
        for name, subject in subjects.items()
    }
    first = next(iter(subjects.values()))
    if isinstance(first.signal, Image):
        datum = torch.from_numpy(first.signal.original(first.content))
        curves = {f"datum {first.datum_id}": power_spectrum(datum), **curves}
    rows = [{"of": name} | asdict(spectrum_statistics(*curve)) for name, curve in curves.items()]
    plotted = {name: (frequencies.numpy(), power.numpy()) for name, (frequencies, power) in curves.items()}
    _finish("spectrum", job, output, rows, figures.spectra(plotted), json_file)


@app.command()
def ntk(
    job_file: JobArgument,
    overrides: Overrides = None,
    datum_id: IdOption = None,
    beside: BesideOption = None,
    steps: StepsOption = "0,50,200",
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """The empirical tangent kernel along training: spectrum, condition, alignment with the target.

    Example: `nfscale diagnose ntk pipelines/photos.yaml --steps 0,100 --beside field.weight_scale=1`
    """
    moments = _moments(steps)
    job, subjects = _subjects(job_file, overrides, datum_id, beside)
    rows, curves = [], {}
    for name, subject in subjects.items():
        for found, eigenvalues in kernel_along_training(subject, moments):
            rows.append({"field": name} | asdict(found))
            curves[f"{name}, step {found.steps}"] = eigenvalues.numpy()
    _finish("ntk", job, output, rows, figures.eigenvalues(curves), json_file)


@app.command()
def rates(
    job_file: JobArgument,
    overrides: Overrides = None,
    datum_id: IdOption = None,
    steps: Annotated[int, typer.Option(help="Of each fit.", min=1)] = 150,
    target: Annotated[float, typer.Option(help="Quality to be reached, in the unit of the signal.")] = 40.0,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """Is weight scaling a larger learning rate? Weight scaling and SIREN, each with its own speed and the other's.

    Example: `nfscale diagnose rates pipelines/photos_grey64.yaml field.weight_scale=2.5`
    """
    job = load_job(job_file, overrides or [])
    subject = subject_of(job, datum_id)
    rows, curves = [], {}
    for found, fitted in rates_compared(subject, steps, target):
        rows.append(asdict(found))
        curves[found.field] = (fitted.history_step, fitted.history_quality)
    _finish("rates", job, output, rows, figures.qualities(curves, subject.signal.quality_name), json_file)


@app.command()
def hessian(
    job_file: JobArgument,
    overrides: Overrides = None,
    datum_id: IdOption = None,
    beside: BesideOption = None,
    steps: StepsOption = "0,50,200",
    extremes: Annotated[
        bool, typer.Option("--extremes", help="Its ends and its sparsity alone, for fields of more than 3,000 weights.")
    ] = False,
    output: OutputOption = None,
    json_file: JsonOption = None,
) -> None:
    """The Hessian of a small field along training: its condition under diagonal preconditioners, the sparsity of Hv,
    the error of diagonals from few probes, and Adam's second moment beside the Gauss-Newton diagonal.

    `condition` is the largest over the smallest absolute eigenvalue, `condition_10` and `condition_50` the largest over
    their 10 % quantile and median.

    Example: `nfscale diagnose hessian pipelines/speech.yaml field.width=16 optimizer.kind=adam --steps 0,100`
    """
    moments = _moments(steps)
    job, subjects = _subjects(job_file, overrides, datum_id, beside)
    along = extremes_along_training if extremes else hessian_along_training
    rows: list[dict[str, Any]] = []
    more: dict[str, list[dict[str, Any]]] = {"layers": [], "estimates": [], "adam": []}
    found: dict[str, list[HessianMoment | ExtremesMoment]] = {}
    for name, subject in subjects.items():
        found[name] = list(along(subject, moments))
        for moment in found[name]:
            at = {"field": name, "steps": moment.steps}
            more["layers"] += [at | asdict(layer) for layer in moment.layers]
            if isinstance(moment, ExtremesMoment):
                rows += [at | {"quality": moment.quality} | asdict(one) for one in moment.extremes]
                continue
            rows += [at | {"quality": moment.quality} | asdict(one) for one in moment.conditions]
            more["estimates"] += [at | asdict(one) for one in moment.estimates]
            more["adam"] += [at | asdict(moment.second)] if moment.second else []
    _finish("hessian", job, output, rows, _hessian_plot(found), json_file, more)


def _hessian_plot(found: dict[str, list[HessianMoment | ExtremesMoment]]) -> str:
    plots = []
    for name, moments in found.items():
        whole = [moment for moment in moments if isinstance(moment, HessianMoment)]
        conditions: dict[str, list[tuple[int, float]]] = {}
        for moment in whole:
            bare, *others = moment.conditions
            for one in others:
                ratio = one.condition_10 / bare.condition_10
                conditions.setdefault(one.preconditioner, []).append((moment.steps, ratio))
        plots.append(
            figures.HessianPlot(
                name,
                conditions,
                {key: shares.numpy() for key, shares in whole[-1].spectra.items()} if whole else {},
                {f"step {moment.steps}": [layer.small_share for layer in moment.layers] for moment in moments},
                {f"step {m.steps}": (m.clouds[0].numpy(), m.clouds[1].numpy()) for m in whole if m.clouds},
            )
        )
    return figures.hessians(plots)


def _moments(text: str) -> list[int]:
    try:
        moments = [int(part) for part in text.split(",")]
    except ValueError:
        moments = [-1]
    if min(moments) < 0:
        raise CallerError(f"--steps is a list such as 0,50,200, got {text!r}")
    return moments


def _subjects(
    job_file: Path, overrides: list[str] | None, datum_id: str | None, beside: list[str] | None
) -> tuple[EncodeJob, Subjects]:
    """The job, and the field of it and of each variant on the same datum."""
    given = overrides or []
    job = load_job(job_file, given)
    subjects = {"as the job has it": subject_of(job, datum_id)}
    for variant in beside or []:
        subjects[variant] = subject_of(load_job(job_file, given + variant.split(",")), datum_id)
    return job, subjects


def _finish(
    what: str,
    job: EncodeJob,
    output: Path | None,
    rows: list[dict[str, Any]],
    svg: str,
    json_file: Path | None,
    more: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Print the rows, write them and the plot, log both to MLflow; and `more` rows by name, where there are any."""
    more = {name: others for name, others in (more or {}).items() if others}
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, _WIDTH)
    for part in (rows, *more.values()):
        console.print(_table(part))
    folder = output or Path(f"{job.output}-diagnose")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{what}.svg").write_text(svg)
        _write_csv(folder / f"{what}.csv", rows)
        for name, others in more.items():
            _write_csv(folder / f"{what}-{name}.csv", others)
    except OSError as error:
        raise CallerError(f"cannot write --output {folder}: {error.strerror or error}") from error
    write_json(json_file, {"diagnose": what, "rows": rows} | more)
    tables = [f"{what}.csv", *(f"{what}-{name}.csv" for name in more)]
    console.print(f"{folder / f'{what}.svg'}, {', '.join(tables)}", markup=False)
    if job.track.enabled:
        numbers = {
            f"{name}.{index}.{key}": value
            for name, part in {what: rows, **{f"{what}-{name}": others for name, others in more.items()}}.items()
            for index, key, value in _numbers(part)
        }
        problem = log_folder(folder, job.track.experiment, f"{job.name} {what}", {"job": job.name}, numbers)
        if problem:
            warn(f"MLflow does not have this: {problem}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    return table


def _numbers(rows: list[dict[str, Any]]) -> Iterator[tuple[int, str, float]]:
    for index, row in enumerate(rows):
        for key, value in row.items():
            if not isinstance(value, str):
                yield index, key, float(value)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
