"""Which optimiser reaches a quality in the fewest device-seconds: the measurements behind `optimizer.kind: auto`.

    python -m pipelines.optimizer_rule                    # half an hour of one core
    python -m pipelines.optimizer_rule --tasks photos     # and the leads that were followed there

The photographs, words and meshes of the shipped jobs, with their fields, samples per step and initialization, on data
drawn anew. Every method has several rates and several lengths of its cosine schedule; of these the one that reaches a
level soonest counts, by the median field. Time is that of one core's work, whatever runs beside it. Solvers and one
Adam take all samples in every step. Leads (`LEADS`) are fitted through a change of coordinates, whose step is
autograd's: their steps are told, not their seconds.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nfscale
from nfscale.datasets import seeded_sample
from nfscale.engine import calibrate
from nfscale.engine.dispatch import chosen
from nfscale.engine.problem import FieldProblem
from nfscale.engine.step import stack_samples
from nfscale.fields import Field, theta0_of
from nfscale.fields.recast import Recast
from nfscale.job import load_job
from nfscale.layout import Params
from nfscale.optim import ESGD, KFAC, LBFGS, SOAP, Adam, Muon, Schedule
from nfscale.rng import Stream, as_tensor, datum_seed, rademacher
from nfscale.signals import Samples
from nfscale.track import log_folder
from pipelines.weight_scaling import median, written

CPU = torch.device("cpu")
JOBS = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """What is fitted, and to what quality."""

    name: str
    field: Any
    signal: Any
    data: list[tuple[str, Samples]]
    calibration: list[tuple[str, Samples]]
    samples: int
    rate: float
    """Of ESGD in the job."""
    budgets: tuple[int, ...]
    levels: tuple[float, ...]


TASKS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "photos": ((150, 200, 300, 400, 600, 1000), (35.0, 40.0, 45.0, 50.0)),
    "speech": ((500, 1000), (20.0, 25.0, 32.0)),
    "shapes": ((300, 600), (0.9, 0.95, 0.98)),
}
"""Lengths of schedules and levels, by job."""


def task_of(name: str, count: int) -> Task:
    """The task of a job file, on a sample of its data that the job does not draw."""
    overrides = ["dataset.tile=64"] if name == "photos" else []
    job = load_job(JOBS / f"{name}.yaml", overrides)
    dataset = job.dataset.opener(job.signal.kind).open()
    drawn = seeded_sample(dataset.ids, count + 16, 1, "optimizer rule")
    contents = [(dataset.ids[n], dataset.read(n).content) for n in drawn]
    signal = job.build_signal([content for _, content in contents[:8]])
    data = [(datum_id, signal.samples(content)) for datum_id, content in contents]
    field = job.build_field(signal.dimensions, signal.channels)
    esgd = job.build_optimizer(job.fit.samples)
    kind = data[0][1].kind  # calibrations take data of one kind
    calibration = [datum for datum in data[count:] if datum[1].kind == kind]
    return Task(name, field, signal, data[:count], calibration, job.fit.samples, esgd.learning_rate, *TASKS[name])


@dataclass(frozen=True)
class Found:
    """Of a method at one rate and budget: medians over the fields."""

    rate: float
    budget: int
    quality: float
    steps: tuple[float, ...]
    """To the levels, infinite where most fields do not reach one."""
    seconds: tuple[float, ...]


def fitted(task: Task, optimizer: Any, budget: int, samples: int | str, rate: float, **how: Any) -> Found:
    """One fit of all data."""
    every = 1 if samples == "full" and budget <= 100 else 10
    stop = nfscale.Stop(budget, check_every=every, max_restarts=0)
    field = how.pop("field", task.field)
    started = time.perf_counter()
    fits = list(
        nfscale.fit(
            field, task.signal, task.data, optimizer=optimizer, stop=stop, seed=0, samples=samples,
            clock=time.process_time, **how,
        )
    )  # fmt: skip
    print(f"  {time.perf_counter() - started:.1f} s", end="", flush=True)
    steps = tuple(median(_reached(one, level) for one in fits) for level in task.levels)
    per_step = median(one.wall_seconds / one.steps for one in fits)
    seconds = tuple(per_step * count for count in steps)
    return Found(rate, budget, median(one.quality for one in fits), steps, seconds)


def _reached(one: Any, level: float) -> float:
    history = zip(one.history_step, one.history_quality, strict=True)
    return next((float(step) for step, quality in history if quality >= level), math.inf)


def _annealed(kind: Any, factors: tuple[float, ...], task: Task) -> list[Found]:
    """At multiples of its automatic rate."""
    automatic = kind.auto_learning_rate(task.field.width, task.field.weight_scale, task.samples)
    return [
        fitted(task, kind(factor * automatic, Schedule("cosine", budget)), budget, task.samples, factor * automatic)
        for factor in factors
        for budget in task.budgets
    ]


def _of_all(kind: Any, rates: tuple[float, ...], budgets: tuple[int, ...], task: Task) -> list[Found]:
    """With all samples in every step."""
    return [
        fitted(task, kind(rate, Schedule("cosine", budget)), budget, "full", rate)
        for rate in rates
        for budget in budgets
    ]


def _shared(task: Task) -> list[Found]:
    return [_esgd(task, factor * task.rate, budget) for factor in (0.5, 1.0) for budget in task.budgets]


COMPARED: dict[str, Callable[[Task], list[Found]]] = {
    "adam": partial(_annealed, Adam, (0.5, 1.0, 2.0)),
    "esgd, shared": _shared,
    "muon": partial(_annealed, Muon, (0.5, 1.0)),
    "soap": partial(_annealed, SOAP, (0.5, 1.0)),
    "adam, all samples": partial(_of_all, Adam, (1e-3, 2e-3, 3e-3), (60, 100, 200)),
    "muon, all samples": partial(_of_all, Muon, (2e-3, 4e-3), (60, 100)),
    "lbfgs, all samples": lambda task: [fitted(task, LBFGS(), 60, "full", 0.0)],
    "kfac, all samples": lambda task: [fitted(task, KFAC(), 30, "full", 0.0)],
}
"""By name, what a method's rates and budgets found. All samples: of photographs alone."""


