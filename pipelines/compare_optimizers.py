"""ESGD with shared curvature beside Adam and beside ESGD with curvature of its own, on photograph tiles.

    python pipelines/compare_optimizers.py            # about four minutes on one core
    python pipelines/compare_optimizers.py --tiles 16 --steps 100
    python pipelines/compare_optimizers.py --kinds    # every kind of optimiser with its defaults

Every method fits the same seeded sample of tiles from the same theta0 with the same minibatches, each at
its own automatic learning rate, with restarts switched off, so that a fit that diverges is seen.
"""

import argparse
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

import nfscale
from nfscale.datasets import DATASETS, seeded_sample
from nfscale.optim import OPTIMIZERS, Optimizer

SAMPLES_PER_STEP = 256
CALIBRATION = 32


def methods(steps: int) -> Iterator[tuple[str, Optimizer]]:
    """The optimisers that are compared, by name."""
    cosine = nfscale.Schedule("cosine", steps)
    warm = nfscale.Schedule("cosine", steps, warmup=nfscale.ESGD.default_warmup)
    adam_rate = nfscale.Adam.auto_learning_rate(64, 1.5, SAMPLES_PER_STEP)
    esgd_rate = nfscale.ESGD.auto_learning_rate(64, 1.5, SAMPLES_PER_STEP)
    yield "adam", nfscale.Adam(adam_rate, cosine)
    yield "esgd, shared", nfscale.ESGD(esgd_rate, warm)
    yield "esgd, shared, steps not bounded", nfscale.ESGD(esgd_rate, warm, clip=None)
    yield "esgd, per field", nfscale.ESGD(esgd_rate, warm, curvature="per_field")
    yield "esgd, per field, a tenth of the rate", nfscale.ESGD(esgd_rate / 10, warm, curvature="per_field")


def kinds(steps: int) -> Iterator[tuple[str, Optimizer]]:
    """Every kind of optimiser with its defaults."""
    for kind, cls in OPTIMIZERS.items():
        schedule = nfscale.Schedule("cosine", steps, warmup=getattr(cls, "default_warmup", 0))
        for options in [{"variant": "e"}, {"variant": "j"}] if kind == "adahessian" else [{}]:
            rate = cls.auto_learning_rate(64, 1.5, SAMPLES_PER_STEP)
            yield " ".join([kind, *options.values()]), cls(learning_rate=rate, schedule=schedule, **options)


def compare(tiles: int, steps: int, compared: Iterable[tuple[str, Optimizer]]) -> None:
    """Fit the tiles with every method and print a row for each."""
    photos = DATASETS["photos"]().open()
    signal, field = nfscale.Image(channels=3), nfscale.MLP(dimensions=2, channels=3)
    drawn = seeded_sample(photos.ids, tiles + CALIBRATION, seed=0, purpose="compare")
    data = [(photos.ids[position], signal.samples(photos.read(position).content)) for position in drawn]
    stop = nfscale.Stop(steps, check_every=20, max_restarts=0)
    print(f"{tiles} tiles of 64 x 64, {steps} steps of {SAMPLES_PER_STEP} samples, torch {torch.__version__}")
    print(f"{'method':38s} {'median':>7s} {'p05':>7s} {'worst':>7s} {'diverged':>9s} {'ms per field step':>18s}")
    for name, optimizer in compared:
        common = {"optimizer": optimizer, "stop": stop, "seed": 0, "samples": SAMPLES_PER_STEP}
        calibration = None
        if "diagonal" in optimizer.needs:
            calibration = nfscale.calibrate(field, signal, data[:CALIBRATION], **common)
        started = time.perf_counter()
        fitted = list(nfscale.fit(field, signal, data[CALIBRATION:], calibration=calibration, **common))
        milliseconds = 1e3 * (time.perf_counter() - started) / sum(f.steps for f in fitted)
        quality = np.array([f.quality for f in fitted])
        diverged = sum(not f.result.ok for f in fitted)
        p05, p50 = np.percentile(quality, [5, 50])
        print(f"{name:38s} {p50:7.2f} {p05:7.2f} {quality.min():7.2f} {diverged:9d} {milliseconds:18.3f}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kinds", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compared = kinds(arguments.steps) if arguments.kinds else methods(arguments.steps)
    compare(arguments.tiles, arguments.steps, compared)


if __name__ == "__main__":
    main()
