"""What a learned start is worth, and what a ladder of budgets: steps to the target of the shipped jobs.

    python -m pipelines.learned_start                          # two hours of one core
    python -m pipelines.learned_start --small                  # half an hour
    python -m pipelines.learned_start --small --tasks ladder   # the ladder alone

Photograph tiles and digits of MNIST, with the fields, samples and targets of their jobs. theta0 is learned from some of
the data; others, which it has not seen, are fitted from it and from the weight-scaled draw it was learned from. Both
starts have their own best of several optimisers, rates and lengths of a cosine schedule. Learning costs optimiser steps
of its own: break-even is the number of data from which on they are saved again; and seconds of a core, in which a step
that gradients go through costs several times as much as one that is only taken.

A ladder begins with a short schedule and goes on with longer ones where the target is missed (`fit.first_steps`);
beside it, schedules of one length: the share of the data that reaches the target, and what a datum takes on average, in
steps and milliseconds of a core.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nfscale
from nfscale.datasets import seeded_sample
from nfscale.engine import LEARNERS, LearnedStart, learn_start
from nfscale.engine.learners import MAML
from nfscale.fields import theta0_of
from nfscale.job import EncodeJob, load_job
from nfscale.optim import ESGD, Adam, Scaled, Schedule
from nfscale.signals import Samples
from nfscale.track import log_folder
from pipelines.weight_scaling import median, written

JOBS = Path(__file__).parent
CALIBRATION = 32
EVERY = 5  # steps between checks, and so the grain of all steps to a target

TASKS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], dict[str, Any]]] = {
    "photos": (
        {"drawn": (200, 250, 300, 400, 600), "learned": (100, 200, 300, 400)},
        {"data": 256, "rounds": 200, "tasks": 16, "inner_steps": 50},
        {"data": 768, "rounds": 600, "tasks": 16, "inner_steps": 50, "outer_rate": 3e-4},
    ),
    "mnist": (
        {"drawn": (50, 60, 80, 120), "learned": (40, 60, 80, 120)},
        {"data": 256, "rounds": 400, "tasks": 16, "inner_steps": 20},
        {"data": 256, "rounds": 2500, "tasks": 16, "inner_steps": 15, "outer_rate": 1e-3},
    ),
}
"""By job: lengths of schedules by start, and how the start is learned, without and with gradients through the fits.
These learn for the number of steps that unseen data are to have; those are fitted with it and up to three times it."""

OUTER_RATES = {"reptile": 0.5, "fomaml": 1e-4}
BETAS = (0.3, 0.7)
"""Of Adam in few steps: what was found by gradients through 20 of them on digits, from (0.9, 0.999) on."""

FIXED, LADDERS = (300, 400, 600, 1000), ((150, 600), (300, 600), (250, 1000))
"""Lengths of one schedule; first and last budgets of ladders."""


@dataclass(frozen=True)
class Task:
    """A job's data, apart: those that are learned from, those of the calibration, and those nothing has seen."""

    name: str
    job: EncodeJob
    field: Any
    signal: Any
    known: list[tuple[str, Samples]]
    calibration: list[tuple[str, Samples]]
    unseen: list[tuple[str, Samples]]

    @property
    def target(self) -> float:
        assert self.job.fit.target is not None, "the jobs that are compared have one"
        return self.job.fit.target

    @property
    def samples(self) -> Any:
        return self.job.fit.samples


def task_of(name: str, known: int, unseen: int) -> Task:
    """The task of a job that ships."""
    job = load_job(JOBS / f"{name}.yaml")
    dataset = job.open_dataset()
    drawn = seeded_sample(dataset.ids, known + CALIBRATION + unseen, 2, "learned start")
    contents = [(dataset.ids[position], dataset.read(position).content) for position in drawn]
    signal = job.build_signal([content for _, content in contents[:8]])
    data = [(datum_id, signal.samples(content)) for datum_id, content in contents]
    field = job.build_field(signal.dimensions, signal.channels)
    first, last = known, known + CALIBRATION
    return Task(name, job, field, signal, data[:first], data[first:last], data[last:])


@dataclass(frozen=True)
class Found:
    """Of the unseen data, from one start with one optimiser and schedule."""

    method: str
    steps: float
    """Median to the target; infinite where most miss it."""
    share: float
    """That reach it."""
    mean_steps: float
    milliseconds: float
    """Of a core for a datum, on average."""
    quality: float
    """Median at the end."""


def fitted(task: Task, method: str, optimizer: Any, steps: int, theta0: Tensor) -> Found:
    """Fit the unseen data until they reach the target."""
    stop = nfscale.Stop(steps, target=task.target, check_every=EVERY)
    common = {"optimizer": optimizer, "seed": 0, "samples": task.samples}
    shared = None
    if "diagonal" in optimizer.needs:
        stop = nfscale.Stop(steps, target=task.target, check_every=2 * EVERY)
        shared = nfscale.calibrate(task.field, task.signal, task.calibration, stop=stop, theta0=theta0, **common)
    fits = list(
        nfscale.fit(
            task.field, task.signal, task.unseen, stop=stop, init=theta0, calibration=shared,
            clock=time.process_time, **common,
        )
    )  # fmt: skip
    return Found(
        method,
        median(math.inf if one.steps_to_target is None else float(one.steps_to_target) for one in fits),
        sum(one.steps_to_target is not None for one in fits) / len(fits),
        sum(one.steps for one in fits) / len(fits),
        1e3 * sum(one.wall_seconds for one in fits) / len(fits),
        median(one.quality for one in fits),
    )


