"""The description of a run in MLflow: what came out in words, where to look, what the charts show. Markdown."""

from typing import Any
from urllib.parse import quote

from nfscale.store.run_folder import CONVERGENCE, REPORT, WORST_TABLE, Plan
from nfscale.store.schema import quality_text

_CHARTS = (
    ("`quality/*`, `count/*`", "one number each: percentiles of {unit} over the data, rows by status"),
    ("`convergence/quality_*`", "{unit} of the 5th, 50th and 95th percentile; step: optimiser steps"),
    ("`datum/*`", "{unit}, steps and steps to the target of every datum; step: its index in the dataset"),
    ("`shard/*`", "one point per committed shard; step: its rank among the leases"),
    ("`system/HOST/*`", "what each node was doing; step: seconds since the run began"),
)


def note_of(
    plan: Plan, output: str, state: str, summary: dict[str, Any], experiment: str, run: str, per_datum: bool
) -> str:
    """The note of a run.

    Args:
        state: in words: `running`, `complete`, `killed`, ...
        summary: figures of the last review; empty before the first.
        per_datum: whether it has the points of each datum.
    """
    lines = [_result(plan, state, summary), ""]
    if summary:
        lines += [
            f"- {_link('Report', REPORT, experiment, run)}: pictures, plots, who failed and why",
            f"- {_link('The worst data', WORST_TABLE, experiment, run)}, a table to search and sort, the worst first",
            f"- {_link('Every datum', CONVERGENCE, experiment, run)}: histories and all else but the weights (Parquet)",
        ]
    lines += [
        f"- One datum: `nfscale review {output} --id ID`",
        f'- The weights: `nfscale.open_weights("{output}")`',
        "",
        "| charts | what they show |",
        "|---|---|",
    ]
    unit = f"{plan.quality_name} (higher is better)"
    lines += [f"| {n} | {words.format(unit=unit)} |" for n, words in _CHARTS if per_datum or "datum" not in n]
    return "\n".join(lines)


def _result(plan: Plan, state: str, summary: dict[str, Any]) -> str:
    said = f"{state.replace('_', ' ').capitalize()}: **{summary.get('fields', 0):,} of {plan.data_count:,} data** "
    said += f"as neural fields of {plan.layout.size:,} weights each."
    if not summary:
        return f"{said} The charts move as shards are committed."
    if "quality_median" in summary:
        name = plan.quality_name
        median, low, worst = (quality_text(name, summary[f"quality_{part}"]) for part in ("median", "p05", "min"))
        said += f" {name}: median **{median}**, 5th percentile {low}, worst **{worst}** (`{summary['worst']}`)."
        if "reached_fraction" in summary:
            said += f" The target of {summary['target']:g} is reached by {100 * summary['reached_fraction']:.1f} %."
    return said + (f" **{summary['failed']:,} failed.**" if summary.get("failed") else " None failed.")


def _link(text: str, artifact: str, experiment: str, run: str) -> str:
    """To an artifact, within MLflow's own pages."""
    return f"[{text}](#/experiments/{experiment}/runs/{run}/artifacts/{quote(artifact)})"
