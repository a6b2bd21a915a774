"""Weight scaling beside its rivals, at the paper's protocol and with learning rates of their own.

    python -m pipelines.weight_scaling --small        # ten minutes on two cores
    python -m pipelines.weight_scaling                # ten photographs of 512 x 512 at width 512, all rates: for a GPU

Yeom, Lee & Lee, "Fast Training of Sinusoidal Neural Fields via Scaling Initialization" (ICLR 2025) compare ten kinds of
fields at one learning rate (Adam, 1e-4, constant, full batch). This repeats that comparison, gives every method its own
sweep of rates and schedules beside it, and asks what generalizes: quality on samples held back, over the weight scale
and over omega, by modality. Written to the output folder and to MLflow: `runs.csv` (every fit), `tables.md`,
`curves.png` and `heldout.png`.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot

import nfscale
from nfscale.datasets import DATASETS, seeded_sample
from nfscale.errors import NfscaleError
from nfscale.fields import MLP, MultiplicativeFilters
from nfscale.signals import Audio, Image, Occupancy, Samples, Sphere, samples_per_axis
from nfscale.track import log_folder

PAPER_RATE = 1e-4
LEVELS = (30.0, 35.0, 40.0, 50.0)
IOU_LEVELS = (0.8, 0.9, 0.95, 0.98)
AT_STEPS = 150
ALPHA = 2.5
CLOSEST = ("siren", "weight_scaling", "frequency_tuning", "winner")
"""Swept on all photographs, and at more rates, in the small comparison too."""
METHODS: dict[str, dict[str, Any]] = {
    "weight_scaling": {"initialization": "weight_scaling"},
    "siren": {"initialization": "siren"},
    "frequency_tuning": {"initialization": "frequency_tuning"},
    "winner": {"initialization": "winner"},
    "nfsl": {"initialization": "nfsl"},
    "xavier": {"initialization": "xavier"},
    "finer": {"activation": "finer", "initialization": "siren"},
    "gaussian": {"activation": "gaussian", "initialization": "torch", "spread": 20.0},
    "sinc": {"activation": "sinc", "initialization": "torch", "frequency": 8.0},
    "wire": {"activation": "complex_gabor", "initialization": "torch"},
    "relu_positional": {"activation": "relu", "encoding": "positional", "initialization": "torch"},
    "relu_fourier": {"activation": "relu", "encoding": "fourier", "initialization": "torch", "encoding_count": 128},
    "mfn": {},
}
"""By name, the keys of each method's field; constants as in the code of the paper."""


GEOMETRY = {"weight_scale": "weight_scaling", "omega_0": "siren"}
"""What is varied where samples are held back, and the method that has it."""


@dataclass(frozen=True)
class Task:
    """Data of one modality, and the geometry of their fields."""

    name: str
    signal: Any
    data: list[tuple[str, Samples]]
    width: int
    depth: int
    omega_0: float = 30.0
    levels: tuple[float, ...] = LEVELS
    samples: int | str = "full"
    alpha: float = ALPHA
    centroid: float = 0.0
    """Median of the data's spectral centroids, where the signal has them."""

    def field(self, method: str, weight_scale: float | None = None, omega_0: float | None = None) -> Any:
        """The field of a method; complex ones are narrower, so that all have about as many weights."""
        common: dict[str, Any] = {
            "dimensions": self.signal.dimensions,
            "channels": self.signal.channels,
            "depth": self.depth,
        }
        if method == "mfn":
            return MultiplicativeFilters(**common, width=self.width, input_scale=8.0 * self.width**0.5)
        keys = METHODS[method] | {"omega_0": omega_0 or self.omega_0, "weight_scale": weight_scale or self.alpha}
        keys |= {"spectral_centroid": self.centroid}
        is_complex = keys.get("activation") == "complex_gabor"
        return MLP(**common, width=round(self.width / math.sqrt(2)) if is_complex else self.width, **keys)


@dataclass
class Fit:
    """One field of one method at one rate: a row of runs.csv."""

    task: str
    method: str
    rate: float
    schedule: str
    weight_scale: float
    omega_0: float
    datum: str
    steps: int
    best: float
    at_steps: float | None
    """Quality after `AT_STEPS` steps; None where the fit ended before."""
    heldout: float | None
    seconds_per_step: float
    to_level: str
    """Steps to each level, with semicolons; empty where it was not reached."""
    diverged: bool

    def steps_to(self, level: int) -> float:
        """Steps to a level of the task, infinite if it was not reached."""
        steps = self.to_level.split(";")[level]
        return float(steps) if steps else math.inf


