"""The time of one step of all fields of a workload: nfscale beside what a user would write instead.

Each method has a process of its own, made with the same initial weights. They first take the same few steps and must
agree in the losses that these lead to; then they are timed in turns, several steps at a time. `loop` takes one field
after the other and `loop_per_core` is such a loop in one process per core at once, each with its share of the fields;
both are timed on some of the fields (`fields_timed`) and the rest is reckoned to take as long. Making the fields,
starting processes and compiling are not timed. Ratios are of the fastest rounds: above 1, the method is faster than
what it is compared with. `peak_mb` is what a method's processes held at most beside imports and data (of
`fields_timed` fields).
"""

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nfscale.benchmark import bounds
from nfscale.benchmark.naive import COMPARED_STEPS, Compiled, Loop, MakeMethod, Vmap, fields_of_a_loop
from nfscale.benchmark.ours import Ours, constant_adam
from nfscale.benchmark.timing import in_turns, print_rows
from nfscale.benchmark.with_jax import Jax
from nfscale.benchmark.workers import Share, Team, teams
from nfscale.benchmark.workloads import WORKLOADS, Workload, chosen_from, problem_of, workloads_named
from nfscale.engine.dispatch import PrecisionName, StepName, chosen
from nfscale.engine.step import evaluate
from nfscale.errors import CallerError, NfscaleError

HELP = "time, memory and fraction of the machine's limit of a step, beside naive loops, vmap, torch.compile and JAX"

METHODS: dict[str, MakeMethod] = {
    "loop": Loop,
    "loop_per_core": Loop,
    "vmap": Vmap,
    "compile": Compiled,
    "jax": Jax,
    "nfscale": Ours,
}
_DEFAULT = ("loop", "loop_per_core", "vmap", "jax", "nfscale")
"""Without torch.compile, which takes 10 to 30 seconds for every workload before its first step."""
_COMPARED = ("loop", "loop_per_core", "jax")
_COMPARED_FIELDS = 8
_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest difference of losses after `COMPARED_STEPS` steps, as a part of the largest fall of a loss. On a CPU methods
differ by rounding, 1e-6; on a GPU by products of 10 bits, in ours and in libraries that use TF32."""
_IDLE = 0.5  # load; with two threads on two processors of which one is taken, a loop in torch is ten times slower
_TURN_SECONDS = 1.0
_MOST_STEPS = 20  # of a turn: what is due between two checks


@dataclass(frozen=True)
class Machine:
    """Where the methods run."""

    device: str
    threads: int
    load: float | None = None
    """Average of programs that wanted a processor in the minute before."""

    @property
    def cpus(self) -> tuple[int, ...]:
        """The first processors that this process may use, one for each thread."""
        if not hasattr(os, "sched_getaffinity"):
            return ()
        return tuple(sorted(os.sched_getaffinity(0))[: self.threads])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    known = ", ".join(METHODS)
    parser.add_argument("--methods", default=None, help=f"of {known}, or all (default: {','.join(_DEFAULT)})")
    parser.add_argument("--step", default="auto", help="the step that nfscale takes, as in fit.step (default: auto)")
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    """Options of all benchmarks that take steps."""
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of a method, or its processes (default: one per processor)")
    parser.add_argument("--fields", type=int, help="of a workload, at most, to try things out (default: all)")
    parser.add_argument("--device", default=device, help="cpu or cuda (default: %(default)s)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `measured` for every workload."""
    machine = machine_of(arguments)
    workloads = workloads_named(arguments.workloads, arguments.fields)
    methods = methods_named(arguments.methods, machine.device)
    refuse_step(arguments.step, machine.device)
    made: dict[str, MakeMethod] = {**METHODS, "nfscale": partial(Ours, step=arguments.step)}
    rows = []
    for name, workload in workloads.items():
        found = measured(name, workload, {method: made[method] for method in methods}, machine, arguments.rounds)
        print_step_rows(found)
        rows += found
    print("ratios are of the fastest rounds; above 1: faster than that method")
    return rows


