"""What is done to images, and which of their samples a step takes: does either make fitting faster?

    python -m pipelines.transformations            # four minutes on two cores

`signal.transform` after Seo et al., "In Search of a Data Transformation That Accelerates Neural Field Training" (CVPR
2024): each at the best of several rates, constant and full batch as there, by steps to 30, 40 and 50 dB. Then
`fit.sampling` at equal steps, with cosine decay. Two tables are printed, and written to the output folder and MLflow.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import nfscale
from nfscale.datasets import DATASETS, seeded_sample
from nfscale.engine.sampling import Sampling
from nfscale.fields import MLP
from nfscale.signals import Image, Samples
from nfscale.signals.transforms import TransformName
from nfscale.track import log_folder
from pipelines.weight_scaling import median, written

LEVELS = (30.0, 40.0, 50.0)
RATES = (2.0**-10, 2.0**-9, 2.0**-8)
SCALES = (1.0, 1.5)
Data = list[tuple[str, Samples]]


def photographs(signal: Image, count: int, tile: int | None) -> Data:
    """Photographs, whole or in tiles."""
    dataset = DATASETS["photos"](tile=tile).open()
    positions = range(count) if tile is None else seeded_sample(dataset.ids, count, 0, "transformations")
    return [(dataset.ids[n], signal.samples(dataset.read(n).content)) for n in positions]


def fitted(signal: Image, data: Data, scale: float, rate: float, schedule: str, steps: int, **how: Any) -> list[Any]:
    """Fits of the data with Adam, in the order in which they finish."""
    field = MLP(2, signal.channels, width=64, depth=4, weight_scale=scale)
    adam = nfscale.Adam(rate, nfscale.Schedule(schedule, steps))
    return list(nfscale.fit(field, signal, data, optimizer=adam, seed=0, **how))


def steps_to(fits: list[Any], level: float) -> float:
    """The median of the steps to a level, infinite where most do not reach it."""
    reached = []
    for one in fits:
        history = zip(one.history_step, one.history_quality, strict=True)
        reached.append(next((step for step, quality in history if quality >= level), math.inf))
    return median(reached)


def transformations(count: int, steps: int) -> list[str]:
    """A row of each transformation and weight scale, at the rate that needs fewest steps to 50 dB, or ends highest."""
    lines = ["| transform | weight_scale | rate | dB | steps to 30/40/50 dB |", "|---|---|---|---|---|"]
    plain = Image(channels=1, convert="grey", resize=[64, 64])
    for name in get_args(TransformName):
        signal = replace(plain, transform=name)
        if name == "standardization":
            values = [float(v) for _, one in photographs(plain, count, None) for v in (one.values + 0.5).flatten()]
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
            signal = replace(signal, value_mean=mean, value_deviation=deviation)
        data = photographs(signal, count, None)
        for scale in SCALES:
            stop = nfscale.Stop(steps, target=LEVELS[-1], check_every=10, max_restarts=0)
            swept = {rate: fitted(signal, data, scale, rate, "constant", steps, stop=stop) for rate in RATES}
            best = min(swept, key=lambda rate: (steps_to(swept[rate], 50), -median(f.quality for f in swept[rate])))
            fits = swept[best]
            reached = "/".join(written(steps_to(fits, level), ".0f") for level in LEVELS)
            lines.append(
                f"| {name} | {scale:g} | 2^{math.log2(best):.0f} | {median(f.quality for f in fits):.1f} | {reached} |"
            )
            print(lines[-1], flush=True)
    return lines


def samplings(count: int, steps: int) -> list[str]:
    """A row of each way to take samples."""
    lines = ["| sampling | samples | dB | worst | steps to 30/40/50 dB | seconds |", "|---|---|---|---|---|---|"]
    signal = Image(channels=3)
    data = photographs(signal, count, 64)
    for samples in (256, 1024):
        for sampling in get_args(Sampling):
            started = time.perf_counter()
            stop = nfscale.Stop(steps, check_every=50, max_restarts=0)
            how = {"stop": stop, "samples": samples, "sampling": sampling}
            fits = fitted(signal, data, 1.5, 1e-3, "cosine", steps, **how)
            seconds = time.perf_counter() - started
            reached = "/".join(written(steps_to(fits, level), ".0f") for level in LEVELS)
            qualities = [one.quality for one in fits]
            found = (sampling, samples, f"{median(qualities):.2f}", f"{min(qualities):.2f}", reached, f"{seconds:.1f}")
            lines.append("| " + " | ".join(map(str, found)) + " |")
            print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photographs", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("runs/transformations"))
    chosen = parser.parse_args(arguments)
    lines = ["# Transformations", "", *transformations(chosen.photographs, chosen.steps)]
    lines += ["", "# Sampling", "", *samplings(chosen.tiles, chosen.steps)]
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "tables.md").write_text("\n".join(lines) + "\n")
    params = {"photographs": chosen.photographs, "tiles": chosen.tiles, "steps": chosen.steps}
    if problem := log_folder(chosen.output, "transformations", chosen.output.name, params, {}):
        print(f"warning: MLflow does not have this: {problem}")


if __name__ == "__main__":
    main()