def fits(
    task: Task,
    method: str,
    rate: float,
    schedule: str,
    steps: int,
    target: float | None,
    check_every: int = 2,
    curves: dict[str, tuple[list[int], list[float]]] | None = None,
    **geometry: Any,
) -> Iterator[Fit]:
    """Fit the data of a task with one method; `curves` collects the first datum's history."""
    field = task.field(method, **geometry)
    adam = nfscale.Adam(rate, nfscale.Schedule(schedule, steps))
    stop = nfscale.Stop(steps, target=target, check_every=check_every, max_restarts=0)
    common = {"optimizer": adam, "stop": stop, "seed": 0, "samples": task.samples, "clock": time.perf_counter}
    for fitted in nfscale.fit(field, task.signal, task.data, **common):
        at = dict(zip(fitted.history_step, fitted.history_quality, strict=True))
        if curves is not None and fitted.id == task.data[0][0]:
            curves[method] = (list(fitted.history_step), list(fitted.history_quality))
        reached = [next((str(s) for s, quality in at.items() if quality >= level), "") for level in task.levels]
        yield Fit(
            task.name,
            method,
            rate,
            schedule,
            getattr(field, "weight_scale", 1.0),
            getattr(field, "omega_0", 0.0),
            fitted.id,
            fitted.steps,
            fitted.quality,
            at.get(AT_STEPS),
            fitted.quality_heldout,
            fitted.wall_seconds / max(fitted.steps, 1),
            ";".join(reached),
            not fitted.result.ok,
        )


def median(values: Iterable[float]) -> float:
    """The median, in which what was not reached is infinite; nan of nothing."""
    found = list(values)
    return float(np.median(found)) if found else math.nan


def written(value: float, form: str = "g") -> str:
    """A number for a table; a dash where it was not reached."""
    return format(value, form) if math.isfinite(value) else "-"


# --- tasks


def photographs(count: int, side: int, holdout: int | None = None) -> Task:
    """Whole photographs, centre-cropped, resized, grey."""
    signal = Image(channels=1, convert="grey", resize=[side, side], holdout=holdout)
    dataset = DATASETS["photos"](tile=None).open()
    contents = [(dataset.ids[n], dataset.read(n).content) for n in range(min(count, len(dataset.ids)))]
    data = [(name, signal.samples(content)) for name, content in contents]
    centroid = median(signal.spectral_centroid(content) for _, content in contents)
    return Task("photographs", signal, data, 256, 4, centroid=centroid)


def digits(count: int) -> Task:
    """A dataset of many small fields."""
    dataset, signal = DATASETS["digits"]().open(), Image(channels=1)
    taken = seeded_sample(dataset.ids, count, 0, "weight scaling")
    data = [(dataset.ids[n], signal.samples(dataset.read(n).content)) for n in taken]
    return Task("digits", signal, data, 16, 3, omega_0=8.0)


def words(count: int, holdout: int | None = None) -> Task:
    """Spoken words of one second and less, at their own rate, drawn 512 samples at a time."""
    dataset, signal = DATASETS["speech"](part="words").open(), Audio(channels=1, holdout=holdout)
    taken = seeded_sample(dataset.ids, count, 0, "weight scaling")
    data = [(dataset.ids[n], signal.samples(dataset.read(n).content)) for n in taken]
    return Task("words", signal, data, 128, 3, 1500.0, (10.0, 20.0, 30.0, 35.0), 512)


def winds(count: int, holdout: int | None = None) -> Task:
    """Months of wind on the sphere."""
    dataset = DATASETS["navy_winds"]().open()
    contents = [dataset.read(n).content for n in seeded_sample(dataset.ids, count, 0, "weight scaling")]
    keys = Sphere.settled({"channels": "auto", "holdout": holdout}, contents)
    signal = Sphere(**keys)
    data = [(str(n), signal.samples(content)) for n, content in enumerate(contents)]
    return Task("winds", signal, data, 64, 4, 15.0, samples=512)


def meshes(count: int, holdout: int | None = None) -> Task:
    """Closed meshes as occupancy, 1,024 points a step."""
    dataset, signal = DATASETS["shapes"]().open(), Occupancy(holdout=holdout)
    taken = seeded_sample(dataset.ids, count, 0, "weight scaling")
    data = [(dataset.ids[n], signal.samples(dataset.read(n).content)) for n in taken]
    return Task("meshes", signal, data, 64, 4, 20.0, IOU_LEVELS, 1024)


