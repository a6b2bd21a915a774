"""70,000 articles of clothing as neural fields, classified from their weights, beside what others have published.

    python -m pipelines.fashion_mnist                            # into runs/fashion_mnist, on GPUs where there are any
    python -m pipelines.fashion_mnist --limit 10000 workers=0    # a seventh of both splits, in this process
    python -m pipelines.fashion_mnist --readers mlp,tokens       # more readers of weights

Fields are made as those of `pipelines/mnist_generate.py`, with the same settings, and no reader was tuned on this set.
All 60,000 train and all 10,000 test (with `--limit` a seeded sample of both); nothing was chosen by the test split. A
run that was interrupted goes on where it was. The figures go into OUTPUT/fashion_mnist.json, beside the published ones.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.mnist_generate import FIELDS, figures_of, nfscale

_JOB = Path(__file__).with_name("fashion_mnist.yaml")


@dataclass(frozen=True)
class Published:
    """An accuracy on the test split of Fashion-MNIST, as its authors or those who compare with them give it."""

    reader: str
    percent: float
    source: str
    differs: str
    """From what is measured here, as far as it is known."""


_RELEASED = "fields released by Navon et al. and Zhou et al., a reader blind to the order of their neurons"
_GAP = "project-siren-gap (Güven 2026), not reviewed"
_SCALE = "ScaleGMN (NeurIPS 2024), table 1"
PUBLISHED = (
    Published("MLP on pixels", 89.62, _GAP, "an MLP and training of its own"),
    Published("MLP on weights, one start for all", 82.97, _GAP, "fields of 2 x 32 units too, fitted with Adam"),
    Published("MLP on weights, a start for each", 12.66, _GAP, "the same, but for the starts"),
    Published("NFN (HNP)", 68.94, _SCALE, _RELEASED),
    Published("DWSNets", 67.06, _SCALE, _RELEASED),
    Published("NG-GNN", 68.00, _SCALE, _RELEASED),
    Published("ScaleGMN-B", 80.78, _SCALE, _RELEASED),
    Published(
        *("MWT-L, a transformer", 90.43, "MWT (CVPR 2025)"),
        "fields are fitted in few steps from a start that is learned with the classifier",
    ),
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Encode and classify; the accuracies, and the published ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--limit", type=int, help="images, of both splits together (default: all 70,000)")
    parser.add_argument("--readers", default="mlp", help="of weights, see nfscale classify (default: %(default)s)")
    parser.add_argument("--epochs", default="1", help="times those that readers usually take (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the job, as for encode")
    given = parser.parse_args(arguments)
    output, started = given.output, time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    limit = [] if given.limit is None else [f"dataset.limit={given.limit}"]
    nfscale("encode", str(_JOB), f"output={output}", *FIELDS, *limit, *given.overrides)
    options = ["--folds", "1", "--reader", given.readers, "--epochs", given.epochs]
    found = figures_of(output, "classify", str(output), *options)
    figures: dict[str, Any] = {
        "fields": found["rows"],
        "tested": found["tested"],
        "readers": found["readers"],
        "published": [asdict(one) for one in PUBLISHED],
        "wall_seconds": time.monotonic() - started,
    }
    (output / "fashion_mnist.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    return figures


def table(figures: dict[str, Any]) -> str:
    """What was found and what is published, as a Markdown table."""
    trained = figures["fields"] - figures["tested"]
    lines = ["| reader | accuracy | from | what differs |", "|---|---|---|---|"]
    for name, one in figures["readers"].items():
        low, high = (100 * end for end in one["interval"])
        said = f"{trained:,} train, {figures['tested']:,} test"
        lines.append(f"| {name} | {100 * one['accuracy']:.1f} % ({low:.1f} to {high:.1f}) | here | {said} |")
    for one in PUBLISHED:
        lines.append(f"| {one.reader} | {one.percent:.2f} % | {one.source} | {one.differs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
