"""Fields per second on a GPU at 1,000 full-batch steps: nfscale beside a naive loop, vmap and JAX on the same device.

A turn takes some steps (`steps_timed`) of as many fields as fill the device (`fields_timed`; a few for the loop), and
`fields_per_second` is scaled from these to 1,000 steps of a field, by the fastest round. `fraction_of_limit` is what
the binding one of two kinds of work would need at the rate that it reaches alone in the same run: half-precision
products, and sines with cosines in the units for them. Some fields are fitted whole, by 1,000
steps of Adam with its automatic rate and cosine decay: `psnr_difference_db` is the median over them of the quality of
the step that nfscale takes less that of plain steps in single precision, both cut at 58.9 dB, the rounding of 8 bits:
small images are fitted to the last bit of a float, where steps in single precision differ by decibels, too. All images
are sums of waves.

Of few fields (the workload `few`) the step of torch is timed twice: `replayed` as a CUDA graph, which is how it is
taken, and `launched`, one kernel after the other.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch

from nfscale.benchmark.naive import MakeMethod
from nfscale.benchmark.ours import Ours, launched
from nfscale.benchmark.step import (
    METHODS,
    Machine,
    add_common_arguments,
    machine_of,
    measured,
    methods_named,
    refuse_step,
)
from nfscale.benchmark.timing import in_turns, print_rows
from nfscale.benchmark.workloads import Workload, problem_of, workloads_named
from nfscale.engine import Stop, fit
from nfscale.optim import Adam, Schedule

HELP = "fields per second on a GPU, beside a naive loop, vmap and JAX"

STEPS = 1000
WORKLOADS = {
    # Multiples of 132, the multiprocessors of a large GPU, that the unfused methods have memory for.
    "mnist": Workload(8448, 28**2, width=32, depth=2),
    "cifar": Workload(4224, 32**2, width=64, depth=2, channels=3),
    "64": Workload(1056, 64**2, width=64, depth=3, channels=3),
    "128": Workload(264, 128**2, width=64, depth=3, channels=3),
    "few": Workload(64, 28**2, width=32, depth=2),
}
_GRAPHS: dict[str, MakeMethod] = {"replayed": partial(Ours, step="torch"), "launched": launched}
_OF_GRAPHS = "few"
_METHODS = ("loop", "vmap", "compile", "jax", "nfscale", *_GRAPHS)
_FITTED = 16  # fields whose quality is compared
_ROUNDING_DB = 58.9
_PRODUCT_SIDE = 8192
_TURNED, _TURNS = 1 << 20, 4096
_SINES = f"""
template <typename T> T turned(T phase) {{
    T sine = phase, cosine = phase;
    for (int i = 0; i < {_TURNS}; i++) {{ sine = __sinf(sine); cosine = __cosf(cosine); }}
    return sine + cosine;
}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    parser.add_argument(
        "--methods",
        default=None,
        help=f"of {', '.join(_METHODS)}, or all (default: all but compile, those of graphs for {_OF_GRAPHS})",
    )
    parser.add_argument("--step", default="auto", help="the step that nfscale takes, as in fit.step (default: auto)")
    parser.add_argument("--precision", default="auto", help="of its products, as in fit.precision (default: auto)")
    parser.add_argument("--fitted", type=int, default=_FITTED, help="fields fitted whole (default: %(default)s)")
    add_common_arguments(parser, device="cuda")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: workload, method, fields_per_second, ratio_to_..., fraction_of_limit, psnr_difference_db, peak_mb, ..."""
    machine = machine_of(arguments)
    workloads = workloads_named(arguments.workloads, arguments.fields, WORKLOADS)
    methods = methods_named(arguments.methods, "cuda", _METHODS)
    taken: dict[str, Any] = {"step": arguments.step, "precision": arguments.precision}
    refuse_step(device=machine.device, **taken)
    made: dict[str, MakeMethod] = {**METHODS, **_GRAPHS, "nfscale": partial(Ours, **taken)}
    rows = []
    for name, workload in workloads.items():
        more = _GRAPHS if name == _OF_GRAPHS and arguments.methods is None else ()
        timed = measured(
            name, workload, {method: made[method] for method in [*methods, *more]}, machine, arguments.rounds
        )
        limit_ms = _limit_ms(workload, machine)
        quality = _qualities(workload, taken, arguments.fitted, machine) if arguments.fitted else {}
        rows += [_row(row, limit_ms, quality if row["method"] == "nfscale" else {}) for row in timed]
    print_rows([{key: value for key, value in row.items() if not key.startswith("bound")} for row in rows])
    return rows


def _row(row: dict[str, Any], limit_ms: float | None, quality: dict[str, float]) -> dict[str, Any]:
    """A row of `step` with what it means for a dataset."""
    head = {
        "workload": row["workload"],
        "method": row["method"],
        "fields_per_second": per_second(row["fields"], row["ms_min"]),
        "fraction_of_limit": None if limit_ms is None else limit_ms / row["ms_min"],
        "psnr_difference_db": quality.get("difference"),
        "psnr_db": quality.get("ours"),
        "psnr_plain_db": quality.get("plain"),
    }
    return head | {key: value for key, value in row.items() if key not in head | {"fraction_of_bound": None}}


def per_second(fields: int, ms_per_step: float) -> float:
    """Fields that are done in a second at `STEPS` steps each."""
    return fields / (STEPS * ms_per_step / 1e3)


def _limit_ms(workload: Workload, machine: Machine) -> float | None:
    """Milliseconds of one step if only the binding kind of work took time; None where a rate cannot be measured."""
    if machine.device != "cuda":
        return None
    a, b = (torch.ones(_PRODUCT_SIDE, _PRODUCT_SIDE, dtype=torch.float16, device="cuda") for _ in range(2))
    phases = torch.linspace(0, 1, _TURNED, device="cuda")
    try:
        turned = torch.cuda.jiterator._create_jit_fn(_SINES)
        times = in_turns({"products": lambda: torch.mm(a, b), "sines": lambda: turned(phases)}, rounds=10, warm_up=2)
    except (RuntimeError, AttributeError) as error:
        print(f"no limit is measured: {error}")
        return None
    products = 2.0 * _PRODUCT_SIDE**3 / times["products"].minimum
    sines = float(_TURNED * _TURNS) / times["sines"].minimum
    return 1e3 * max(workload.operations / products, workload.activations / sines)


def _qualities(workload: Workload, taken: dict[str, Any], fields: int, machine: Machine) -> dict[str, float]:
    """Median psnr_db of whole fits by our step and by plain ones, and of what differs of it below the rounding.

    Args:
        taken: the step and the precision, as `fit` takes them.
    """
    problem = problem_of(workload, 0, min(fields, workload.fields))
    data = [(str(i), problem.samples.map(lambda tensor, i=i: tensor[i])) for i in range(len(problem.rows))]
    rate = Adam.auto_learning_rate(workload.width, workload.field.weight_scale, workload.samples)
    optimizer: Any = Adam(rate, Schedule("cosine", total_steps=STEPS))
    ways: dict[str, dict[str, Any]] = {"ours": taken, "plain": {"step": "plain"}}
    found = {}
    for name, how in ways.items():
        fitted = fit(
            problem.field,
            problem.signal,
            data,
            optimizer=optimizer,
            stop=Stop(STEPS, check_every=STEPS, max_restarts=0),
            seed=0,
            device=machine.device,
            **how,
        )
        found[name] = {result.id: result.quality for result in fitted}
    differences = [
        min(found["ours"][datum_id], _ROUNDING_DB) - min(quality, _ROUNDING_DB)
        for datum_id, quality in found["plain"].items()
    ]
    medians = {name: statistics.median(qualities.values()) for name, qualities in found.items()}
    return {**medians, "difference": statistics.median(differences)}
