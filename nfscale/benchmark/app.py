"""The benchmarks by name. With argparse, because torch and numpy are all that is needed."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfscale.benchmark import driver, encode, esgd, fit, gpu, step, store, stream
from nfscale.benchmark.timing import machine

DESCRIPTION = "Ratios measured side by side in one run: interleaved, medians and minima."
BENCHMARKS = {
    "step": step,
    "esgd": esgd,
    "fit": fit,
    "encode": encode,
    "driver": driver,
    "gpu": gpu,
    "store": store,
    "stream": stream,
}
"""Modules with `HELP`, `add_arguments(parser)` and `run(arguments) -> rows of figures`, which they also print."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m nfscale.benchmark") -> None:
    """Run a benchmark; its rows go to `--json` too."""
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    kinds = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        kind = kinds.add_parser(name, help=benchmark.HELP, description=benchmark.__doc__)
        kind.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
        benchmark.add_arguments(kind)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = BENCHMARKS[given.name].run(given)
    if given.json:
        given.json.write_text(
            json.dumps({"benchmark": given.name, "machine": machine(), "rows": rows}, indent=1) + "\n"
        )