def _esgd(task: Task, rate: float, budget: int, field: Any = None, row: Tensor | None = None) -> Found:
    optimizer = ESGD(rate, Schedule("cosine", budget, warmup=40))
    stop = nfscale.Stop(budget, check_every=10)
    field = field or task.field
    start = theta0_of(task.field, 0) if row is None else row
    common = {"optimizer": optimizer, "seed": 0, "samples": task.samples}
    shared = calibrate(field, task.signal, task.calibration, stop=stop, theta0=start, **common)  # type: ignore[arg-type]
    return fitted(task, optimizer, budget, task.samples, rate, field=field, init=start, calibration=shared)


# --- leads


def in_kronecker_basis(task: Task) -> tuple[Field, Tensor]:
    """Coordinates in the eigenvectors of the Kronecker factors of the Gauss-Newton matrix at theta0, pooled over data.

    E[h h^T] of what goes into a layer and E[d d^T] of what comes back (Martens & Grosse, ICML 2015; George et al.,
    "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018).
    """
    row = theta0_of(task.field, 0)
    some = stack_samples([part.map(lambda t: t[::4]) for _, part in task.calibration[:8]], CPU)
    step = chosen("plain", CPU, task.field, task.signal, Adam(1e-3, Schedule()))
    known = FieldProblem(task.field, task.signal, some, step).linearization(row.expand(len(some.values), -1))
    right = [torch.einsum("fni,fnj->ij", hidden, hidden) for hidden in known.inputs]
    left = [torch.einsum("fnco,fncp->op", delta, delta) for delta in known.deltas]
    bases = [
        tuple(torch.linalg.eigh(side.double())[1].float() for side in pair) for pair in zip(left, right, strict=True)
    ]

    def turned(params: Params, back: bool) -> Params:
        result = {}
        for name, tensor in params.items():
            out, into = (side.mT if back else side for side in bases[int(name.split(".")[1])])
            result[name] = out @ tensor @ into.mT if name.endswith("weight") else tensor @ out.mT
        return result

    layout = task.field.layout
    field = Recast(task.field, partial(turned, back=False), partial(turned, back=True))
    return field, layout.ravel(field.recast(layout.unravel(row[None])))[0]