def other_tasks(small: bool) -> Iterator[Task]:
    """The modalities beside photographs; one whose data cannot be had is left out, which is said."""
    counts = (256, 4, 4, 4) if small else (1797, 64, 32, 38)
    for make, count in zip((digits, words, winds, meshes), counts, strict=True):
        try:
            yield make(count)
        except (NfscaleError, ImportError) as error:
            print(f"{make.__name__} left out: {error}", flush=True)


# --- the comparison


@dataclass
class Report:
    """What was found so far, and where it goes."""

    folder: Path
    rows: list[Fit]
    lines: list[str]

    def add(self, found: Iterable[Fit]) -> list[Fit]:
        """Keep fits, and print them as one line."""
        got = list(found)
        self.rows += got
        one, steps = got[0], [median(fit.steps_to(level) for fit in got) for level in range(4)]
        reached = "/".join(written(count, ".0f") for count in steps)
        print(
            f"{one.task:12s} {one.method:17s} {one.rate:<7g} {one.schedule:9s} {len(got):4d} data  steps to levels "
            f"{reached:18s} best {median(fit.best for fit in got):8.4g}  {1e3 * got[0].seconds_per_step:7.1f} ms",
            flush=True,
        )
        return got

    def say(self, *lines: str) -> None:
        """Lines of tables.md."""
        self.lines += lines

    def write(self) -> None:
        """`runs.csv` and `tables.md`."""
        with (self.folder / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Fit)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        (self.folder / "tables.md").write_text("\n".join(self.lines) + "\n")


