"""The plots of a report and of a comparison, as parts of a page. Each is bounded: bins, quantiles, samples."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba

from nfscale.review.drawing import BLUE, INK, ORANGE, inline, new
from nfscale.store.history import Curves

BANDS = (5, 25, 50, 75, 95)
"""Percentiles that a plot of bands shows."""

_MOST_BINS = 60
_MOST_WORKERS = 40  # lanes that can still be read
_MOST_POINTS = 1500  # of a scatter: each is an element of the page
_TIME_BINS = 120
_FILLED = LinearSegmentedColormap.from_list("filled", [to_rgba(BLUE, 0), to_rgba(BLUE, 0.9)])
_QUANTILES = np.linspace(0, 100, 401)


def histogram(quality: np.ndarray, target: float | None, unit: str) -> str:
    """How many fields reached which quality, with the target marked."""
    figure, axes = new()
    low, high = _span(quality)
    axes.hist(quality.clip(low, high), bins=_bins(quality), range=(low, high), color=BLUE, alpha=0.85)
    for value, style in ((np.median(quality), "-"), (np.percentile(quality, 5), ":")):
        axes.axvline(value, color=INK, linestyle=style, linewidth=1)
    _mark_target(axes, target)
    axes.set_xlabel(f"quality [{unit}]  (line: median, dots: 5th percentile)")
    axes.set_ylabel("fields")
    return inline(figure, f"Histogram of quality in {unit}")


def ecdf(quality: np.ndarray, target: float | None, unit: str) -> str:
    """Which share of the fields has at most which quality."""
    figure, axes = new()
    low, high = _span(quality)
    axes.plot(np.percentile(quality, _QUANTILES), _QUANTILES, color=BLUE, linewidth=1.8)
    if target is not None:
        below = 100 * float((quality < target).mean())
        axes.axhline(below, color=ORANGE, linewidth=0.8, linestyle=":")
        place = (low, below)
        axes.annotate(f"{below:.1f} % below", place, (4, 2), textcoords="offset points", color=ORANGE, fontsize=9)
    _mark_target(axes, target)
    axes.set_xlim(low, high)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"quality [{unit}]")
    axes.set_ylabel("fields with at most that [%]")
    return inline(figure, f"Cumulative distribution of quality in {unit}")


def bands(curves: Curves, target: float | None, unit: str, along: str) -> str:
    """Quantiles of the best quality so far, `BANDS`, along steps or seconds."""
    figure, axes = new()
    places, p05, p25, p50, p75, p95 = curves
    axes.fill_between(places, p05, p95, color=BLUE, alpha=0.18, linewidth=0, label="5 to 95 %")
    axes.fill_between(places, p25, p75, color=BLUE, alpha=0.35, linewidth=0, label="25 to 75 %")
    axes.plot(places, p50, color=BLUE, linewidth=1.8, label="median")
    if target is not None:
        axes.axhline(target, color=ORANGE, linewidth=1.2, label=f"target {target:g}")
    axes.set_xlabel(along)
    axes.set_ylabel(f"best quality so far [{unit}]")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
    return inline(figure, f"Quantiles of quality in {unit} along {along}")


def steps_to_target(steps: np.ndarray, target: float) -> str:
    """At which check how many fields reached the target; `steps` of those that did."""
    figure, axes = new()
    checks, counts = np.unique(steps, return_counts=True)
    if len(checks) > _MOST_BINS:
        axes.hist(steps, bins=_MOST_BINS, color=BLUE, alpha=0.85)
    else:
        axes.bar(checks, counts, width=0.8 * float(np.diff(checks).min()) if len(checks) > 1 else 1, color=BLUE)
    axes.axvline(float(np.median(steps)), color=INK, linewidth=1)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"optimiser steps to {target:g}  (line: median)")
    axes.set_ylabel("fields")
    return inline(figure, "Distribution of the steps to the target")


def survival(steps: np.ndarray, fields: int, longest: float, target: float) -> str:
    """Which share of the fields has not reached the target after how many steps; `steps` of those that did."""
    figure, axes = new()
    checks, counts = np.unique(steps, return_counts=True)
    if len(checks) > len(_QUANTILES):
        checks = np.unique(np.percentile(steps, _QUANTILES, method="higher"))
        counts = np.diff(np.searchsorted(np.sort(steps), checks, side="right"), prepend=0)
    open_still = 100 * (1 - np.cumsum(counts) / max(1, fields))
    axes.step(
        [0, *checks, longest], [100, *open_still, open_still[-1] if len(checks) else 100], where="post", color=BLUE
    )
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(f"fields not yet at {target:g} [%]")
    return inline(figure, "Share of the fields that have not reached the target")


def difficulty(values: np.ndarray, quality: np.ndarray, name: str, unit: str) -> str:
    """Quality of a sample of data against a measure of how hard they are."""
    figure, axes = new()
    chosen = slice(None, None, -(-len(values) // _MOST_POINTS))
    axes.plot(values[chosen], quality[chosen], ".", color=BLUE, markersize=4, alpha=0.6, markeredgewidth=0)
    axes.set_xlabel(name)
    axes.set_ylabel(f"quality [{unit}]")
    return inline(figure, f"Quality in {unit} against {name}")


def groups(names: Sequence[str], quality: Sequence[np.ndarray], target: float | None, unit: str) -> str:
    """Quantiles of the quality of groups of data, a lane for each: 5 to 95 %, 25 to 75 %, median."""
    figure, axes = new(6.2, 0.7 + 0.24 * len(names))
    lanes = np.arange(len(names))
    p05, p25, p50, p75, p95 = np.array([np.percentile(values, BANDS) for values in quality]).T
    axes.hlines(lanes, p05, p95, color=BLUE, alpha=0.35, linewidth=3)
    axes.hlines(lanes, p25, p75, color=BLUE, alpha=0.8, linewidth=6)
    axes.plot(p50, lanes, "|", color=INK, markersize=10, markeredgewidth=2)
    axes.set_yticks(lanes, [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    _mark_target(axes, target, text=False)
    axes.set_xlabel(f"quality [{unit}]  (bars: 5 to 95 % and 25 to 75 %, line: median)")
    return inline(figure, f"Quality in {unit} by group")


def throughput(ends: np.ndarray, seconds: np.ndarray, rows: np.ndarray) -> str:
    """Fields per second over wall time; each shard counts evenly over the time it took."""
    figure, axes = new()
    edges, per_bin = _spread(ends, seconds, rows)
    scale, name = _time_unit(edges[-1])
    axes.fill_between(edges[:-1] / scale, per_bin / np.diff(edges), step="post", color=BLUE, alpha=0.4, linewidth=0)
    axes.step(edges[:-1] / scale, per_bin / np.diff(edges), where="post", color=BLUE, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"wall time [{name}]")
    axes.set_ylabel("fields per second, all workers")
    return inline(figure, "Fields per second over time")


def utilisation(workers: list[str], ends: Sequence[np.ndarray], seconds: Sequence[np.ndarray]) -> str:
    """When each worker worked on a shard: a lane each, the fuller the busier. The busiest `_MOST_WORKERS` of them."""
    shown = np.argsort([-s.sum() for s in seconds], kind="stable")[:_MOST_WORKERS]
    first = min((e - s).min() for e, s in zip(ends, seconds, strict=True))
    last = max(e.max() for e in ends)
    figure, axes = new(6.2, 0.9 + 0.2 * len(shown))
    busy = np.stack([_spread(ends[i], seconds[i], seconds[i], (first, last))[1] for i in shown])
    share = (busy / max((last - first) / _TIME_BINS, 1e-9)).clip(0, 1)
    scale, name = _time_unit(last - first)
    extent = (0, (last - first) / scale, len(shown), 0)
    axes.imshow(share, aspect="auto", cmap=_FILLED, vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axes.set_yticks(np.arange(len(shown)) + 0.5, [workers[i][-24:] for i in shown], fontsize=8)
    axes.set_xlabel(f"wall time [{name}]  (filled: at work on a shard, empty: idle)")
    return inline(figure, "When each worker worked")


def differences(values: np.ndarray, interval: tuple[float, float], unit: str) -> str:
    """How many data are better or worse by how much, and the interval of the mean."""
    figure, axes = new()
    low, high = _span(values)
    axes.hist(values.clip(low, high), bins=_bins(values), range=(low, high), color=BLUE, alpha=0.85)
    axes.axvline(0, color=INK, linewidth=1)
    axes.axvspan(*interval, color=ORANGE, alpha=0.35, linewidth=0)
    axes.axvline(float(values.mean()), color=ORANGE, linewidth=1.5)
    axes.set_xlim(low, high)
    axes.set_xlabel(f"difference in quality [{unit}]  (orange: mean and its interval)")
    axes.set_ylabel("data")
    return inline(figure, f"Differences in quality in {unit}")


def pairs(one: np.ndarray, other: np.ndarray, names: tuple[str, str], unit: str) -> str:
    """Quality of a sample of data in one run against that in another; on the line they are equal."""
    figure, axes = new(6.2, 4.6)
    chosen = slice(None, None, -(-len(one) // _MOST_POINTS))
    axes.plot(one[chosen], other[chosen], ".", color=BLUE, markersize=4, alpha=0.6, markeredgewidth=0)
    low, high = _span(np.concatenate([one, other]))
    axes.plot([low, high], [low, high], color=INK, linewidth=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel(f"{names[0]} [{unit}]")
    axes.set_ylabel(f"{names[1]} [{unit}]")
    return inline(figure, "Quality in one run against that in the other")


def _mark_target(axes, target: float | None, text: bool = True) -> None:
    if target is None:
        return
    axes.axvline(target, color=ORANGE, linewidth=1.5)
    if text:
        axes.annotate(
            f"target {target:g}",
            (target, 1),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=ORANGE,
            va="top",
            fontsize=9,
        )


def _span(values: np.ndarray) -> tuple[float, float]:
    """What an axis shows of some values: all but outliers, which would leave the rest in one bin."""
    low, middle_low, middle_high, high = np.percentile(values, [0, 1, 99, 100])
    reach = 0.5 * (middle_high - middle_low)
    low, high = max(low, middle_low - reach), min(high, middle_high + reach)
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _time_unit(seconds: float) -> tuple[float, str]:
    """In seconds, and its name, for an axis of this length."""
    if seconds < 180:
        return 1.0, "s"
    return (60.0, "min") if seconds < 10_800 else (3600.0, "h")


def _bins(values: np.ndarray) -> int:
    return min(_MOST_BINS, max(10, len(values) // 20))


def _spread(
    ends: np.ndarray, seconds: np.ndarray, amounts: np.ndarray, span: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Amounts spread evenly over the time each took: edges of the bins [B + 1] from 0 on, amount in each [B]."""
    first, last = span or (float((ends - seconds).min()), float(ends.max()))
    edges = np.linspace(0, max(last - first, 1e-3), _TIME_BINS + 1)
    begin, finish = ends - seconds - first, np.maximum(ends - first, ends - seconds - first + 1e-6)
    done = np.zeros(len(edges))
    for start in range(0, len(ends), 10_000):  # [shards, edges] at a time
        part = slice(start, start + 10_000)
        share = (edges - begin[part, None]) / (finish[part, None] - begin[part, None])
        done += (share.clip(0, 1) * amounts[part, None]).sum(axis=0)
    return edges, np.diff(done)
