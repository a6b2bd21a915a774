"""Preconditioners at the settings of their paper, and each at its own rates with its cost counted.

    python -m pipelines.preconditioners --small      # six minutes on two cores
    python -m pipelines.preconditioners              # the paper's sizes and all rates: a job for a GPU or a cluster

Chng, Saratchandran & Lucey, "Preconditioners for the Stochastic Training of Neural Fields" (CVPR 2025) compare Adam
with ESGD, AdaHessian and Shampoo at one constant rate each. This repeats that on photographs, lets every optimiser
anneal the best of several rates from the same start, with and without weight scaling, counts steps, gradients and
seconds to a quality, and looks at words, meshes and scenes. Written to the output folder and to MLflow: `runs.csv`
(every fit with its history), `tables.md`, `curves.png`, `costs.png`, `adam_sgd.png` and `second_moment.png`.
"""

import argparse
import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from torch import Tensor

import nfscale
from nfscale.datasets import DATASETS, Dataset, seeded_sample
from nfscale.diagnose import HessianMoment, hessian_along_training, subject_of
from nfscale.engine.dispatch import chosen
from nfscale.engine.step import stack_samples
from nfscale.errors import NfscaleError
from nfscale.fields import MLP, theta0_of
from nfscale.job import job_from_settings
from nfscale.layout import Params
from nfscale.optim import (
    ESGD,
    KFAC,
    SGD,
    SOAP,
    AdaHessian,
    Adam,
    ESGDMax,
    Extra,
    Jacobi,
    Muon,
    Schedule,
    Shampoo,
    Solver,
    Spring,
)
from nfscale.optim.base import State
from nfscale.optim.esgd import accumulate, corrected
from nfscale.signals import Audio, Image, Occupancy, Radiance, Samples
from nfscale.track import log_folder

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "sine": {"activation": "sine"},
    "gaussian": {"activation": "gaussian"},
    "gabor": {"activation": "gabor", "frequency": 10.0, "spread": 10.0},
    "sinc": {"activation": "sinc", "frequency": 8.0},
    "relu_positional": {"activation": "relu", "encoding": "positional", "encoding_count": 8},
}
"""By name, the keys of a field; the constants of the code released with the paper (sinc's are of another)."""

# --- tasks


@dataclass(frozen=True)
class Task:
    """Data of one modality, the geometry of their fields, and how many samples a step takes. Pickled, so no tensors."""

    name: str
    width: int
    depth: int
    samples: int
    levels: tuple[float, float, float]
    count: int
    """Data that are fitted."""
    others: int = 0
    """Further data, on which shared curvature is calibrated."""
    side: int = 256
    """Pixels of a side of photographs."""
    measured: int | None = None
    """Samples of a datum that quality is measured on, at random; None: all that its signal measures."""
    omega_0: float = 30.0
    gaussian: float = 0.05
    """The standard deviation s of exp(-x^2 / (2 s^2)), as the paper has it for this modality."""
    esgd_rate: float = 0.15
    """The paper's."""

    def field(self, activation: str, weight_scale: float = 1.0) -> Any:
        """At weight_scale 1 sines begin as SIREN's, the others as torch's linear layers."""
        keys = ACTIVATIONS[activation] | ({"spread": 0.5**0.5 / self.gaussian} if activation == "gaussian" else {})
        signal = opened(self).signal
        geometry = {"width": self.width, "depth": self.depth, "omega_0": self.omega_0, "weight_scale": weight_scale}
        return MLP(dimensions=signal.dimensions, channels=signal.channels, **geometry, **keys)


@dataclass(frozen=True)
class Opened:
    """What a task is about."""

    signal: Any
    data: list[tuple[str, Samples]]
    others: list[tuple[str, Samples]]


@lru_cache(maxsize=8)
def opened(task: Task) -> Opened:
    """The data of a task; those that are fitted and the others are of one kind, so that they share a batch."""
    signal, dataset, order = SOURCES[task.name](task)
    wanted, found = task.count + task.others, {}
    for position in order:
        samples = signal.samples(dataset.read(position).content)
        if task.measured is not None:
            some = torch.randperm(len(samples.values), generator=torch.Generator().manual_seed(0))[: task.measured]
            samples = replace(samples, check=Samples(samples.coordinates[some], samples.values[some]))
        alike = found.setdefault(samples.kind, [])
        alike.append((dataset.ids[position], samples))
        if len(alike) == wanted:
            return Opened(signal, alike[: task.count], alike[task.count :])
    raise NfscaleError(f"{task.name}: {wanted} data of one kind are asked for, the most are {max(map(len, found))}")


def photographs(task: Task) -> tuple[Any, Dataset, Sequence[int]]:
    """Whole photographs, RGB, centre-cropped and resized."""
    dataset = DATASETS["photos"](tile=None).open()
    return Image(channels=3, resize=[task.side, task.side]), dataset, range(len(dataset.ids))


def words(task: Task) -> tuple[Any, Dataset, Sequence[int]]:
    """Spoken words of about a second."""
    dataset = DATASETS["speech"](part="words").open()
    return Audio(channels=1), dataset, _drawn(dataset)


def meshes(task: Task) -> tuple[Any, Dataset, Sequence[int]]:
    """Closed meshes as occupancy; the paper's armadillo first."""
    dataset = DATASETS["shapes"]().open()
    first = list(dataset.ids).index("armadillo")
    return Occupancy(), dataset, [first, *(position for position in _drawn(dataset) if position != first)]


