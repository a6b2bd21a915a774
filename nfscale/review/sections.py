"""What a report says in words, tables and plots, but for its pictures: a dict for the template."""

from collections import defaultdict
from typing import Any

import numpy as np

from nfscale.difficulty import NAMES, SAMPLE, difficulties
from nfscale.errors import NfscaleError
from nfscale.review import charts
from nfscale.review.gathered import OTHERS, Coded, Gathered
from nfscale.run import OpenRun
from nfscale.store.history import quality_over_seconds, quality_quantiles, sampled_histories
from nfscale.store.run_folder import REPORT, Commit
from nfscale.store.schema import FAILED_STATUSES
from nfscale.store.table import WeightsTable

_MOST_GROUPS = 24  # lanes of a plot that can still be read
_MOST_WORKERS = 40
_WORST = 20
_FAILURES = 20
_LEAST_FIELDS = 5  # of which a relation between difficulty and quality says something

UNITS = {"psnr_db": "PSNR, dB", "snr_db": "SNR, dB", "iou": "IoU"}
"""Qualities as axes name them."""


def unit_of(quality_name: str) -> str:
    """A quality as axes name it."""
    return UNITS.get(quality_name, quality_name)


def summary_of(run: OpenRun, table: WeightsTable, rows: Gathered) -> dict[str, Any]:
    """The figures of the report's head; also what `nfscale review --json` writes."""
    counts = rows.status.counts()
    quality = rows.quality[np.isfinite(rows.quality)]
    device_seconds = sum(commit.fit_seconds for commit in table.commits)
    summary: dict[str, Any] = {
        "name": run.job.name,
        "output": str(run.folder),
        "fields": len(rows),
        "data": run.plan.data_count,
        "complete": run.folder.is_complete,
        "failed": sum(counts.get(status, 0) for status in FAILED_STATUSES),
        "counts": dict(sorted(counts.items())),
        "quality_name": run.plan.quality_name,
        "target": run.job.fit.target,
        "weights_per_field": run.plan.layout.size,
        "table_bytes": sum(commit.bytes for commit in table.commits),
        "device_seconds": device_seconds,
        "workers": len({commit.worker for commit in table.commits}),
        "report": run.folder.files.place(REPORT),
    }
    if table.commits:
        wall = wall_seconds(table.commits)
        summary |= {"wall_seconds_shards": wall, "fields_per_second_shards": len(rows) / max(wall, 1e-9)}
    if not len(quality):
        return summary
    p05, p50, p95 = np.percentile(quality, [5, 50, 95])
    summary |= {"quality_p05": float(p05), "quality_median": float(p50), "quality_p95": float(p95)}
    summary |= {"quality_mean": float(quality.mean(dtype=np.float64)), "quality_min": float(quality.min())}
    summary["steps_mean"] = float(np.nanmean(rows.steps))
    summary["worst"] = rows.ids_at(rows.fitted[:1])[0]
    summary["device_seconds_per_field"] = device_seconds / len(quality)
    reached = rows.steps_to_target[np.isfinite(rows.steps_to_target)]
    if run.job.fit.target is not None:
        summary |= {"reached": len(reached), "reached_fraction": len(reached) / len(rows)}
    if len(reached):
        summary["steps_to_target_median"] = float(np.median(reached))
    if len(heldout := rows.quality_heldout[np.isfinite(rows.quality_heldout)]):
        summary["quality_heldout_median"] = float(np.median(heldout))
    return summary


def sections(run: OpenRun, table: WeightsTable, rows: Gathered) -> dict[str, Any]:
    """Failures, the worst data, plots and tables."""
    context: dict[str, Any] = {"failures": rows.failures[:_FAILURES], "more_failures": len(rows.failures) - _FAILURES}
    context |= {"quality_plots": [], "progress_plots": [], "difficulty_plots": [], "groupings": [], "worst_rows": []}
    context |= _work(table.commits)
    quality = rows.quality[np.isfinite(rows.quality)]
    if not len(quality):
        return context
    unit, target = unit_of(run.plan.quality_name), run.job.fit.target
    context["quality_plots"] = [charts.histogram(quality, target, unit), charts.ecdf(quality, target, unit)]
    context["progress_plots"] = _progress(run, table, rows, unit)
    context["difficulty_plots"] = _difficulty(run, rows, unit)
    named = {"label": rows.label, "split": rows.split}
    context["groupings"] = [
        {"name": name} | _grouped(rows, coded, target, unit) for name, coded in named.items() if coded.names
    ]
    columns = ["datum_id", "quality", "steps", "status", "label", "split"]
    context["worst_rows"] = rows.rows_at(rows.fitted[:_WORST], columns)
    return context


def _progress(run: OpenRun, table: WeightsTable, rows: Gathered, unit: str) -> list[str]:
    target, histories = run.job.fit.target, sampled_histories(table)
    plots = [charts.bands(quality_quantiles(histories, charts.BANDS), target, unit, "optimiser steps")]
    over_time = quality_over_seconds(histories, charts.BANDS)
    if len(over_time[0]):
        plots.append(charts.bands(over_time, target, unit, "share of wall time of a field [s]"))
    reached = rows.steps_to_target[np.isfinite(rows.steps_to_target)]
    if target is not None and len(reached):
        plots.append(charts.steps_to_target(reached, target))
        fitted = int(np.isfinite(rows.steps).sum())
        plots.append(charts.survival(reached, fitted, float(np.nanmax(rows.steps)), target))
    return plots