def grid(
    task: Task, theta0: Tensor, lengths: Sequence[int], factors: Sequence[float], rates: Tensor | None = None
) -> Iterator[Found]:
    """Adam and ESGD at multiples of their automatic rates, over lengths of the schedule.

    Adam with usual betas and with those of few steps; with learned `rates`, it alone.
    """
    for length in lengths:
        schedule = Schedule("cosine", length)
        for factor, betas in product(factors, (BETAS,) if rates is not None else ((Adam.beta1, Adam.beta2), BETAS)):
            rate = factor * task.job.learning_rate_of_adam(task.samples)
            name = f"adam {rate:g}{' ' + str(betas) if betas == BETAS else ''}, {length}"
            adam = Adam(rate, schedule, *betas)
            yield fitted(task, name, adam if rates is None else Scaled(adam, rates), length, theta0)
        if rates is not None or length % (2 * EVERY):  # of which ESGD takes none
            continue
        esgd = ESGD(1.0, Schedule("cosine", length, warmup=min(ESGD.default_warmup, length // 4)))
        yield fitted(task, f"esgd 1, {length}", esgd, length, theta0)


def best(found: Sequence[Found]) -> Found:
    """The fewest steps of the median datum; where most data miss the target, the highest quality."""
    return min(found, key=lambda one: (one.steps, -one.quality))


def learned(task: Task, kind: str, keys: dict[str, Any]) -> tuple[LearnedStart, float]:
    """theta0 from the known data, and the seconds of a core that it took."""
    before = time.process_time()
    start = learn_start(
        task.field,
        task.signal,
        task.known[: keys["data"]],
        learner=LEARNERS[kind](**keys),
        learning_rate=task.job.learning_rate_of_adam(task.samples),
        betas=BETAS if issubclass(LEARNERS[kind], MAML) else (Adam.beta1, Adam.beta2),
        seed=task.job.seed,
        samples=task.samples,
    )
    return start, time.process_time() - before


def compared_starts(task: Task, kinds: Sequence[str], small: bool) -> Iterator[str]:
    """Rows of a table: each start at its best."""
    lengths, first_order, exact = TASKS[task.name]
    factors = (1.0,) if small else (0.5, 1.0, 2.0)
    drawn = best(list(grid(task, theta0_of(task.field, task.job.seed), lengths["drawn"], factors)))
    yield (
        "| start | median steps to the target | ratio | share | best with | field steps to learn | break-even, data | "
        "by time |"
    )
    yield "|---" * 8 + "|"
    yield f"| weight-scaled draw | {written(drawn.steps, '.0f')} | 1 | {drawn.share:.2f} | {drawn.method} | 0 | - | - |"
    for kind in kinds:
        keys, own_lengths = first_order | {"outer_rate": OUTER_RATES.get(kind, 0.0)}, lengths["learned"]
        if issubclass(LEARNERS[kind], MAML):
            keys = exact
            own_lengths = tuple(EVERY * round(keys["inner_steps"] * longer / EVERY) for longer in (1, 4 / 3, 2, 3))
        keys = keys | {"rounds": keys["rounds"] // 2} if small else keys
        start, seconds = learned(task, kind, keys)
        own = best(list(grid(task, start.theta0, own_lengths, factors, start.factors)))
        even = _even(start.field_steps, drawn.steps - own.steps)
        by_time = _even(1e3 * seconds, drawn.milliseconds - own.milliseconds)
        ratio = own.steps / drawn.steps if math.isfinite(own.steps) else math.inf
        yield (
            f"| {kind} | {written(own.steps, '.0f')} | {written(ratio, '.2f')} | {own.share:.2f} | {own.method} | "
            f"{start.field_steps:,} | {even} | {by_time} |"
        )


def _even(cost: float, saved: float) -> str:
    """The number of data from which on they save what learning has cost."""
    return written(cost / saved, ",.0f") if saved > 0 and math.isfinite(saved) else "-"


def compared_budgets(task: Task, fixed: Sequence[int], ladders: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Rows of a table: one length, and ladders."""
    theta0, rate = theta0_of(task.field, task.job.seed), task.job.learning_rate_of_adam(task.samples)
    yield "| schedule | share at the target | steps a datum | ms a datum |"
    yield "|---" * 4 + "|"
    for first, last in [*((None, length) for length in fixed), *ladders]:
        schedule = Schedule("cosine", last, first_steps=first)
        name = f"one of {last}" if first is None else f"ladder of {', '.join(map(str, schedule.budgets))}"
        found = fitted(task, name, Adam(rate, schedule), last, theta0)
        yield f"| {name} | {found.share:.2f} | {found.mean_steps:.0f} | {found.milliseconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "ladder"], default=[*TASKS, "ladder"])
    parser.add_argument("--kinds", nargs="*", choices=list(LEARNERS), default=list(LEARNERS))
    parser.add_argument("--small", action="store_true", help="fewer data and rounds, one rate of each optimiser")
    parser.add_argument("--output", type=Path, default=Path("runs/learned_start"))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in a worker
    unseen = 16 if chosen.small else 64
    lines: list[str] = []
    for name in chosen.tasks:
        known = 0 if name == "ladder" else max(keys["data"] for keys in TASKS[name][1:])
        task = task_of("photos" if name == "ladder" else name, known, unseen)
        if name == "ladder":
            rows = compared_budgets(task, FIXED, LADDERS)
        else:
            rows = compared_starts(task, chosen.kinds, chosen.small)
        lines += ["", f"{name}: {len(task.unseen)} unseen data to {task.target:g} {task.signal.quality_name}", ""]
        for line in rows:
            lines.append(line)
            print(line, flush=True)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "table.md").write_text("\n".join(lines[1:]) + "\n")
    if problem := log_folder(chosen.output, "learned_start", chosen.output.name, {"small": chosen.small}, {}):
        print(f"warning: MLflow does not have this: {problem}")


if __name__ == "__main__":
    main()