def at_the_papers_rate(report: Report, task: Task, few: Task, small: bool) -> dict[str, list[Fit]]:
    """Every method at 1e-4, constant, full batch; the fits by method."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    found: dict[str, list[Fit]] = {}
    for method in METHODS:
        is_main = method in ("siren", "weight_scaling")
        of = task if is_main or not small else few
        steps = 200 if method == "siren" or not small else AT_STEPS
        found[method] = report.add(fits(of, method, PAPER_RATE, "constant", steps, None, curves=curves))
    report.say("## The paper's protocol: Adam 1e-4, constant, full batch", "")
    names = {name for name, _ in few.data}
    report.say(
        f"Medians: dB of {len(few.data)} photographs; steps of {len(task.data)} for siren and weight_scaling.", ""
    )
    report.say("| method | dB after 150 steps | steps to 30/35/40/50 dB | ms per step and field |", "|---|---|---|---|")
    for method, got in found.items():
        reached = "/".join(written(median(fit.steps_to(level) for fit in got), ".0f") for level in range(4))
        after = median(fit.at_steps for fit in got if fit.at_steps is not None and fit.datum in names)
        seconds = median(fit.seconds_per_step for fit in got)
        report.say(f"| {method} | {written(after, '.1f')} | {reached} | {1e3 * seconds:.1f} |")
    pyplot.figure(figsize=(7, 4.5))
    for index, (method, (steps, quality)) in enumerate(curves.items()):
        width = 2.5 if method == "weight_scaling" else 1.2
        pyplot.plot(steps, quality, label=method, linewidth=width, color=pyplot.get_cmap("tab20")(index))
    pyplot.xlabel("steps, Adam 1e-4, full batch")
    pyplot.ylabel("PSNR (dB)")
    pixels = len(task.data[0][1].values)
    pyplot.title(f"{task.data[0][0].split('/')[0]}, {pixels:,} grey pixels, width {task.width}")
    pyplot.ylim(5, 60)
    pyplot.legend(fontsize=7)
    pyplot.savefig(report.folder / "curves.png", dpi=130, bbox_inches="tight")
    pyplot.close()
    return found


def at_their_own_rates(
    report: Report, task: Task, few: Task, small: bool, at_paper: dict[str, list[Fit]]
) -> dict[str, float]:
    """Every method at the best of several rates and schedules, the paper's among them: what it takes to reach 40 dB.

    Returns steps by method.
    """
    rates = (3e-4, 1e-3) if small else (1e-4, 3e-4, 1e-3, 3e-3)
    schedules = ("cosine",) if small else ("constant", "cosine")
    report.say("", "## Each method at its own rate and schedule", "")
    report.say(
        "To 40 dB, medians; of the swept rates the one that needs fewest steps. A step costs three forward passes."
    )
    report.say(
        "",
        "| method | rate | schedule | photographs | steps | forward passes | seconds |",
        "|---|---|---|---|---|---|---|",
    )
    reached = {}
    for method in METHODS:
        of = task if method in CLOSEST or not small else few
        tried = [1e-3] if small and method not in CLOSEST else rates
        steps = (100 if method in CLOSEST else 80) if small else 300
        swept = [report.add(fits(of, method, rate, schedule, steps, 40.0)) for rate in tried for schedule in schedules]
        swept.append(at_paper[method])
        best = min(swept, key=lambda got: (median(f.steps_to(2) for f in got), -median(f.best for f in got)))
        reached[method] = median(fit.steps_to(2) for fit in best)
        seconds = median(fit.steps_to(2) * fit.seconds_per_step for fit in best)
        report.say(
            f"| {method} | {best[0].rate:g} | {best[0].schedule} | {len(best)} | {written(reached[method], '.0f')} "
            f"| {written(3 * reached[method], '.0f')} | {written(seconds, '.2f')} |"
        )
    return reached


def in_other_modalities(report: Report, small: bool) -> None:
    """SIREN, weight scaling and frequency tuning on sounds, maps, meshes and many small images."""
    report.say("", "## Other modalities: SIREN, weight scaling, frequency tuning", "")
    report.say(
        "Medians: quality after the last step, and steps to the task's levels, at the paper's rate and the best swept.",
        "",
    )
    report.say("| task | method | rate | quality | steps to levels |", "|---|---|---|---|---|")
    for task in other_tasks(small):
        scaled = replace(task, alpha=1.5)
        for method in ("siren", "weight_scaling", "frequency_tuning"):
            swept = [
                report.add(fits(scaled, method, rate, schedule, 150 if small else 1000, None, check_every=10))
                for rate, schedule in ((PAPER_RATE, "constant"), (3e-4, "cosine"), (1e-3, "cosine"), (3e-3, "cosine"))
            ]
            best = max(swept[1:], key=lambda got: median(fit.best for fit in got))
            for got in (swept[0], best):
                reached = "/".join(written(median(fit.steps_to(level) for fit in got), ".0f") for level in range(4))
                quality = median(fit.best for fit in got)
                report.say(
                    f"| {task.name} | {method} | {got[0].rate:g} {got[0].schedule} | {quality:.4g} | {reached} |"
                )


def tasks_with_held_back(small: bool) -> Iterator[tuple[Task, int, float]]:
    """Tasks of which a part of the samples is held back, the steps to fit them, and the quality to accelerate to."""
    yield replace(photographs(4 if small else 10, 64, holdout=2), width=64, samples=512), 200 if small else 600, 45.0
    for make, level in ((words, 12.0), (winds, 37.0), (meshes, 0.9)):
        try:
            yield make(3 if small else 32, holdout=4), 200 if small else 1000, level
        except (NfscaleError, ImportError) as error:
            print(f"{make.__name__} left out: {error}", flush=True)


@dataclass(frozen=True)
class HeldBack:
    """Of one weight scale or omega: medians."""

    value: float
    steps: float
    """To the level of the task."""
    quality: float
    """Of what is held back."""
    rule: str
    """The objectives for which the rule chooses it."""


def what_is_held_back(report: Report, small: bool) -> None:
    """Quality on samples held back against acceleration, over the weight scale (the rule's too) and over omega."""
    report.say("", "## Samples held back, Adam with cosine decay: every second pixel, every fourth of the others", "")
    report.say("| task | what | value | held back | fitted | steps to its level |", "|---|---|---|---|---|---|")
    tasks = list(tasks_with_held_back(small))
    figure, grid = pyplot.subplots(2, -(-len(tasks) // 2), figsize=(10, 8), squeeze=False, layout="constrained")
    for axes, (task, steps, level) in zip(grid.flat, tasks, strict=False):
        for name in GEOMETRY:
            points = list(_held_back_over(report, task, name, steps, level, small))
            there = [(points[0].steps / one.steps, one.quality, one) for one in points if math.isfinite(one.steps)]
            axes.plot([x for x, _, _ in there], [y for _, y, _ in there], "o-", label=name, alpha=0.7)
            for x, y, one in there:
                axes.annotate(f"{one.value:g}", (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
                if one.rule:
                    marker = {"interpolate": "*", "fit": "P"}.get(one.rule, "X")
                    axes.plot([x], [y], marker, markersize=13, label=f"auto: {one.rule}")
        axes.set_title(task.name)
        axes.set_xlabel(f"acceleration: steps of the first to {level:g}, over each one's")
        axes.set_ylabel(f"{task.signal.quality_name} of what is held back")
        axes.legend(fontsize=8)
    figure.savefig(report.folder / "heldout.png", dpi=110)
    pyplot.close(figure)


def _held_back_over(report: Report, task: Task, what: str, steps: int, level: float, small: bool) -> Iterator[HeldBack]:
    """Over the weight scale or omega, from that of SIREN on."""
    axis = samples_per_axis(task.signal, task.data[0][1])
    rule: dict[float, list[str]] = {}
    for objective in ("interpolate", "fit"):
        scale = MLP.auto_weight_scale(axis, task.omega_0, task.depth, objective)
        rule.setdefault(round(scale, 3), []).append(objective)
    alphas = (1.0, 1.5, 2.0, 2.5) if small else (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    every = 5 if len(task.data[0][1].measured.values) <= 1 << 13 else 10  # a check is a pass over all of them
    for alpha in sorted({*alphas, *rule}) if what == "weight_scale" else alphas:
        geometry = {"weight_scale": alpha} if what == "weight_scale" else {"omega_0": task.omega_0 * alpha}
        rate = nfscale.Adam.auto_learning_rate(task.width, geometry.get("weight_scale", 1.0), 512)
        of = replace(task, levels=(level,) * 4)
        got = report.add(fits(of, GEOMETRY[what], rate, "cosine", steps, None, check_every=every, **geometry))
        held = median(fit.heldout for fit in got if fit.heldout is not None)
        fast, fitted = median(fit.steps_to(0) for fit in got), median(fit.best for fit in got)
        chosen = ", ".join(rule.get(alpha, [])) if what == "weight_scale" else ""
        value = f"{geometry[what]:g}" + (f" (auto: {chosen})" if chosen else "")
        report.say(f"| {task.name} | {what} | {value} | {held:.4g} | {fitted:.4g} | {written(fast, '.0f')} |")
        yield HeldBack(geometry[what], fast, held, chosen)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="ten minutes on two cores instead of hours")
    parser.add_argument("--output", type=Path, default=Path("runs/weight_scaling"))
    chosen = parser.parse_args(arguments)
    matplotlib.use("agg")
    chosen.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report = Report(chosen.output, [], ["# Weight scaling and its rivals", ""])
    whole = photographs(6, 64) if chosen.small else replace(photographs(10, 512), width=512)
    few = replace(whole, data=whole.data[:2]) if chosen.small else whole
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, into {chosen.output}", flush=True)
    paper = at_the_papers_rate(report, whole, few, chosen.small)
    tuned = at_their_own_rates(report, whole, few, chosen.small, paper)
    in_other_modalities(report, chosen.small)
    what_is_held_back(report, chosen.small)
    steps = {method: median(fit.steps_to(2) for fit in got) for method, got in paper.items()}
    ratios = {
        "paper_rate": steps["siren"] / steps["weight_scaling"],
        "own_rates": tuned["siren"] / tuned["weight_scaling"],
    }
    report.say("", "## Steps of SIREN to 40 dB over those of weight scaling (2.5), medians", "")
    report.say(*(f"- {name.replace('_', ' ')}: {written(ratio, '.2f')}" for name, ratio in ratios.items()))
    report.write()
    print("\n".join(report.lines))
    record(report, ratios, started)


def record(report: Report, ratios: dict[str, float], started: float) -> None:
    """One MLflow run: the ratios, the medians at the paper's rate, tables and figures."""
    params = {"alpha": ALPHA, "paper_rate": PAPER_RATE, "fits": len(report.rows)}
    metrics = {f"siren_over_weight_scaling.{name}": ratio for name, ratio in ratios.items()}
    metrics["minutes"] = (time.monotonic() - started) / 60
    if problem := log_folder(report.folder, "weight_scaling", report.folder.name, params, metrics):
        print(f"warning: MLflow does not have this: {problem}")
    print(
        f"{(time.monotonic() - started) / 60:.1f} minutes; {report.folder}/tables.md, curves.png, heldout.png, runs.csv"
    )


if __name__ == "__main__":
    main()