def scenes(task: Task) -> tuple[Any, Dataset, Sequence[int]]:
    """Furniture, rendered."""
    dataset = DATASETS["scenes"]().open()
    return Radiance(bound=1.0), dataset, _drawn(dataset)


def _drawn(dataset: Dataset) -> Sequence[int]:
    return seeded_sample(dataset.ids, min(64, len(dataset.ids)), 0, "preconditioners")


SOURCES: dict[str, Callable[[Task], tuple[Any, Dataset, Sequence[int]]]] = {
    "photographs": photographs,
    "words": words,
    "meshes": meshes,
    "scenes": scenes,
}

# --- methods


@dataclass(frozen=True)
class ReleasedESGD(ESGD):
    """ESGD as the code released with the paper has it, different from ours in four ways (see `nfscale.optim.esgd`).

    A probe at each of the first 50 steps, then every 100; the running mean of (Hv)^2 corrected by the count of steps,
    not of probes, so that steps grow threefold after the start; damping of 1e-4, absolute; no bound and no warm-up. The
    engine takes probes in a fixed rhythm, here at every step, of which this uses its own: its seconds are too many.
    """

    curvature: Literal["shared", "per_field"] = "per_field"
    update_every: int = 1
    beta2: float = 0.999
    damping: float = 1e-4

    def wants_curvature(self, step: Tensor) -> Tensor:
        return (step < 50) | ((step - 49) % 100 == 0)

    def damped(self, diagonal: Params) -> Params:
        return {name: tensor + self.damping for name, tensor in diagonal.items()}

    def update(self, grads: Params, state: State, params: Params, extra: Extra) -> tuple[Params, State]:
        if extra.hv is not None and extra.hv_fields is not None:
            accumulate(state["square"], extra.hv, self.beta2, extra.hv_fields)
        diagonal = corrected(state["square"], extra.step + 1, self.beta2)
        return self.scaled(self.direction(grads, state, diagonal, extra.step), None, extra), state


def at_paper(activation: str, task: Task, small: bool) -> dict[str, Any]:
    """The paper's optimisers at its constant rates, by name. Its K-FAC, Adam on preconditioned gradients, is not here.

    `esgd` is ours at the rate and the running mean of `esgd_released`: a probe every 10 steps, the mean corrected by
    the probes, and a warm-up of 50 steps where theirs takes 50 probes. ESGD-max and Jacobi, of which the
    paper names no rate, have ESGD's, and our rhythm. AdaHessian takes a probe at every step, as theirs; Shampoo its
    roots at every tenth, theirs at each.
    """
    relu, warm = activation == "relu_positional", Schedule("constant", warmup=50)
    constant, rate = Schedule("constant"), 0.1 if relu else task.esgd_rate
    hessian = {"update_every": 1, "beta2": 0.999, "epsilon": 1e-4}
    released = ReleasedESGD(rate, constant)
    few: dict[str, Any] = {"adam": Adam(1e-3 if relu else 1e-4, constant), "esgd_released": released}
    known = few | {
        "sgd": SGD(1.0, constant, momentum=0.0),
        "adahessian_e": AdaHessian(rate, constant, variant="e", **hessian),
        "adahessian_j": AdaHessian(rate, constant, variant="j", **hessian),
        "shampoo": Shampoo(0.1, constant, beta2=1.0, graft="sgd"),
    }
    ours = {
        "esgd": ESGD(rate, warm, curvature="per_field", beta2=0.999),
        "esgd_max": ESGDMax(rate, warm),
        "jacobi": Jacobi(rate, warm),
    }
    if small and activation != "sine":
        return known if relu else few
    return known | ours


@dataclass(frozen=True)
class Method:
    """How to make an optimiser of a rate, a schedule and the width of the fields, and which rates to try."""

    make: Callable[[float, Schedule, int], Any]
    rates: tuple[float, ...]
    """From the lowest on; the third and the fourth are those of `--small`."""
    by_width: bool = False
    """Rates are multiples of Adam's rule for the width, which is one for sines; of four times that for ReLU, for which
    the paper's rate is ten times the others'."""
    warmup: int = 0
    samples: int | Literal["full"] | None = None
    """Per step, where the task's number does not suit it."""
    share: float = 1.0
    """Of the steps of the others that it gets, since its steps are dearer."""

    def tried(self, width: int, activation: str, small: bool) -> list[float]:
        """The rates for fields of a width; one of 0 where there is none."""
        rates = self.rates[2:4] if small and len(self.rates) > 1 else self.rates
        higher = 4.0 if activation == "relu_positional" else 1.0
        return [rate * (higher * _adams(width) if self.by_width else 1.0) for rate in rates]


def _adams(width: int) -> float:
    return Adam.auto_learning_rate(width, 1.5, 512)