def machine_of(arguments: argparse.Namespace) -> Machine:
    """Where to run, with as many threads for torch in this process.

    Raises:
        CallerError: if there is no such device, or a number is out of its range.
    """
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CallerError(f"--{name} is at least 1, got {value}")
    if arguments.device not in ("cpu", "cuda"):
        raise CallerError(f"unknown device {arguments.device!r}; known devices: cpu, cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CallerError("--device cuda: torch sees no CUDA device on this machine; use --device cpu")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = arguments.threads or cpus
    if threads > cpus:
        raise CallerError(f"--threads {threads}: this process may use {cpus} processors")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > _IDLE:
        print(f"other programs are at work (load {load:.1f}): the figures are not those of a quiet machine")
    return Machine(arguments.device, threads, load)


def methods_named(names: str | None, device: str, known: tuple[str, ...] = tuple(METHODS)) -> list[str]:
    """The methods that are asked for, or by default those that can run here.

    Raises:
        CallerError: if one is not known or cannot run.
    """
    if names is not None and names != "all":
        methods = chosen_from(known, names, "method")
        if "jax" in methods and find_spec("jax") is None:
            raise CallerError("method jax: jax is not installed; pip install 'nfscale[benchmark]'")
        if "loop_per_core" in methods and device == "cuda":
            raise CallerError("method loop_per_core is of a CPU; a GPU takes one loop at a time")
        return methods
    methods = [name for name in (known if names == "all" else _DEFAULT) if name in known]
    if find_spec("jax") is None:
        print("jax is not installed and is left out; pip install 'nfscale[benchmark]'")
        methods.remove("jax")
    if device == "cuda":
        methods = [name for name in methods if name != "loop_per_core"]
        if "jax" in methods and not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            print("jax has no GPU here and is left out; pip install 'jax[cuda13]'")
            methods.remove("jax")
    return methods


def refuse_step(step: StepName, device: str, precision: PrecisionName = "auto") -> None:
    """Before anything is started.

    Raises:
        CallerError: if the engine knows no such step or precision, or cannot take it here.
    """
    try:
        problem = problem_of(Workload(1, 16, width=32, depth=2))
        adam = constant_adam(problem.learning_rate)
        chosen(step, torch.device(device), problem.field, problem.signal, adam, precision)
    except ValueError as error:
        raise CallerError(str(error)) from error


def measured(
    name: str, workload: Workload, methods: Mapping[str, MakeMethod], machine: Machine, rounds: int
) -> list[dict[str, Any]]:
    """A row for each method, in turns with the others.

    Raises:
        NfscaleError: if a method fails, or they disagree.
    """
    shares = {method: shares_of(method, make, workload, machine) for method, make in methods.items()}
    limits: dict[str, bounds.Part] = {}
    kind = ""
    if machine.device == "cpu":
        torch.set_num_threads(machine.threads)
        kind, limits = bounds.parts(machine.threads)
    with teams(shares) as running:
        require_agreement(workload, running, machine.device)
        counts = {method: _steps_of_a_turn(team) for method, team in running.items()}
        turns: dict[str, Any] = {method: partial(team.advance, counts[method]) for method, team in running.items()}
        times = in_turns(turns | {limit: part.run for limit, part in limits.items()}, rounds, warm_up=0)
        peaks = {method: team.peak_bytes() for method, team in running.items()}
        steps = {method: team.ready() for method, team in running.items()}
    bound = bounds.bound_of(kind, limits, times) if limits else None
    rows = []
    for method, parts in shares.items():
        timed = sum(part.fields for part in parts)
        scale = 1e3 * workload.fields / timed / counts[method]
        row = {
            "workload": name,
            "method": method,
            "threads": machine.threads,
            "ms_median": scale * times[method].median,
            "ms_min": scale * times[method].minimum,
        }
        row |= {f"ratio_to_{other}": None for other in _COMPARED}
        row["fraction_of_bound"] = None if bound is None else bound.ms(workload) / row["ms_min"]
        peak = peaks[method]
        row["peak_mb"] = None if peak is None else peak / 1e6
        row |= {"step": steps[method], "fields": workload.fields, "fields_timed": timed, "steps_timed": counts[method]}
        row |= {"device": machine.device, "load_before": machine.load, "bound": None if bound is None else bound.kind}
        row |= {"bound_ms": None} if bound is None else {"bound_ms": bound.ms(workload)} | bound.parts_ms(workload)
        rows.append(row)
    return with_ratios(rows)


def shares_of(method: str, make: MakeMethod, workload: Workload, machine: Machine) -> list[Share]:
    """What the processes of a method are to do."""
    package = "jax" if method == "jax" else None
    if method == "loop_per_core":
        edges = [workload.fields * i // machine.threads for i in range(machine.threads + 1)]
        parts = [(first, last - first) for first, last in pairwise(edges) if last > first]
        # Equally many of each process are timed, so that all work at once until the end.
        timed = min(fields_of_a_loop(count, workload.samples) for _, count in parts)
        return [
            Share(make, workload, first, timed, machine.device, 1, machine.cpus[index : index + 1])
            for index, (first, _) in enumerate(parts)
        ]
    fields = fields_of_a_loop(workload.fields, workload.samples) if method == "loop" else workload.fields
    return [Share(make, workload, 0, fields, machine.device, machine.threads, machine.cpus, package)]


def require_agreement(workload: Workload, running: Mapping[str, Team], device: str) -> None:
    """Have all methods take the same few steps and compare what these lead to.

    Raises:
        NfscaleError: if they disagree; figures of methods that compute different things mean nothing.
    """
    fields = min(_COMPARED_FIELDS, workload.fields)
    start = losses_of(workload, problem_of(workload, 0, fields).rows)
    losses = {}
    for method, team in running.items():
        team.advance(COMPARED_STEPS)
        losses[method] = losses_of(workload, team.rows(fields))
    refuse_disagreement(start, losses, _TOLERANCE[device])


def losses_of(workload: Workload, rows: Tensor) -> Tensor:
    """Of the first fields of a workload with these weights, over all samples: [F, P] -> [F]."""
    problem = problem_of(workload, 0, len(rows))
    twice = max(1, 2 // len(rows))  # a lone field rounds differently
    samples = problem.samples.map(lambda tensor: torch.cat([tensor] * twice))
    return evaluate(problem.field, problem.signal, torch.cat([rows] * twice), samples)[0][: len(rows)]


def refuse_disagreement(start: Tensor, losses: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare losses [F] of methods, those that they have in common, with what they fell by from `start` [F].

    Raises:
        NfscaleError: naming a method that differs from the first one.
    """
    first, *others = losses
    fall = float((start[: len(losses[first])] - losses[first]).abs().max())
    for method in others:
        common = min(len(losses[first]), len(losses[method]))
        difference = float((losses[method][:common] - losses[first][:common]).abs().max())
        if not difference <= tolerance * fall:
            raise NfscaleError(
                f"after {COMPARED_STEPS} steps the losses of {method} differ from those of {first} by "
                f"{difference:.3g}, {difference / fall:.3g} of what they fell by; up to {tolerance:g} is rounding. "
                "Nothing is reported"
            )


def _steps_of_a_turn(team: Team) -> int:
    """Steps that take about a second; they are taken once, so that what is compiled for them is."""
    once = in_turns({"a step": partial(team.advance, 1)}, rounds=1, warm_up=1)["a step"].minimum
    count = max(1, min(_MOST_STEPS, math.ceil(_TURN_SECONDS / once)))
    if count > 1:
        team.advance(count)
    return count


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one workload with `ratio_to_...` of the fastest rounds; None where there is no such method."""
    fastest = {row["method"]: row["ms_min"] for row in rows}
    ratios = [
        {f"ratio_to_{other}": fastest[other] / row["ms_min"] if other in fastest else None for other in _COMPARED}
        for row in rows
    ]
    return [row | ratio for row, ratio in zip(rows, ratios, strict=True)]


def print_step_rows(rows: list[dict[str, Any]]) -> None:
    """As a table, the bound above it."""
    first = rows[0]
    if first["bound"] is not None:
        parts = ", ".join(f"{part} {first[f'bound_{part}_ms']:.3g}" for part in ("products", "sines", "updates"))
        print(f"bound of {first['workload']} ({first['bound']}): {first['bound_ms']:.4g} ms ({parts})")
    hidden = {
        "fields",
        "device",
        "load_before",
        "bound",
        "bound_ms",
        *(key for key in first if key.startswith("bound_")),
    }
    print_rows([{key: value for key, value in row.items() if key not in hidden} for row in rows])
