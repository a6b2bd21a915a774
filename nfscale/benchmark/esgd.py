"""What ESGD costs beside Adam: the time of its steps, curvature included, over that of Adam's in the same family.

Both take whole cadences of steps from the same start, in turns, so that each per-field probe is counted once in
`update_every` steps. Shared curvature comes from a calibration that is made once per job and is not timed.
`cost_over_adam` is of the fastest rounds: 0.1 is a tenth more than Adam. The family is the step that the engine
takes (`step`); where that takes ESGD's steps one by one (`at_once` false), so it does Adam's, and
`cost_over_fastest_adam` is beside Adam's steps as a fit takes them.
"""

import argparse
import math
from functools import partial
from typing import Any

import torch

from nfscale.benchmark.ours import Ours, constant_adam, one_by_one
from nfscale.benchmark.step import add_common_arguments, machine_of, refuse_step
from nfscale.benchmark.timing import in_turns, print_rows
from nfscale.benchmark.workloads import Problem, Workload, chosen_from, problem_of, workloads_named
from nfscale.engine import Calibration, Stop, calibrate
from nfscale.engine.dispatch import Step, StepName, chosen
from nfscale.errors import CallerError
from nfscale.optim import ESGD, Schedule

HELP = "what the curvature of ESGD costs beside Adam's steps"

_CURVATURES = ("shared", "per_field")
_TURN_SECONDS = 1.0
_MOST_CADENCES = 5  # of a turn
_CALIBRATION_DATA = 2  # its size changes nothing of what a step costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", default="A,B", help="default: %(default)s")
    parser.add_argument("--update-every", default="10,20", help="steps between probes (default: %(default)s)")
    parser.add_argument("--curvature", default=",".join(_CURVATURES), help="default: %(default)s")
    parser.add_argument("--step", default="auto", help="the step that is taken, as in fit.step (default: auto)")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: workload, curvature, update_every, cost_over_adam, the times behind it."""
    machine = machine_of(arguments)
    torch.set_num_threads(machine.threads)
    workloads = workloads_named(arguments.workloads, arguments.fields)
    curvatures = chosen_from(_CURVATURES, arguments.curvature, "curvature")
    cadences = _cadences(arguments.update_every)
    refuse_step(arguments.step, machine.device)
    rows = []
    for name, workload in workloads.items():
        for update_every in cadences:
            found = measured(workload, curvatures, update_every, arguments.step, machine.device, arguments.rounds)
            rows += [{"workload": name} | row | {"threads": machine.threads} for row in found]
    print_rows(rows)
    return rows


def _cadences(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CallerError(f"--update-every is a list of numbers of steps such as 10,20; got {text!r}")
    return [int(part) for part in parts]


def measured(
    workload: Workload, curvatures: list[str], update_every: int, step: StepName, device: str, rounds: int
) -> list[dict[str, Any]]:
    """A row for each curvature, all in turns with Adam."""
    problem = problem_of(workload).to(torch.device(device))
    alternatives, steps = _alternatives(problem, curvatures, update_every, step)
    once = in_turns({name: partial(one.advance, update_every) for name, one in alternatives.items()}, rounds=1)
    cadences = max(1, min(_MOST_CADENCES, math.ceil(_TURN_SECONDS / min(time.minimum for time in once.values()))))
    count = cadences * update_every
    times = in_turns({name: partial(one.advance, count) for name, one in alternatives.items()}, rounds, warm_up=0)
    per_step = {name: 1e3 * time.minimum / count for name, time in times.items()}
    return [
        {
            "curvature": curvature,
            "update_every": update_every,
            "cost_over_adam": per_step[curvature] / per_step[_family(steps[curvature])] - 1,
            "cost_over_fastest_adam": per_step[curvature] / per_step[_family(steps["adam"])] - 1,
            "step": steps[curvature].name,
            "at_once": steps[curvature].advance is not None,
            "ms_min": per_step[curvature],
            "ms_median": 1e3 * times[curvature].median / count,
            "adam_ms_min": per_step[_family(steps[curvature])],
            "adam_ms_median": 1e3 * times[_family(steps[curvature])].median / count,
        }
        for curvature in curvatures
    ]


def _family(step: Step) -> str:
    return f"adam, {step.name}, {'at once' if step.advance is not None else 'one by one'}"


def _alternatives(
    problem: Problem, curvatures: list[str], update_every: int, name: StepName
) -> tuple[dict[str, Ours], dict[str, Step]]:
    """ESGD by its curvature and Adam by its family; and the steps that they take as a fit does."""
    device, adam = problem.rows.device, constant_adam(problem.learning_rate)
    steps = {"adam": chosen(name, device, problem.field, problem.signal, adam)}
    alternatives = {_family(steps["adam"]): Ours(problem, steps["adam"], adam)}
    for curvature in curvatures:
        # A rate that moves next to nothing: fields stay where the data of all steps cost the same.
        optimizer = ESGD(1e-3, Schedule("constant"), curvature=curvature, update_every=update_every)  # type: ignore
        step = steps[curvature] = chosen(name, device, problem.field, problem.signal, optimizer)
        calibration = _calibration(problem, optimizer) if curvature == "shared" else None
        alternatives[curvature] = Ours(problem, step, optimizer, calibration)
        of_adam = steps["adam"] if step.advance is not None else one_by_one(steps["adam"])
        if _family(of_adam) not in alternatives:
            alternatives[_family(of_adam)] = Ours(problem, of_adam, adam)
    return alternatives, steps


def _calibration(problem: Problem, optimizer: ESGD) -> Calibration:
    data = [
        (str(index), problem.samples.map(lambda tensor, index=index: tensor[index].cpu()))
        for index in range(min(_CALIBRATION_DATA, len(problem.rows)))
    ]
    stop = Stop(1, check_every=1)
    samples = problem.workload.per_step
    calibration = calibrate(
        problem.field, problem.signal, data, optimizer=optimizer, stop=stop, seed=0, samples=samples, device="cpu"
    )
    return calibration.to(problem.rows.device)
