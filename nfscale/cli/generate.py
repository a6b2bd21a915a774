"""`nfscale generate`: train a generator on the weights, sample new fields, score them beside trivial baselines."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from nfscale.cli.common import JsonOption, RunArgument, warn, write_json
from nfscale.errors import CallerError
from nfscale.store.schema import json_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from nfscale.learn.generate import Generator
    from nfscale.learn.scores import Score
    from nfscale.learn.subject import Subject

_FOLDER = "learn/generate"
_SHEET_COLUMNS = 10
_DIRECTIONS = {
    "label agreement": "higher is better",
    "Frechet distance": "lower is better",
    "novelty, weights": "about 1 is new",
    "novelty, data": "about 1 is new",
}


def generate(
    run: RunArgument,
    kind: Annotated[str, typer.Option(help="pca: principal components and an MLP; tokens: a transformer.")] = "pca",
    samples: Annotated[int, typer.Option(help="Fields to sample, classes in turn.", min=20)] = 2000,
    components: Annotated[int, typer.Option(help="Principal components of kind pca.", min=1)] = 64,
    steps: Annotated[int, typer.Option(help="Of training at most; it stops by the loss on held-out rows.")] = 8_000,
    guidance: Annotated[float, typer.Option(help="Above 1: more like their class, less varied.", min=0)] = 1.3,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where the table of samples goes; default: RUN/samples.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of splits, training and samples.")] = 0,
    track: Annotated[bool, typer.Option(help="Log the figures to MLflow.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Train a generator on the weights of a run, sample new fields as a weights table of their own, and score them.

    The Frechet distance is in the feature space of a classifier trained on the run's original data; `novelty` is the
    distance to the nearest training field over the training set's own spacing.

    Example: `nfscale generate runs/mnist --kind pca --json samples.json`
    """
    from nfscale.learn.generate import MODEL, STATISTICS, Kind, Settings, evenly, train_generator, write_samples
    from nfscale.learn.subject import Subject
    from nfscale.store import open_weights
    from nfscale.store.run_folder import RunFolder
    from nfscale.track import log_results

    console = Console(soft_wrap=True, highlight=False)
    if kind not in get_args(Kind):
        raise CallerError(f"unknown kind {kind!r}; known: {', '.join(get_args(Kind))}")
    started = time.monotonic()
    table = open_weights(run)
    place = output or f"{run.rstrip('/')}/samples"
    if RunFolder(place).has_plan:
        raise CallerError(f"{place} holds samples already; remove it, or choose another place with --output")
    subject = Subject.of(table)
    parts = subject.split(seed)
    subject.decoded(subject.weights[:2])  # signals whose data cannot be stored as samples are refused here
    settings = Settings(kind, components, steps, guidance=guidance, seed=seed)  # type: ignore[arg-type]
    counts = ", ".join(
        f"{len(part):,} to {what}"
        for part, what in zip(parts.values(), ("train", "stop by", "score with"), strict=True)
    )
    console.print(f"{len(subject):,} fields of {table.layout.size:,} weights: {counts}")
    generator = train_generator(subject, parts, settings, lambda loss: console.print(f"  held-out loss {loss:.4f}"))
    console.print(
        f"flow      {generator.trained.parameters:,} params, best after {generator.trained.steps:,} steps"
        + ("" if generator.latents is None else f"; {100 * generator.latents.explained:.1f} % of variance in its space")
    )
    ranks = evenly(samples, len(subject.labels))
    drawn = generator.sample(ranks, seed + 1)
    folder = write_samples(subject, drawn, ranks, place, settings)
    table.folder.files.replace(MODEL, generator.to_bytes())
    generator.standardizer.save(table.folder, STATISTICS)
    figures: dict[str, Any] = {
        "run": run,
        "samples": str(folder),
        "settings": asdict(settings),
        "parameters": generator.trained.parameters,
        "parameters_per_training_field": generator.trained.parameters / len(parts["train"]),
        "steps": generator.trained.steps,
        "curve": generator.trained.curve,
        "explained_variance": None if generator.latents is None else generator.latents.explained,
    }
    files = _sheet(subject, drawn, ranks)
    found, bars = _scores(console, subject, parts, generator, drawn, ranks, seed)
    figures |= found | {"wall_seconds": time.monotonic() - started}
    files |= bars
    for name, content in (files | {"figures.json": json_bytes(figures)}).items():
        table.folder.files.replace(f"{_FOLDER}/{name}", content)
    write_json(json_file, figures)
    console.print(f"samples   {folder}  (nfscale.open_weights({str(folder)!r}))")
    console.print(f"pictures  {table.folder.files.place(_FOLDER)}")
    if track and table.plan.job["track"]["enabled"]:
        metrics = {key: float(figures[key]) for key in _SCORE_KEYS if figures.get(key) is not None}
        if problem := log_results(table.folder, "generate", files, asdict(settings), metrics):
            warn(f"MLflow does not have this: {problem}")