def in_equilibrated_coordinates(task: Task) -> tuple[Field, Tensor]:
    """Coordinates in which the shared equilibrated diagonal at theta0 is 1, from 4 probes of each datum."""
    row, layout = theta0_of(task.field, 0), task.field.layout
    together = stack_samples([part for _, part in task.calibration], CPU)
    seeds = as_tensor([datum_seed(0, datum_id) for datum_id, _ in task.calibration])
    step = chosen("auto", CPU, task.field, task.signal, Adam(1e-3, Schedule()))
    rows, square = row.repeat(len(seeds), 1), torch.zeros(layout.size)
    for probe in range(4):
        signs = rademacher(seeds, Stream.PROBE, probe, layout.size)
        square += step.gradient_and_hvp(task.field, task.signal, rows, together, signs)[2].square().mean(dim=0)
    diagonal = (square / 4).sqrt()
    root = (diagonal + 0.01 * diagonal.mean()).sqrt()[None]
    scale = layout.unravel(root)
    field = Recast(
        task.field,
        lambda params: {name: tensor / scale[name] for name, tensor in params.items()},
        lambda params: {name: tensor * scale[name] for name, tensor in params.items()},
    )
    return field, row * root[0]


def _lead_of_adam(task: Task, rate: float) -> list[Found]:
    field, row = in_kronecker_basis(task)
    return [
        fitted(task, Adam(r, Schedule("cosine", b)), b, task.samples, r, field=field, init=row)
        for r in (rate / 2, rate)
        for b in task.budgets[-2:]
    ]


def _lead_of_esgd(task: Task, rate: float) -> list[Found]:
    field, row = in_kronecker_basis(task)
    return [_esgd(task, r, b, field, row) for r in (rate / 2, rate) for b in task.budgets[-2:]]


def _lead_of_lbfgs(task: Task, rate: float) -> list[Found]:
    field, row = in_equilibrated_coordinates(task)
    return [fitted(task, LBFGS(), 60, "full", 0.0, field=field, init=row)]


LEADS: dict[str, Callable[[Task, float], list[Found]]] = {
    "adam in the shared Kronecker basis": _lead_of_adam,
    "esgd, shared, in the Kronecker basis": _lead_of_esgd,
    "lbfgs, all samples, from the equilibrated diagonal": _lead_of_lbfgs,
}
"""What was tried to make shared curvature pay, on photographs."""


# --- the table


def best(found: list[Found], level: int, by_seconds: bool = True) -> Found:
    """The rate and budget that reach a level soonest; where none does, the highest quality."""
    return min(found, key=lambda f: ((f.seconds if by_seconds else f.steps)[level], -f.quality))


def rows_of(task: Task, name: str, found: list[Found], in_seconds: bool = True) -> str:
    """A row of the table."""
    cells = []
    for level in range(len(task.levels)):
        one = best(found, level, in_seconds)
        seconds = f", {1e3 * one.seconds[level]:.0f} ms" if in_seconds and math.isfinite(one.seconds[level]) else ""
        cells.append(f"{written(one.steps[level], '.0f')}{seconds}")
    highest = max(found, key=lambda f: f.quality)
    return f"| {name} | {' | '.join(cells)} | {highest.quality:.4g} in {highest.budget} |"


def compared(task: Task, wanted: Sequence[str]) -> Iterator[str]:
    """Rows of a task; the leads too, where every method is wanted."""
    for name in wanted:
        if task.name == "photos" or "all samples" not in name:
            yield rows_of(task, name, COMPARED[name](task))
    if task.name == "photos" and list(wanted) == list(COMPARED):
        for name, lead in LEADS.items():
            rate = Adam.auto_learning_rate(task.field.width, task.field.weight_scale, task.samples)
            yield rows_of(task, name, lead(task, rate if "adam" in name else task.rate), in_seconds=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(COMPARED), default=list(COMPARED))
    parser.add_argument("--fields", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/optimizer_rule"))
    chosen_ = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in a worker; small products of several threads wait for each other
    lines = ["Steps and milliseconds of a field to a quality, and the highest quality at the end of a budget."]
    for name in chosen_.tasks:
        task = task_of(name, chosen_.fields)
        lines += [
            "",
            f"| {name} | {' | '.join(map(str, task.levels))} | highest |",
            "|---" * (len(task.levels) + 2) + "|",
        ]
        for line in compared(task, chosen_.methods):
            lines.append(line)
            print(f"\n{line}", flush=True)
    chosen_.output.mkdir(parents=True, exist_ok=True)
    (chosen_.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if problem := log_folder(chosen_.output, "optimizer_rule", chosen_.output.name, {"fields": chosen_.fields}, {}):
        print(f"warning: MLflow does not have this: {problem}")


if __name__ == "__main__":
    main()
