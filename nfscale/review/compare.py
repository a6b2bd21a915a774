"""Is this run better than that one? Two runs paired datum by datum, by their ids.

A difference of means is uncertain for two reasons, and which of them counts depends on the jobs:

- The data are a sample. Differences of pairs vary from datum to datum; their mean has an interval by the paired t
  distribution (Student, 1908). It is what holds where the runs share a seed, whose theta0 and calibration then
  favour both alike, and where each field starts from a theta0 of its own (`field.init=per_datum`).
- So is the seed. Fields that share one theta0 share its luck, which no number of data averages out: seeds of one job
  differ by tenths of a decibel in the mean. Where two jobs differ in nothing but the seed, all that is seen is that
  luck: a t interval over the runs, with one degree of freedom, which two equals cannot leave.

Where the jobs differ in the seed and in more, the interval over the data is reported, with a warning.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nfscale.errors import CallerError
from nfscale.review import charts
from nfscale.review.page import rendered
from nfscale.review.sections import unit_of
from nfscale.store.history import SAMPLED_FIELDS
from nfscale.store.run_folder import RunFolder, differing_keys
from nfscale.store.table import WeightsTable

CONFIDENCE = 0.95

_arrow: Any = pc  # its functions are made when it is imported, where types are not seen
_MOST_WORSE = 20
_NOTICED = 0.1  # of the unit of a quality in dB; of others a hundredth of it: less is no difference of a datum
_SEED_KEYS = {"seed"}


@dataclass(frozen=True)
class Comparison:
    """What one run is against another, over the data that both have fitted. Positive: the other is better."""

    one: str
    other: str
    quality_name: str
    differing: list[str]
    """Keys of the jobs, with both values."""
    pairs: int
    only_one: int
    """Data that this run alone has fitted."""
    only_other: int
    mean_difference: float
    """Of quality, other - one."""
    interval: tuple[float, float]
    """Of the mean difference, at `CONFIDENCE`."""
    interval_over: str
    """`data` or `seeds`, see this module."""
    interval_over_data: tuple[float, float]
    median_difference: float
    better: int
    """Data whose quality is higher in the other run by more than rounding shows."""
    worse: int
    worst: list[dict[str, Any]]
    """Who got worse: id, quality in one, in the other, difference; the worst first."""
    cost: dict[str, Any] | None
    """Steps and seconds that a datum needs to an equal quality, see `_cost`; None where no history tells."""
    notes: list[str]

    @property
    def is_different(self) -> bool:
        """Whether the interval leaves 0 out."""
        return not self.interval[0] <= 0 <= self.interval[1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "interval": list(self.interval),
            "confidence": CONFIDENCE,
            "different": self.is_different,
        }


@dataclass(frozen=True)
class Paired:
    """The data that both runs have fitted."""

    ids: pa.Array
    one: np.ndarray
    """Quality: float64 [pairs]."""
    other: np.ndarray

    @property
    def differences(self) -> np.ndarray:
        return self.other - self.one


def compare_runs(one: RunFolder, other: RunFolder) -> tuple[Comparison, Paired]:
    """Compare two runs of the same data.

    Raises:
        CallerError: if their qualities are measured in other units, or fewer than two data are in both.
    """
    tables = WeightsTable(one), WeightsTable(other)
    names = [table.plan.quality_name for table in tables]
    if names[0] != names[1]:
        raise CallerError(f"{one} has {names[0]} and {other} has {names[1]}: such qualities cannot be compared")
    ids, qualities, counts = _qualities(*tables)
    paired = Paired(ids, *qualities)
    if len(ids) < 2:
        raise CallerError(
            f"{one} and {other} have {len(ids)} fitted data in common, by their ids; at least 2 are needed"
        )
    differences = paired.differences
    over_data = _t_interval(float(differences.mean()), _standard_error(differences), len(differences) - 1)
    differing = differing_keys(tables[0].plan.job, tables[1].plan.job)
    interval, over, notes = _interval(tables, set(differing), float(differences.mean()), over_data)
    noticed = _NOTICED if names[0].endswith("_db") else _NOTICED / 100
    order = np.argsort(differences, kind="stable")[:_MOST_WORSE]
    worst = [
        {
            "datum_id": ids[int(place)].as_py(),
            "one": float(paired.one[place]),
            "other": float(paired.other[place]),
            "difference": float(differences[place]),
        }
        for place in order
        if differences[place] < -noticed
    ]
    comparison = Comparison(
        one=str(one),
        other=str(other),
        quality_name=names[0],
        differing=[f"{key}: {a!r} and {b!r}" for key, (a, b) in differing.items()],
        pairs=len(ids),
        only_one=counts[0] - len(ids),
        only_other=counts[1] - len(ids),
        mean_difference=float(differences.mean()),
        interval=interval,
        interval_over=over,
        interval_over_data=over_data,
        median_difference=float(np.median(differences)),
        better=int((differences > noticed).sum()),
        worse=int((differences < -noticed).sum()),
        worst=worst,
        cost=_cost(*tables, ids),
        notes=notes,
    )
    return comparison, paired


# --- pairs


def _qualities(
    one: WeightsTable, other: WeightsTable
) -> tuple[pa.Array, tuple[np.ndarray, np.ndarray], tuple[int, int]]:
    """Ids that both have a quality of, in the order of the first; qualities [pairs] of both; how many each has."""
    tables = [_column(table, ["datum_id", "quality"]) for table in (one, other)]
    fitted = [table.filter(_arrow.is_finite(table["quality"])) for table in tables]
    places = _arrow.index_in(fitted[0]["datum_id"], value_set=fitted[1]["datum_id"].combine_chunks())
    common = fitted[0].filter(_arrow.is_valid(places))
    qualities = (
        common["quality"].to_numpy().astype(np.float64),
        fitted[1]["quality"].take(places.drop_null()).to_numpy().astype(np.float64),
    )
    return common["datum_id"].combine_chunks(), qualities, (len(fitted[0]), len(fitted[1]))


def _column(table: WeightsTable, columns: list[str]) -> pa.Table:
    schema = table.schema.empty_table().select(columns).schema
    parts = [pq.read_table(table.file_of(commit), columns=columns).cast(schema) for commit in table.commits]
    return pa.concat_tables([schema.empty_table(), *parts])


# --- how sure


def _interval(
    tables: tuple[WeightsTable, WeightsTable], differing: set[str], mean: float, over_data: tuple[float, float]
) -> tuple[tuple[float, float], str, list[str]]:
    """The interval of the mean difference, what it is over, and what a reader has to know."""
    shared = any(table.theta0 is not None for table in tables)
    if not shared or not differing & _SEED_KEYS:
        return over_data, "data", []
    if differing <= _SEED_KEYS:
        note = (
            "The jobs differ in the seed alone, and the fields of each share one theta0: what differs is the luck of "
            f"that draw, so the interval is over seeds. Of these two runs, whatever others may give, the mean over "
            f"the data differs by {mean:+.3f} ({over_data[0]:+.3f} to {over_data[1]:+.3f})."
        )
        return _t_interval(mean, abs(mean), 1), "seeds", [note]
    note = (
        "The seeds differ too, and the fields of a run share the luck of one theta0, which this interval over data "
        "does not hold; run both with the same seed."
    )
    return over_data, "data", [note]


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _t_interval(mean: float, standard_error: float, freedom: int) -> tuple[float, float]:
    """Student's interval of a mean at `CONFIDENCE`."""
    from scipy.stats import t

    reach = float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * standard_error
    return mean - reach, mean + reach


