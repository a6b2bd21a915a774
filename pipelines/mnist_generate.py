"""From 5,000 handwritten digits to new ones, by way of neural fields: encode, classify, generate, score.

    python -m pipelines.mnist_generate            # into runs/mnist_generate
    python -m pipelines.mnist_generate --small    # 400 digits, little training: does it run?

The fields are made to be learned from. All start from one theta0 and take few steps of one optimiser with the same
curvature, on all pixels and to no target, so that weights move nearly linearly in their image and two fits of one image
agree: at omega_0 = 15, 50 steps of ESGD and 26 dB, 64 principal components hold a digit (a classifier of images reads
95 % of held-out digits that went through them, 96 % of the fields themselves, 97 % of the originals); at omega_0 = 30
and as many dB they do not, nor do fields of 16 units. The figures go into OUTPUT/mnist_generate.json, with what was
asked for beside what was found.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_JOB = Path(__file__).with_name("mnist.yaml")
FIELDS = (
    *("field.depth=2", "field.omega_0=15"),
    *("fit.samples=full", "fit.max_steps=50", "fit.check_every=10", "fit.target=null"),
)
"""Keys of a job that make fields which read well, see above."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run it all; the figures, and for each target whether it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("runs/mnist_generate"))
    parser.add_argument("--small", action="store_true", help="400 digits, little training")
    given = parser.parse_args(arguments)
    output, small = given.output, given.small
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    limit = ["dataset.limit=400"] if small else []
    nfscale("encode", str(_JOB), f"output={output}", "name=mnist_generate", "workers=0", *FIELDS, *limit)
    classify = ["--epochs", "0.2", "--folds", "2"] if small else []
    accuracy = figures_of(output, "classify", str(output), *classify)
    generate = ["--steps", "200", "--samples", "200", "--components", "16"] if small else []
    samples = figures_of(output, "generate", str(output), *generate)
    figures = {
        **{name: accuracy[name] for name in ("weights_accuracy", "probe_accuracy", "pixel_accuracy")},
        **{name: accuracy[name] for name in ("weights_interval", "probe_interval", "pixel_interval")},
        **{
            name: samples[name]
            for name in ("label_agreement", "frechet_distance", "best_baseline_frechet_distance", "novelty_ratio")
        },
        "wall_seconds": time.monotonic() - started,
    }
    figures["targets"] = targets(figures)
    (output / "mnist_generate.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, is_met in figures["targets"].items():
        print(f"{'met   ' if is_met else 'MISSED'}  {name}")
    print(f"{output / 'learn/generate/samples.png'}, {output / 'mnist_generate.json'}")
    return figures


def targets(figures: dict[str, Any]) -> dict[str, bool]:
    """What is asked for, and whether it was found."""
    pixels, best = figures["pixel_accuracy"], figures["best_baseline_frechet_distance"]
    return {
        "weights at most 4 points below pixels": figures["weights_accuracy"] >= pixels - 0.04,
        "probe at most 1 point below pixels": figures["probe_accuracy"] >= pixels - 0.01,
        "label agreement at least 90 %": figures["label_agreement"] >= 0.9,
        "Frechet distance at most half of the best baseline's": best is None or figures["frechet_distance"] <= best / 2,
        "novelty ratio at least 0.8": figures["novelty_ratio"] >= 0.8,
        "under 30 minutes": figures["wall_seconds"] < 1800,
    }


def figures_of(output: Path, command: str, *arguments: str) -> dict[str, Any]:
    """What a command reports with --json."""
    place = output / f"{command}.json"
    nfscale(command, *arguments, "--json", str(place))
    return json.loads(place.read_text())


def nfscale(*arguments: str) -> None:
    """Run a command as a user does; one that fails ends the pipeline."""
    subprocess.run([sys.executable, "-m", "nfscale", *arguments], check=True)


if __name__ == "__main__":
    main()