def _sheet(subject: "Subject", drawn: "Tensor", ranks: "Tensor") -> dict[str, bytes]:
    """The picture of samples, a row for each class; none where data are no images."""
    from nfscale.learn import pictures

    rows = _SHEET_COLUMNS * max(1, len(subject.labels)) if len(subject.labels) else _SHEET_COLUMNS**2
    order = ranks[:rows].argsort(stable=True)
    decoded = subject.decoded(drawn[order])
    if decoded.ndim != 4 or decoded.shape[3] not in (1, 3, 4):
        return {}
    return {"samples.png": pictures.sheet(decoded, _SHEET_COLUMNS)}


def _scores(
    console: Console,
    subject: "Subject",
    parts: "dict[str, Tensor]",
    generator: "Generator",
    drawn: "Tensor",
    ranks: "Tensor",
    seed: int,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Figures and the picture of the scores, which are printed; where there can be none, why."""
    from nfscale.learn import pictures
    from nfscale.learn.generate import best_baseline, scored
    from nfscale.learn.scores import MEMORISED_BELOW

    try:
        scores, scorer = scored(subject, parts, generator, drawn, ranks, seed)
    except CallerError as error:
        warn(f"no scores: {error}")
        return dict.fromkeys(_SCORE_KEYS) | {"no_scores": str(error)}, {}
    mine, best = scores[0], best_baseline(scores)
    figures = {
        "label_agreement": mine.label_agreement,
        "frechet_distance": mine.frechet_distance,
        "best_baseline_frechet_distance": None if best is None else best.frechet_distance,
        "best_baseline": None if best is None else best.name,
        "novelty_ratio": mine.novelty_ratio,
        "memorises": mine.memorises,
        "feature_space": scorer.judge.description,
        "judge_accuracy": scorer.judge_accuracy,
        "scores": [asdict(one) | {"memorises": one.memorises} for one in scores],
    }
    columns = {
        "label agreement": {one.name: one.label_agreement for one in scores},
        "Frechet distance": {one.name: one.frechet_distance for one in scores},
        "novelty, weights": {one.name: one.novelty_weights for one in scores},
        "novelty, data": {one.name: one.novelty_data for one in scores},
    }
    console.print(_table(scores))
    right = f"right on {100 * scorer.judge_accuracy:.1f} % of held-out data"
    console.print(f"Frechet distance in {scorer.judge.description}, {right}")
    if mine.memorises:
        ratio = f"{mine.novelty_ratio:.2f}, below {MEMORISED_BELOW:g}"
        warn(f"the generator memorises: its median novelty ratio is {ratio}")
    return figures, {"scores.png": pictures.bars(columns, _DIRECTIONS)}


_SCORE_KEYS = ("label_agreement", "frechet_distance", "best_baseline_frechet_distance", "novelty_ratio")


def _table(scores: "list[Score]") -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("samples of", "label agreement", "Frechet", "precision", "recall", "novelty weights", "data", "copies")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for one in scores:
        name = f"{one.name} (memorises)" if one.memorises and (one.is_baseline or one is scores[0]) else one.name
        shares = (f"{100 * share:.1f} %" for share in (one.precision, one.recall))
        ratios = (f"{ratio:.2f}" for ratio in (one.novelty_weights, one.novelty_data))
        table.add_row(
            name,
            f"{100 * one.label_agreement:.1f} %",
            f"{one.frechet_distance:.2f}",
            *shares,
            *ratios,
            f"{100 * one.copies:.1f} %",
        )
    return table
