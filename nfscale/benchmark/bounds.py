"""The machine's limit, measured in the same run as what is held against it.

A step is products, sines with cosines, and the optimiser's traffic, and all use the same units of a processor: the
bound of a workload is the sum of their times at the rates that the machine reaches with each alone. The rates are
those of `bounds.cpp`: multiply-adds in registers, polynomials for sine and cosine together, weights and moments in
cache. Without a compiler they are torch's (products of large matrices, `torch.sin` and `torch.cos`, updates in place),
which is no limit for a program that brings its own.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nfscale.benchmark.timing import Times
from nfscale.benchmark.workloads import Workload
from nfscale.engine.build import CannotBuild, compiled

_SOURCE = Path(__file__).with_name("bounds.cpp")
_ROUNDS = {"products": 25_000_000, "sines": 200_000, "updates": 60_000}  # about a tenth of a second each
_SIDE, _ELEMENTS, _WEIGHTS = 1024, 1 << 16, 1 << 16  # of what torch is timed on


@dataclass(frozen=True)
class Part:
    """One of the three kinds of work: what does some of it, and how much that is."""

    run: Callable[[], object]
    work: float


@dataclass(frozen=True)
class Bound:
    """Rates per second."""

    kind: str
    """`hardware`, or `torch` where nothing can be compiled."""
    products: float
    """Floating point operations."""
    sines: float
    """Sines, each with its cosine."""
    updates: float
    """Weights with two moments."""

    def parts_ms(self, workload: Workload) -> dict[str, float]:
        """Milliseconds that each part of one step of a workload takes at least."""
        return {
            "bound_products_ms": 1e3 * workload.operations / self.products,
            "bound_sines_ms": 1e3 * workload.activations / self.sines,
            "bound_updates_ms": 1e3 * workload.weights / self.updates,
        }

    def ms(self, workload: Workload) -> float:
        return sum(self.parts_ms(workload).values())


def parts(threads: int) -> tuple[str, dict[str, Part]]:
    """The kind of bound, and what is to be timed beside the methods, by names that no method has."""
    try:
        library: Any = ctypes.CDLL(str(compiled(_SOURCE)))
    except (CannotBuild, OSError):
        return "torch", {f"bound: {name}": part for name, part in _torch_parts().items()}
    timed = {}
    for name, rounds in _ROUNDS.items():
        function = getattr(library, f"nfscale_{name}")
        function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_double
        timed[f"bound: {name}"] = Part(partial(function, rounds, threads), function(rounds, threads))
    return "hardware", timed


def bound_of(kind: str, timed: Mapping[str, Part], times: Mapping[str, Times]) -> Bound:
    """The fastest of the rounds of each part."""
    rates = {name.removeprefix("bound: "): part.work / times[name].minimum for name, part in timed.items()}
    return Bound(kind, **rates)


def _torch_parts() -> dict[str, Part]:
    """With as many threads as torch has."""
    a, b, product = (torch.ones(_SIDE, _SIDE) for _ in range(3))
    phases, sines, cosines = (torch.linspace(-60, 60, _ELEMENTS) for _ in range(3))
    weights, first, second, gradient = (torch.zeros(_WEIGHTS) for _ in range(4))

    def multiply() -> None:
        for _ in range(8):
            torch.mm(a, b, out=product)

    def turn() -> None:
        for _ in range(400):
            torch.sin(phases, out=sines)
            torch.cos(phases, out=cosines)

    def update() -> None:
        for _ in range(400):
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient, 0.1)
            weights.addcmul_(first, second)

    return {
        "products": Part(multiply, 8 * 2.0 * _SIDE**3),
        "sines": Part(turn, 400.0 * _ELEMENTS),
        "updates": Part(update, 400.0 * _WEIGHTS),
    }