_HALVES = (0.25, 0.5, 1.0, 2.0, 4.0)
METHODS: dict[str, Method] = {
    "adam": Method(lambda rate, schedule, width: Adam(rate, schedule), _HALVES, by_width=True),
    "sgd": Method(lambda rate, schedule, width: SGD(rate, schedule), (1e-3, 3e-3, 1e-2, 1e-1, 1.0)),
    "esgd": Method(
        lambda rate, schedule, width: ESGD(rate, schedule, curvature="per_field", beta2=0.99),
        (0.025, 0.05, 0.1, 0.3, 0.6),
        warmup=ESGD.default_warmup,
    ),
    "esgd_shared": Method(
        lambda rate, schedule, width: ESGD(rate, schedule), (0.125, 0.25, 0.5, 1.0, 2.0), warmup=ESGD.default_warmup
    ),
    "esgd_max": Method(
        lambda rate, schedule, width: ESGDMax(rate, schedule), (0.1, 0.2, 0.35, 0.7, 1.4), warmup=ESGDMax.default_warmup
    ),
    "jacobi": Method(
        lambda rate, schedule, width: Jacobi(rate, schedule), (0.025, 0.05, 0.1, 0.2, 0.4), warmup=Jacobi.default_warmup
    ),
    "adahessian_e": Method(
        lambda rate, schedule, width: AdaHessian(rate, schedule, variant="e"),
        (0.05, 0.1, 0.15, 0.3, 0.6),
        warmup=AdaHessian.default_warmup,
    ),
    "adahessian_j": Method(
        lambda rate, schedule, width: AdaHessian(rate, schedule, variant="j"),
        (0.0125, 0.025, 0.05, 0.1, 0.2),
        warmup=AdaHessian.default_warmup,
    ),
    "shampoo": Method(lambda rate, schedule, width: Shampoo(rate, schedule), _HALVES, by_width=True),
    "soap": Method(lambda rate, schedule, width: SOAP(rate, schedule), (0.125, 0.25, 0.5, 1.0, 2.0), by_width=True),
    "muon": Method(
        lambda rate, schedule, width: Muon(rate, schedule, adam_learning_rate=_adams(width)),
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "spring": Method(
        lambda rate, schedule, width: Spring(rate, schedule),
        (0.025, 0.05, 0.1, 0.2, 0.4),
        warmup=Spring.default_warmup,
        samples=128,
        share=0.5,
    ),
    "kfac": Method(lambda rate, schedule, width: KFAC(), (0.0,), samples="full", share=0.1),
}
"""Every optimiser with its own rates."""
MAIN = ("sine", "relu_positional")
"""Activations that `--small` fits with more methods than Adam and ESGD."""
CURVATURE = ("esgd", "esgd_shared", "esgd_max", "jacobi", "adahessian_e", "adahessian_j")

# --- fits


@dataclass(frozen=True)
class Fits:
    """The data of a task, fitted in one batch with one method at one rate."""

    table: Literal["paper", "own"]
    task: Task
    activation: str
    weight_scale: float
    method: str
    optimizer: Any
    """Or a solver."""
    steps: int
    check_every: int
    samples: int | Literal["full"]

    @property
    def sampling(self) -> Literal["stratified", "uniform"]:
        """The paper's minibatches are random ones."""
        return "uniform" if self.table == "paper" else "stratified"


@dataclass
class Fit:
    """One field: a row of runs.csv."""

    table: str
    task: str
    activation: str
    weight_scale: float
    method: str
    rate: float
    schedule: str
    datum: str
    steps: int
    final: float
    """Quality after the last step; of a fit that was lost, the worst number there is."""
    best: float
    diverged: bool
    gradients_per_step: float
    """What a step costs, in gradients of the task's samples per step; see `gradients_per_step`."""
    seconds_per_step: float
    """Of one field in its batch, without checks."""
    calibration_steps: int
    """Field steps that shared curvature took once, for all fields of a dataset; not in the costs."""
    history: list[tuple[int, float]]
    """(step, quality) at the checks."""

    def to(self, level: float, unit: str = "steps") -> float:
        """Steps, gradients or seconds to a quality; infinite where it was not reached."""
        steps = next((step for step, quality in self.history if quality >= level), math.inf)
        return steps * {"steps": 1.0, "gradients": self.gradients_per_step, "seconds": self.seconds_per_step}[unit]


def fitted(wanted: Fits) -> list[Fit]:
    """Fit and measure; runs in a process of its own."""
    task, optimizer = opened(wanted.task), wanted.optimizer
    field = wanted.task.field(wanted.activation, wanted.weight_scale)
    stop = nfscale.Stop(wanted.steps, check_every=wanted.check_every, max_restarts=0)
    common: dict[str, Any] = {"optimizer": optimizer, "stop": stop, "seed": 0, "samples": wanted.samples}
    common["sampling"] = wanted.sampling
    calibration = nfscale.calibrate(field, task.signal, task.others, **common) if _shared(optimizer) else None
    taken: list[tuple[float, int]] = []
    got = list(
        nfscale.fit(
            field,
            task.signal,
            task.data,
            calibration=calibration,
            batch=len(task.data),
            clock=_seconds,
            observe=lambda check: taken.append((check.step_seconds, check.steps)),
            **common,
        )
    )
    seconds = sum(took for took, _ in taken) / sum(steps for _, steps in taken)
    gradients = gradients_per_step(wanted, field, task, seconds)
    schedule: Schedule | None = getattr(optimizer, "schedule", None)
    return [
        Fit(
            wanted.table,
            wanted.task.name,
            wanted.activation,
            wanted.weight_scale,
            wanted.method,
            getattr(optimizer, "learning_rate", 0.0),
            schedule.kind if schedule else "",
            one.id,
            one.steps,
            one.history_quality[-1] if one.result.ok else -math.inf,
            one.quality,
            not one.result.ok,
            gradients,
            seconds,
            len(task.others) * wanted.steps if calibration is not None else 0,
            list(zip(one.history_step, one.history_quality, strict=True)),
        )
        for one in sorted(got, key=lambda one: one.id)
    ]


def _shared(optimizer: Any) -> bool:
    return "diagonal" in optimizer.needs


def gradients_per_step(wanted: Fits, field: Any, task: Opened, seconds: float) -> float:
    """What a step costs, in gradients of the task's samples per step.

    A product Hv with its gradient counts as many gradients as it takes here, at the steps that ask for one. What works
    on matrices counts by the seconds of its whole step. Medians of rounds in turns.
    """
    optimizer = wanted.optimizer
    is_diagonal = not isinstance(optimizer, Solver) and optimizer.elementwise
    if is_diagonal and "hv" not in optimizer.needs:
        return 1.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = chosen("auto", device, field, task.signal, optimizer)
    data = (task.data * 2)[: max(2, len(task.data))]
    some = stack_samples([part.map(lambda t: t[: wanted.task.samples]) for _, part in data], device)
    rows = theta0_of(field, 0).to(device).repeat(len(data), 1)
    part = Samples(some.coordinates, some.values, jitter=torch.full_like(some.values[..., 0], 0.5))
    probe, single = torch.ones_like(rows), list[float]()
    product = list[float]()
    for _ in range(7):
        single.append(_timed(lambda: step.gradient(field, task.signal, rows, part), device))
        if is_diagonal:
            product.append(_timed(lambda: step.gradient_and_hvp(field, task.signal, rows, part, probe), device))
    gradient = statistics.median(single)
    if not is_diagonal:
        return seconds * len(task.data) / gradient
    asked = float(wanted.optimizer.wants_curvature(torch.arange(wanted.steps)).double().mean())
    return 1 + asked * (statistics.median(product) / gradient - 1)


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    started = _seconds()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _seconds() - started


def _seconds() -> float:
    """Of this process on a CPU, so that other work beside it does not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


# --- what is run


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    small: bool
    paper: Task
    paper_steps: dict[str, tuple[int, int]]
    """By activation: steps, and steps between checks, a multiple of 10."""
    own: Task
    own_steps: tuple[int, int]
    others: tuple[Task, ...]
    other_steps: tuple[int, int]
    other_methods: tuple[str, ...]
    other_activations: dict[str, tuple[str, ...]]
    moments: tuple[int, ...]
    """Steps at which Adam's second moment is looked at."""
    note: str
    """What was reduced."""

    @property
    def activations(self) -> tuple[str, ...]:
        return tuple(self.paper_steps)


DECIBELS, IOU, SOUND, VIEWS = (30.0, 35.0, 40.0), (0.9, 0.95, 0.98), (10.0, 20.0, 30.0), (20.0, 22.0, 24.0)

SMALL = Plan(
    small=True,
    paper=Task("photographs", 128, 4, 512, DECIBELS, count=2, side=128, measured=4096),
    paper_steps={name: (1280 if name in MAIN else 640, 80) for name in ACTIVATIONS},
    own=Task("photographs", 128, 4, 512, DECIBELS, count=2, others=5, side=64),
    own_steps=(240, 20),
    others=(
        Task("words", 128, 3, 512, SOUND, count=3, omega_0=1500.0),
        Task("meshes", 64, 4, 1024, IOU, count=2, omega_0=20.0, gaussian=0.09),
        Task("scenes", 64, 3, 128, VIEWS, count=2, gaussian=0.1, esgd_rate=1.0),
    ),
    other_steps=(160, 40),
    other_methods=("adam", "sgd", "esgd", "adahessian_e", "shampoo"),
    other_activations={"words": ("sine",), "meshes": ("sine",), "scenes": ("gaussian",)},
    moments=(1, 50, 400, 2000),
    note=(
        "--small: 2 photographs of 128 x 128 with width 128 (as many values per weight as 256 x 256 with width 256), "
        "1,280 steps (40 epochs; the paper has 25,600 steps in 200), quality on 4,096 of their pixels; with Gaussian, "
        "wavelet and sinc half the steps, Adam and ESGD alone. At their own rates the same photographs at 64 x 64, "
        "width 128, 240 steps, two rates each. Words with width 128, meshes and scenes with width 64, 160 steps of 512 "
        "samples, 1,024 points, 128 rays (the paper: 8 layers of 256 and 2,048 rays for scenes, 50,000 points for "
        "meshes)."
    ),
)
FULL = Plan(
    small=False,
    paper=Task("photographs", 256, 4, 512, DECIBELS, count=10),
    paper_steps=dict.fromkeys(ACTIVATIONS, (25_600, 640)),
    own=Task("photographs", 256, 4, 512, DECIBELS, count=6, others=4),
    own_steps=(5_120, 160),
    others=(
        Task("words", 128, 3, 512, SOUND, count=16, others=16, omega_0=1500.0),
        Task("meshes", 256, 4, 16_384, IOU, count=8, others=8, gaussian=0.09),
        Task("scenes", 256, 8, 2_048, VIEWS, count=4, others=4, gaussian=0.1, esgd_rate=1.0),
    ),
    other_steps=(5_000, 500),
    other_methods=tuple(name for name in METHODS if name not in ("spring", "kfac")),
    other_activations=dict.fromkeys(("words", "meshes", "scenes"), tuple(ACTIVATIONS)),
    moments=(1, 50, 400, 2_000),
    note="The paper's sizes but for scenes (5,000 steps where it has 200,000) and meshes (16,384 points a step).",
)


def paper_fits(plan: Plan) -> Iterator[Fits]:
    """Constant rates on photographs."""
    for activation, (steps, every) in plan.paper_steps.items():
        for name, optimizer in at_paper(activation, plan.paper, plan.small).items():
            yield Fits("paper", plan.paper, activation, 1.0, name, optimizer, steps, every, plan.paper.samples)


def own_fits(plan: Plan) -> Iterator[Fits]:
    """Every method at several rates with cosine decay, from the same start."""
    for activation in plan.activations:
        of_interest = not plan.small or activation in MAIN
        methods = METHODS if of_interest else {name: METHODS[name] for name in ("adam", "esgd")}
        is_scaled = activation != "relu_positional" and of_interest
        for weight_scale in (1.0, 1.5) if is_scaled else (1.0,):
            for name, method in methods.items():
                if name in ("kfac", "spring") and ACTIVATIONS[activation]["activation"] == "gabor":
                    continue  # two linear maps a layer
                yield from annealed(plan.own, activation, weight_scale, name, plan.own_steps, method, plan.small)


def annealed(
    task: Task, activation: str, weight_scale: float, name: str, paced: tuple[int, int], method: Method, small: bool
) -> Iterator[Fits]:
    """One method at its rates, for its share of so many steps with so many between checks."""
    steps, every = (max(round(count * method.share), 1) for count in paced)
    for rate in method.tried(task.width, activation, small):
        optimizer = method.make(rate, Schedule("cosine", steps, warmup=min(method.warmup, steps // 2)), task.width)
        yield Fits("own", task, activation, weight_scale, name, optimizer, steps, every, method.samples or task.samples)


def other_fits(plan: Plan, task: Task) -> Iterator[Fits]:
    """Another modality, at the paper's rates and at their own."""
    for activation in plan.other_activations[task.name]:
        known = at_paper(activation, task, small=False)
        for name in plan.other_methods:
            if name in known:
                yield Fits("paper", task, activation, 1.0, name, known[name], *plan.other_steps, task.samples)
            if name != "esgd_shared" or task.others:
                yield from annealed(task, activation, 1.0, name, plan.other_steps, METHODS[name], plan.small)


# --- what is said of it


def median(values: Iterable[float]) -> float:
    """The median, in which what was not reached is infinite; nan of nothing."""
    found = list(values)
    return float(np.median(found)) if found else math.nan


def written(value: float, form: str = "g") -> str:
    """A number for a table; a dash where it was not reached."""
    return format(value, form) if math.isfinite(value) else "-"


def reached(got: list[Fit], levels: Sequence[float], unit: str, form: str = ".0f") -> str:
    """Medians to each level: `120/240/-`."""
    return "/".join(written(median(fit.to(level, unit) for fit in got), form) for level in levels)


@dataclass
class Report:
    """What was found so far, and where it goes."""

    folder: Path
    rows: list[Fit]
    lines: list[str]
    pool: ProcessPoolExecutor | None = None

    def run(self, wanted: Iterable[Fits]) -> None:
        """Fit, and print a line for each batch as it is done."""
        every = list(wanted)
        for one, got in zip(every, (self.pool.map if self.pool else map)(fitted, every), strict=True):
            self.rows += got
            levels = one.task.levels
            print(
                f"{one.table:5s} {one.task.name:11s} {one.activation:15s} {one.weight_scale:<3g} {one.method:13s} "
                f"{got[0].rate:<9.3g} {got[0].schedule:8s} ends {median(fit.final for fit in got):7.4g}  best "
                f"{median(fit.best for fit in got):7.4g}  steps to levels {reached(got, levels, 'steps'):12s} "
                f"{got[0].gradients_per_step:5.2f} gradients, {1e3 * got[0].seconds_per_step:6.2f} ms",
                flush=True,
            )

    def of(self, **keys: Any) -> list[Fit]:
        """The fits whose columns have these values."""
        return [fit for fit in self.rows if all(getattr(fit, name) == value for name, value in keys.items())]

    def best(self, levels: Sequence[float], **keys: Any) -> list[Fit]:
        """Of the rates of a method, the one that reaches the most levels, soonest; of equals the one that ends best."""
        rows = self.of(**keys)
        by_rate = [[fit for fit in rows if fit.rate == rate] for rate in sorted({fit.rate for fit in rows})]
        if not by_rate:
            return []

        def order(got: list[Fit]) -> tuple[float, ...]:
            ends = -median(fit.final for fit in got)
            return (*(median(fit.to(level) for fit in got) for level in reversed(levels)), ends)

        return min(by_rate, key=order)

    def end(self, **keys: Any) -> float:
        """Median quality after the last step; nan where nothing was fitted."""
        return median(fit.final for fit in self.of(**keys))

    def say(self, *lines: str) -> None:
        """Lines of tables.md."""
        self.lines += lines

    def write(self) -> None:
        """`runs.csv` and `tables.md`."""
        with (self.folder / "runs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Fit)])
            writer.writeheader()
            for row in self.rows:
                history = ";".join(f"{step}:{quality:.6g}" for step, quality in row.history)
                writer.writerow(asdict(row) | {"history": history})
        (self.folder / "tables.md").write_text("\n".join(self.lines) + "\n")


def say_paper(report: Report, plan: Plan) -> None:
    """The table at the paper's settings."""
    task = plan.paper
    report.say("", "## At the paper's settings", "")
    report.say(
        f"{task.count} photographs of {task.side} x {task.side}, RGB, {task.samples} pixels a step, width "
        f"{task.width}, depth {task.depth}, constant rates, random minibatches. PSNR in dB, medians; a dash where the "
        "fit was lost. Gradients: what a step costs.",
        "",
        "| activation | method | rate | steps | at the end | best | gradients |",
        "|---|---|---|---|---|---|---|",
    )
    for activation in plan.activations:
        for method in dict.fromkeys(fit.method for fit in report.of(table="paper", task=task.name)):
            if got := report.of(table="paper", task=task.name, activation=activation, method=method):
                end, best = (written(median(getattr(fit, name) for fit in got), ".1f") for name in ("final", "best"))
                report.say(
                    f"| {activation} | {method} | {got[0].rate:g} | {plan.paper_steps[activation][0]} | {end} | {best} "
                    f"| {got[0].gradients_per_step:.2f} |"
                )


def own_cases(report: Report, plan: Plan) -> list[tuple[str, float]]:
    """Activations and weight scales that were fitted at their own rates."""
    rows = report.of(table="own", task=plan.own.name)
    return list(dict.fromkeys((fit.activation, fit.weight_scale) for fit in rows))


def best_by_method(report: Report, task: Task, activation: str, weight_scale: float) -> dict[str, list[Fit]]:
    """The best rate of each method at its own rates."""
    keys = {"table": "own", "task": task.name, "activation": activation, "weight_scale": weight_scale}
    found = {method: report.best(task.levels, method=method, **keys) for method in METHODS}
    return {method: got for method, got in found.items() if got}


def say_own(report: Report, plan: Plan) -> None:
    """The table of every method at its own rate."""
    task = plan.own
    report.say("", "## Each at its own rate, annealed, from the same start", "")
    report.say(
        f"{task.count} photographs of {task.side} x {task.side}, RGB, {task.samples} pixels a step (spring 128, kfac "
        f"all), width {task.width}, depth {task.depth}, {plan.own_steps[0]} steps (spring half, kfac a tenth), cosine. "
        "Of the rates tried the one that reaches 40 dB, 35, 30 soonest, else ends best. Medians to 30/35/40 dB; "
        "seconds of a field in its batch (the processor's own, on a CPU), without checks. What "
        f"esgd_shared needs once per dataset is not in it: {task.others} fits more.",
        "",
        "| activation | weight scale | method | rate | at the end | steps | gradients | seconds | a step, gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for activation, weight_scale in own_cases(report, plan):
        for method, got in best_by_method(report, task, activation, weight_scale).items():
            costs = [reached(got, task.levels, unit, form) for unit, form in UNITS.items()]
            report.say(
                f"| {activation} | {weight_scale:g} | {method} | {got[0].rate:.3g} "
                f"| {written(median(fit.final for fit in got), '.1f')} | {' | '.join(costs)} "
                f"| {got[0].gradients_per_step:.2f} |"
            )


UNITS = {"steps": ".0f", "gradients": ".0f", "seconds": ".2f"}


def say_others(report: Report, plan: Plan, tasks: Sequence[Task]) -> None:
    """The table of words, meshes and scenes."""
    report.say("", "## Words, meshes, scenes", "")
    report.say(
        f"Medians after {plan.other_steps[0]} steps: at the paper's constant rate, and at the best of their own with "
        "cosine decay. Words: SNR in dB; meshes: IoU; scenes: PSNR in dB on views that were fitted.",
        "",
        "| task | activation | method | paper's rate | at the end | own rate | at the end |",
        "|---|---|---|---|---|---|---|",
    )
    for task in tasks:
        for activation in plan.other_activations[task.name]:
            for method in plan.other_methods:
                keys = {"task": task.name, "activation": activation, "method": method}
                paper, own = report.of(table="paper", **keys), report.best(task.levels, table="own", **keys)
                cells = [
                    f"{got[0].rate:.3g} | {written(median(fit.final for fit in got), '.4g')}" if got else "- | -"
                    for got in (paper, own)
                ]
                report.say(f"| {task.name} | {activation} | {method} | {' | '.join(cells)} |")


def second_moments(settings: dict[str, Any], moments: Sequence[int]) -> list[HessianMoment]:
    """Adam's v beside diag(J^T J) along the training of one small field of a job."""
    return list(hessian_along_training(subject_of(job_from_settings(settings, [])), moments))


def word_job(plan: Plan, output: Path) -> dict[str, Any]:
    """A word, at a rate that a field can hold which is small enough for its whole Hessian."""
    return {
        "name": "second moment",
        "dataset": {"kind": "speech", "part": "words"},
        "signal": {"kind": "audio", "resample": 1000},
        "field": {"kind": "mlp", "width": 16, "depth": 3, "omega_0": 190, "weight_scale": 1.0},
        "optimizer": {"kind": "adam"},
        "fit": {"max_steps": max(200, plan.moments[-1]), "samples": 512},
        "output": str(output),
    }


def say_second_moments(report: Report, found: Sequence[HessianMoment]) -> None:
    """Adam read as a diagonal Gauss-Newton method, and what preconditioners make of the Hessian."""
    report.say("", "## Adam's v beside diag(J^T J)", "")
    report.say(
        "A word at 1 kHz, 16 units, depth 3, Adam, 512 samples a step; SNR in dB. Correlations over its weights: of "
        "the logarithms, of the ranks, of the logarithms about their mean in each layer; the slope of log v over log "
        "diag(J^T J). Then the largest absolute eigenvalue of the Hessian over their median, by preconditioner.",
        "",
        "| steps | quality | logarithms | ranks | within layers | slope | none | Jacobi | row norms | root of v |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    for moment in found:
        conditions = {one.preconditioner: one.condition_50 for one in moment.conditions}
        ratios = [conditions.get(name, math.inf) for name in ("none", "jacobi", "equilibrated", "adam")]
        numbers = list(asdict(moment.second).values()) if moment.second else [math.inf] * 4
        cells = [*(written(number, ".2f") for number in numbers), *(written(ratio, ".2g") for ratio in ratios)]
        report.say(f"| {moment.steps} | {moment.quality:.1f} | {' | '.join(cells)} |")
    clouds = [(moment.steps, moment.clouds) for moment in found if moment.clouds]
    figure, grid = pyplot.subplots(1, max(1, len(clouds)), figsize=(4 * max(1, len(clouds)), 3.6), squeeze=False)
    for axes, (steps, cloud) in zip(grid[0], clouds, strict=False):
        axes.loglog(*(tensor.numpy() for tensor in cloud), ".", markersize=2)
        axes.set(title=f"after {steps} steps", xlabel="diag(J^T J)", ylabel="Adam's v")
    figure.savefig(report.folder / "second_moment.png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def claims(report: Report, plan: Plan) -> list[tuple[str, str]]:
    """What the paper says, and what came out here."""
    said = []

    def end(activation: str, method: str) -> float:
        return report.end(table="paper", task=plan.paper.name, activation=activation, method=method)

    for activation in plan.activations:
        adam, esgd, ours = (end(activation, name) for name in ("adam", "esgd_released", "esgd"))
        claim, holds = "ESGD ends at least 2 dB above Adam", esgd >= adam + 2
        if activation == "relu_positional":
            claim, holds = "Adam ends above ESGD", adam > esgd
        here = f"{'yes' if holds else 'no'}: as released {ahead(esgd, adam)}"
        if not math.isnan(ours):
            here += f"; ours {ahead(ours, adam)}"
        said.append((f"{activation}: {claim}", here))
    ends = {name: end("sine", name) for name in ("adam", "esgd_released", "adahessian_e", "adahessian_j", "shampoo")}
    low, high = sorted((ends.pop("adam"), ends.pop("esgd_released")))
    for name, value in ends.items():
        verdict = f"{'yes' if low <= value <= high else 'no'}: {written(value, '.1f')} of {low:.1f} to {high:.1f} dB"
        said.append((f"sine: {name} lies between Adam and ESGD", verdict))
    return said + [first(report, plan, scale, unit) for scale in (1.0, 1.5) for unit in UNITS]


def ahead(quality: float, adams: float) -> str:
    """How far one median is above Adam's; not if half of the fits were lost."""
    return f"{quality - adams:+.1f} dB against Adam" if math.isfinite(quality) else "half of the fits or more are lost"


def first(report: Report, plan: Plan, weight_scale: float, unit: str) -> tuple[str, str]:
    """Who is first to each level with sines, who is next, and what Adam and the best of curvature's diagonals take."""
    methods, form = best_by_method(report, plan.own, "sine", weight_scale), UNITS[unit]
    parts = []
    for level in plan.own.levels:
        taken = {name: median(fit.to(level, unit) for fit in got) for name, got in methods.items()}
        order = [name for name in sorted(taken, key=lambda name: taken[name]) if math.isfinite(taken[name])]
        shown = list(dict.fromkeys([*order[:2], *[name for name in order if name in CURVATURE][:1], "adam"]))
        told = ", ".join(f"{name} {written(taken.get(name, math.inf), form)}" for name in shown)
        parts.append(f"{level:g} dB: {told}" if order else f"{level:g} dB: none")
    return f"first by {unit}, own rates, sine, weight_scale {weight_scale:g}", "; ".join(parts)


def say_claims(report: Report, plan: Plan) -> None:
    report.say("", "## Claims", "", "| claim | here |", "|---|---|")
    report.say(*(f"| {claim} | {here} |" for claim, here in claims(report, plan)))


# --- figures


def middle(got: Sequence[Fit]) -> tuple[list[int], list[float]]:
    """Median quality by step, until the first of the fits is lost: those that are left may be the easier data."""
    steps = sorted(set.intersection(*({step for step, _ in fit.history} for fit in got)))
    return steps, [median(q for fit in got for step, q in fit.history if step == at) for at in steps]


def draw_curves(report: Report, plan: Plan) -> None:
    """curves.png: Adam and ESGD by activation at the paper's settings, as in the paper's figure."""
    figure, grid = pyplot.subplots(
        1, len(plan.activations), figsize=(4 * len(plan.activations), 3.6), squeeze=False, layout="constrained"
    )
    for axes, activation in zip(grid[0], plan.activations, strict=True):
        for method in ("adam", "esgd_released", "esgd"):
            keys = {"table": "paper", "task": plan.paper.name, "activation": activation, "method": method}
            if got := report.of(**keys):
                axes.plot(*middle(got), label=f"{method}, {got[0].rate:g}")
        axes.set(title=activation, xlabel="steps, constant rate", ylabel="PSNR (dB)")
        axes.legend()
    figure.savefig(report.folder / "curves.png", dpi=130)
    pyplot.close(figure)


def draw_costs(report: Report, plan: Plan) -> None:
    """costs.png: with sines, every method at its own rate, by steps, by gradients and by seconds."""
    scales = [scale for activation, scale in own_cases(report, plan) if activation == "sine"]
    figure, grid = pyplot.subplots(
        len(scales), len(UNITS), figsize=(5 * len(UNITS), 4 * len(scales)), squeeze=False, layout="constrained"
    )
    for row, weight_scale in zip(grid, scales, strict=True):
        methods = best_by_method(report, plan.own, "sine", weight_scale)
        for axes, unit in zip(row, UNITS, strict=True):
            for index, (method, got) in enumerate(methods.items()):
                steps, quality = middle(got)
                factor = {"steps": 1.0, "gradients": got[0].gradients_per_step, "seconds": got[0].seconds_per_step}
                along = [step * factor[unit] for step in steps]
                axes.plot(along[1:], quality[1:], label=method, color=pyplot.get_cmap("tab20")(index))
            axes.set(title=f"sine, weight_scale {weight_scale:g}", xlabel=unit, ylabel="PSNR (dB)", xscale="log")
    grid[0][0].legend(fontsize=7)
    figure.savefig(report.folder / "costs.png", dpi=130)
    pyplot.close(figure)


def draw_adam_sgd(report: Report, plan: Plan, tasks: Sequence[Task]) -> None:
    """adam_sgd.png: Adam beside SGD at their own rates, on every task."""
    panels = [(plan.own, "sine"), *((task, plan.other_activations[task.name][0]) for task in tasks)]
    figure, grid = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axes, (task, activation) in zip(grid[0], panels, strict=True):
        methods = best_by_method(report, task, activation, 1.0)
        for method in ("adam", "sgd"):
            if got := methods.get(method):
                axes.plot(*middle(got), label=f"{method}, {got[0].rate:.3g}")
        axes.set(title=f"{task.name}, {activation}", xlabel="steps", ylabel=opened(task).signal.quality_name)
        axes.legend()
    figure.savefig(report.folder / "adam_sgd.png", dpi=130)
    pyplot.close(figure)


# --- the whole


def compared(report: Report, plan: Plan) -> list[Task]:
    """Run everything but the second moments; the other tasks whose data could be had."""
    for fits in (paper_fits(plan), own_fits(plan)):
        report.run(fits)
        report.write()  # of what takes hours, not all should be lost with the rest
    had = []
    for task in plan.others:
        try:
            opened(task)
        except (NfscaleError, ImportError) as error:
            print(f"{task.name} left out: {error}", flush=True)
            continue
        report.run(other_fits(plan, task))
        report.write()
        had.append(task)
    return had


def tell(report: Report, plan: Plan, tasks: Sequence[Task], moments: Sequence[HessianMoment]) -> None:
    """Tables and figures."""
    report.say(plan.note)
    say_claims(report, plan)
    say_paper(report, plan)
    say_own(report, plan)
    say_others(report, plan, tasks)
    say_second_moments(report, moments)
    draw_curves(report, plan)
    draw_costs(report, plan)
    draw_adam_sgd(report, plan, tasks)
    report.write()


def shortened(plan: Plan, steps: int) -> Plan:
    """The plan with so many steps for every fit: to see that it works."""
    paced = (steps, min(plan.own_steps[1], steps))
    paper = dict.fromkeys(plan.paper_steps, paced)
    return replace(
        plan, paper_steps=paper, own_steps=paced, other_steps=paced, note=f"{plan.note} A trial of {steps} steps."
    )


def _alone() -> None:
    """One thread for each process."""
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="six minutes on two cores")
    parser.add_argument("--output", type=Path, default=Path("runs/preconditioners"))
    parser.add_argument("--steps", type=int, help="of every fit, a multiple of 10: a trial")
    parser.add_argument(
        "--workers", type=int, help="processes of one thread; 0: this one. By default one per core, with a GPU 0"
    )
    chosen_arguments = parser.parse_args(arguments)
    matplotlib.use("agg")
    plan = SMALL if chosen_arguments.small else FULL
    plan = shortened(plan, chosen_arguments.steps) if chosen_arguments.steps else plan
    workers = chosen_arguments.workers
    if workers is None:
        workers = 0 if torch.cuda.is_available() else os.cpu_count() or 1
    chosen_arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    report = Report(chosen_arguments.output, [], ["# Preconditioners at the paper's settings and at their own", ""])
    print(f"torch {torch.__version__}, {workers} processes, into {report.folder}", flush=True)
    if workers:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_alone) as report.pool:
            tasks = compared(report, plan)
    else:
        tasks = compared(report, plan)
    try:
        moments = second_moments(word_job(plan, report.folder), plan.moments)
    except (NfscaleError, ImportError) as error:
        print(f"second moments left out: {error}", flush=True)
        moments = []
    tell(report, plan, tasks, moments)
    print("\n".join(report.lines))
    record(report, plan, started)


def record(report: Report, plan: Plan, started: float) -> None:
    """One MLflow run: what sines end at with each method, what Adam and ESGD take, tables and figures."""
    params: dict[str, object] = {"small": plan.small, "fits": len(report.rows), "torch": torch.__version__}
    metrics = {"minutes": (time.monotonic() - started) / 60}
    for fit in report.of(table="paper", task=plan.paper.name, activation="sine"):
        metrics[f"paper.sine.{fit.method}.psnr_db"] = report.end(
            table="paper", task=plan.paper.name, activation="sine", method=fit.method
        )
    for weight_scale in (1.0, 1.5):
        for method, got in best_by_method(report, plan.own, "sine", weight_scale).items():
            metrics[f"own.sine.{weight_scale:g}.{method}.psnr_db"] = median(fit.final for fit in got)
    if problem := log_folder(report.folder, "preconditioners", report.folder.name, params, metrics):
        print(f"warning: MLflow does not have this: {problem}")
    print(f"{metrics['minutes']:.1f} minutes; {report.folder}/tables.md, runs.csv and four figures")


if __name__ == "__main__":
    main()