def _difficulty(run: OpenRun, rows: Gathered, unit: str) -> list[dict[str, str]]:
    """A plot for each measure, of a seeded sample of the data, with the rank correlation."""
    sample = np.random.default_rng(run.job.seed).permutation(rows.fitted)[:SAMPLE]
    positions = rows.dataset_positions(sample)
    try:
        measured = difficulties(run.dataset, run.signal, positions)
    except (NfscaleError, OSError, ValueError):
        return []  # the gallery says why the data cannot be read
    if len(measured) < _LEAST_FIELDS:
        return []
    quality = np.array([rows.quality[row] for row, at in zip(sample, positions, strict=True) if at in measured])
    plots = []
    for name, words in NAMES.items():
        values = np.array([measured[at][name] for at in positions if at in measured])
        said = f"Of {len(values)} data; rank correlation with quality {_rank_correlation(values, quality):+.2f}."
        plots.append({"plot": charts.difficulty(values, quality, words, unit), "words": said})
    return plots


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, with ties in the order in which they stand; 0 where one of them is constant."""
    if len(np.unique(one)) < 2 or len(np.unique(other)) < 2:
        return 0.0
    return float(np.corrcoef(one.argsort().argsort(), other.argsort().argsort())[0, 1])


def _grouped(rows: Gathered, coded: Coded, target: float | None, unit: str) -> dict[str, Any]:
    """Figures of each group of data, from the worst median on."""
    failed = np.isin(rows.status.codes, [rows.status.names.index(s) for s in FAILED_STATUSES if s in rows.status.names])
    order = np.argsort(coded.codes, kind="stable")
    edges = np.searchsorted(coded.codes[order], np.arange(len(coded.names) + 1))
    groups = []
    for name, start, stop in zip(coded.names, edges[:-1], edges[1:], strict=True):
        members = order[start:stop]
        quality = rows.quality[members]
        quality = quality[np.isfinite(quality)]
        if name == OTHERS or not len(quality):
            continue
        groups.append(
            {
                "name": name,
                "fields": len(members),
                "failed": int(failed[members].sum()),
                "median": float(np.median(quality)),
                "p05": float(np.percentile(quality, 5)),
                "reached": None if target is None else float(np.isfinite(rows.steps_to_target[members]).mean()),
                "quality": quality,
            }
        )
    groups.sort(key=lambda group: group["median"])
    shown, more = groups[:_MOST_GROUPS], len(groups) - _MOST_GROUPS
    plot = charts.groups([g["name"] for g in shown], [g["quality"] for g in shown], target, unit) if shown else ""
    return {"groups": shown, "more": max(0, more), "plot": plot}


# --- the work: when, where, at what cost


def wall_seconds(commits: list[Commit]) -> float:
    """From the start of the first shard to the end of the last; pauses between two drivers count."""
    return max(c.committed_at for c in commits) - min(c.committed_at - c.seconds for c in commits)


def _work(commits: list[Commit]) -> dict[str, Any]:
    """Throughput, utilisation and cost of each worker over time."""
    if not commits:
        return {"work_plots": [], "workers": [], "more_workers": 0, "spent": {}}
    by_worker: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        by_worker[commit.worker].append(commit)
    ends, seconds, rows = (
        np.array([getattr(c, name) for c in commits], dtype=np.float64) for name in ("committed_at", "seconds", "rows")
    )
    of_each = [
        tuple(np.array([getattr(c, name) for c in own]) for name in ("committed_at", "seconds"))
        for own in by_worker.values()
    ]
    plots = [
        charts.throughput(ends, seconds, rows),
        charts.utilisation(list(by_worker), [e for e, _ in of_each], [s for _, s in of_each]),
    ]
    wall = wall_seconds(commits)
    workers = sorted((_cost(name, own, wall) for name, own in by_worker.items()), key=lambda w: -w["busy_seconds"])
    spent: dict[str, float] = defaultdict(float)
    for commit in commits:
        for what, part in commit.spent.items():
            spent[what] += part
    total = float(seconds.sum())
    shares = {what: part / total for what, part in sorted(spent.items(), key=lambda item: -item[1])} if total else {}
    return {
        "work_plots": plots,
        "workers": workers[:_MOST_WORKERS],
        "more_workers": max(0, len(workers) - _MOST_WORKERS),
        "spent": shares,
    }


def _cost(name: str, commits: list[Commit], wall: float) -> dict[str, Any]:
    busy, fields = sum(c.seconds for c in commits), sum(c.rows for c in commits)
    return {
        "name": name,
        "shards": len(commits),
        "fields": fields,
        "failed": sum(c.failed for c in commits),
        "busy_seconds": busy,
        "utilisation": min(1.0, busy / max(wall, 1e-9)),
        "fields_per_second": fields / max(busy, 1e-9),
        "seconds_per_field": busy / max(1, fields),
    }