# --- what equal quality costs


def _cost(one: WeightsTable, other: WeightsTable, ids: pa.Array) -> dict[str, Any] | None:
    """Steps and seconds of a datum until it has the best quality that both runs reach, of a sample of pairs.

    The seconds are those of the field's share of its worker. Costs of a pair are compared as a ratio, other / one,
    and averaged as logarithms: `steps_ratio` 0.5 says that the other needs half the steps.
    """
    stride = -(-len(ids) // SAMPLED_FIELDS)
    chosen = ids.take(np.arange(0, len(ids), stride))
    costs = [_to_quality(*pair) for pair in zip(_histories(one, chosen), _histories(other, chosen), strict=True)]
    steps = np.array([found[:2] for found in costs if found is not None])
    seconds = np.array([found[2:] for found in costs if found is not None and min(found[2:]) > 0])
    if len(steps) < 2:
        return None
    cost: dict[str, Any] = {"pairs": len(steps), "steps_one": float(steps[:, 0].mean())}
    cost |= {"steps_other": float(steps[:, 1].mean())} | _ratio("steps", steps)
    if len(seconds) > 1:
        cost |= {"seconds_one": float(seconds[:, 0].mean()), "seconds_other": float(seconds[:, 1].mean())}
        cost |= _ratio("seconds", seconds)
    return cost


def _ratio(name: str, costs: np.ndarray) -> dict[str, Any]:
    logarithms = np.log(costs[:, 1] / costs[:, 0])
    mean, error = float(logarithms.mean()), _standard_error(logarithms)
    interval = np.exp(_t_interval(mean, error, len(logarithms) - 1)).tolist()
    return {f"{name}_ratio": float(np.exp(mean)), f"{name}_ratio_interval": interval}


def _histories(table: WeightsTable, ids: pa.Array) -> list[dict[str, Any]]:
    """Histories of these data, in their order."""
    columns = ["datum_id", "history_step", "history_quality", "steps", "wall_seconds"]
    parts = []
    for commit in table.commits:
        part = pq.read_table(table.file_of(commit), columns=columns)
        parts.append(part.filter(_arrow.is_in(part["datum_id"], value_set=ids)))
    rows = pa.concat_tables([part.cast(parts[0].schema) for part in parts])
    return rows.take(_arrow.index_in(ids, value_set=rows["datum_id"].combine_chunks())).to_pylist()


def _to_quality(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """(steps, steps, seconds, seconds) of the two until the lower of their best qualities; None without steps."""
    if not one["history_step"] or not other["history_step"]:
        return None
    best = [np.fmax.accumulate(np.asarray(row["history_quality"], dtype=np.float64)) for row in (one, other)]
    level = min(curve[-1] for curve in best)
    steps = [_first_at(row["history_step"], curve, level) for row, curve in zip((one, other), best, strict=True)]
    if not min(steps) > 0:
        return None
    seconds = [
        at * (row["wall_seconds"] or 0.0) / (row["steps"] or 1) for at, row in zip(steps, (one, other), strict=True)
    ]
    return steps[0], steps[1], seconds[0], seconds[1]


def _first_at(steps: list[int], best: np.ndarray, level: float) -> float:
    """The step at which a curve that never falls reaches a level, between two checks on a straight line."""
    place = int(np.searchsorted(best, level, side="left"))
    if place == 0 or place >= len(best):
        return float(steps[min(place, len(steps) - 1)])
    share = (level - best[place - 1]) / (best[place] - best[place - 1])
    return float(steps[place - 1] + share * (steps[place] - steps[place - 1]))


# --- in words, and as a page


def words_of(comparison: Comparison) -> str:
    """What a person wants to know first."""
    name, c = comparison.quality_name, comparison
    unit = " dB" if name.endswith("_db") else f" {name}"
    if not c.is_different:
        verdict = f"no difference at {CONFIDENCE:.0%}"
    else:
        verdict = f"{c.other} is {'better' if c.mean_difference > 0 else 'worse'}"
    text = (
        f"{verdict}: mean difference {c.mean_difference:+.3f}{unit} ({c.interval[0]:+.3f} to {c.interval[1]:+.3f}, "
        f"over {c.interval_over}) of {c.pairs:,} pairs; {c.better:,} better, {c.worse:,} worse."
    )
    if c.cost:
        low, high = c.cost["steps_ratio_interval"]
        text += f" To equal quality it takes {c.cost['steps_ratio']:.2f} times the steps ({low:.2f} to {high:.2f})"
        if "seconds_ratio" in c.cost:
            text += f" and {c.cost['seconds_ratio']:.2f} times the seconds"
        text += "."
    return text


def comparison_page(found: list[tuple[Comparison, Paired]]) -> str:
    """Several comparisons with one run as HTML that needs nothing else."""
    unit = unit_of(found[0][0].quality_name)
    shown = [
        {
            "comparison": comparison,
            "words": words_of(comparison),
            "histogram": charts.differences(paired.differences, comparison.interval, unit),
            "scatter": charts.pairs(paired.one, paired.other, (comparison.one, comparison.other), unit),
        }
        for comparison, paired in found
    ]
    context = {"comparisons": shown, "baseline": found[0][0].one, "unit": unit, "confidence": f"{100 * CONFIDENCE:g}"}
    return rendered("compare.html.j2", found[0][0].quality_name, context)
