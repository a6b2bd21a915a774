"""Solvers beside Adam: steps and seconds to a quality, on grey photograph tiles and on small ones.

    python -m pipelines.compare_solvers                  # two minutes on one core
    python -m pipelines.compare_solvers --fields 4 --steps 20

Every method fits the same seeded sample of tiles from the same theta0 with all pixels (SPRING and one Adam: with
minibatches), looked at after every step of a solver and every fifth of the others. Seconds are those of a field:
of the steps of the batches that it was in, divided among their fields, without what the looking takes.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import nfscale
from nfscale.datasets import DATASETS, seeded_sample
from nfscale.optim import KFAC, LBFGS, GaussNewton, Optimizer, Solver, Spring

TARGETS = (35.0, 40.0, 50.0)


@dataclass(frozen=True)
class Regime:
    """What is fitted."""

    name: str
    side: int
    """Pixels along each side of a tile."""
    field: nfscale.MLP


REGIMES = (
    Regime("64 x 64", 64, nfscale.MLP(2, 1, width=64, depth=4, weight_scale=1.75)),
    Regime("16 x 16", 16, nfscale.MLP(2, 1, width=32, depth=2, weight_scale=1.75)),
)


@dataclass(frozen=True)
class Method:
    """How."""

    name: str
    optimizer: Optimizer | Solver
    samples: int | Literal["full"]
    stop: nfscale.Stop


def methods(regime: Regime, steps: int) -> Iterator[Method]:
    """The solvers for so many steps, first-order methods for ten times as many."""
    look = nfscale.Stop(steps, check_every=1, max_restarts=0)
    yield Method("lbfgs", LBFGS(), "full", look)
    yield Method("kfac", KFAC(), "full", look)
    if regime.side <= 32:
        yield Method("gauss_newton", GaussNewton(), "full", look)
    many = nfscale.Stop(10 * steps, check_every=5, max_restarts=0)
    cosine = nfscale.Schedule("cosine", 10 * steps)
    rate = nfscale.Adam.auto_learning_rate(regime.field.width, 1.75, 256)
    yield Method("adam, all pixels, constant", nfscale.Adam(rate, nfscale.Schedule("constant")), "full", many)
    if regime.side > 32:
        warm = nfscale.Schedule("cosine", 10 * steps, warmup=Spring.default_warmup)
        spring = Spring(Spring.auto_learning_rate(regime.field.width, 1.75, 256), warm)
        yield Method("spring, 256 pixels, cosine", spring, 256, many)
        yield Method("adam, 256 pixels, cosine", nfscale.Adam(rate, cosine), 256, many)


def tiles_of(regime: Regime, count: int) -> tuple[nfscale.Image, list[tuple[str, nfscale.Samples]]]:
    """A seeded sample of the photographs' tiles of 64 x 64, grey, brought to the size of the regime."""
    photos = DATASETS["photos"]().open()
    signal = nfscale.Image(channels=1, convert="grey", resize=[regime.side, regime.side])
    drawn = seeded_sample(photos.ids, count, seed=0, purpose="compare")
    return signal, [(photos.ids[position], signal.samples(photos.read(position).content)) for position in drawn]


def compare(regime: Regime, fields: int, steps: int) -> None:
    """Fit the tiles with every method and print a row for each."""
    signal, data = tiles_of(regime, fields)
    size = regime.field.layout.size
    print(
        f"\n{fields} grey tiles of {regime.name}, {size:,} weights each, weight_scale 1.75, torch {torch.__version__}"
    )
    heads = "".join(f"{f'to {target:g} dB':>24s}" for target in TARGETS)
    print(f"{'method':28s}{'ms a step':>10s}{heads}{'median dB':>11s}{'worst dB':>10s} at the end")
    for method in methods(regime, steps):
        step_seconds = []
        fitted = list(
            nfscale.fit(
                regime.field,
                signal,
                data,
                optimizer=method.optimizer,
                stop=method.stop,
                seed=0,
                samples=method.samples,
                clock=time.perf_counter,
                observe=lambda check, seen=step_seconds: seen.append((check.step_seconds, check.steps)),
            )
        )
        seconds = sum(taken for taken, _ in step_seconds) / sum(count for _, count in step_seconds)
        quality = np.array([f.quality for f in fitted])
        reached = "".join(f"{_reached(fitted, target, seconds):>24s}" for target in TARGETS)
        row = f"{method.name:28s}{1e3 * seconds:10.3f}{reached}{np.median(quality):11.1f}{quality.min():10.1f}"
        print(row, flush=True)


def _reached(fitted: list[nfscale.Fitted], target: float, seconds: float) -> str:
    """The median of the fields' first steps at the target, that of the slowest field, and seconds for the median; or
    how many fields reached it, where less than half did."""
    first = sorted(
        next((s for s, q in zip(f.history_step, f.history_quality, strict=True) if q >= target), np.inf) for f in fitted
    )
    middle, slowest = first[len(first) // 2], first[-1]
    if np.isinf(middle):
        return f"{sum(np.isfinite(first))} of {len(first)}"
    return f"{middle} (max {slowest}), {middle * seconds:.3f} s"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fields", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for regime in REGIMES:
        compare(regime, arguments.fields, arguments.steps)


if __name__ == "__main__":
    main()
