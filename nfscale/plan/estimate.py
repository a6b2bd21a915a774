"""What a job will cost and come to, from a few of its data: intervals, not promises.

The sample is drawn without replacement, so its mean and its quantiles are as uncertain as a bootstrap says, less the
part of the dataset that was seen (finite population correction, Cochran, "Sampling Techniques", 1977, section 2.6).
Costs are uncertain for a second reason, which no sample shows: the same steps take another time a minute later.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from nfscale.job import EncodeJob
from nfscale.plan.sample import FittedSample, fitted_sample
from nfscale.store import RunFolder, WeightsTable
from nfscale.store.schema import OK_STATUSES, STATUS

CONFIDENCE = 0.90
_MACHINE = 1.25
"""The same steps on the same shared machine took up to this factor more or less from one minute to the next: the sample
and the run do not see the same neighbours."""
_START_SECONDS = (5.0, 40.0)
"""Ray and MLflow start, the report is made: what a command takes beside planning, calibration and fits."""
_RESAMPLES = 2000
_QUANTILES = (5, 25, 50, 75, 95)


class Interval(NamedTuple):
    """With the most likely value between its ends."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """Of a whole job, with intervals of 90 % confidence."""

    name: str
    fingerprint: str
    data: int
    sampled: int
    """Data that were fitted."""
    device_hours: Interval
    """Of all workers together, in shards: reading, fitting, measuring and writing."""
    wall_seconds: Interval
    """Of the command, on `workers`: planning and calibration on one of them, start and report included."""
    workers: int
    quality_name: str
    quality: dict[int, Interval]
    """Percentiles of the quality over data: 5, 25, 50, 75, 95. Empty where every datum of the sample failed."""
    share_at_target: Interval | None
    """Of the data; None where the job has no target."""
    failed_share: Interval
    bytes: int
    """Of the table."""
    memory_bytes: int
    """Of a worker, resident."""
    batch: int
    """Fields that a worker fits together."""
    money: Interval | None
    """For a price per device-hour, where one was given."""

    @property
    def median_quality(self) -> Interval | None:
        return self.quality.get(50)

    def figures(self) -> dict[str, Any]:
        """For JSON: plain numbers, intervals as [low, high] beside their value."""
        figures: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, Interval):
                figures |= {name: value.value, f"{name}_interval": _ends(value)}
            elif name == "quality":
                figures["quality_percentiles"] = {f"p{p:02d}": interval.value for p, interval in value.items()}
            else:
                figures[name] = value
        median = self.median_quality
        figures["median_quality"] = median and median.value
        figures["median_quality_interval"] = median and _ends(median)
        return figures


def _ends(interval: Interval) -> list[float | None]:
    """For JSON, which knows no infinity: None where one datum of many says nothing of the others."""
    return [end if math.isfinite(end) else None for end in (interval.low, interval.high)]


def estimate(
    job: EncodeJob,
    *,
    seconds: float,
    workers: int,
    processes: int,
    seed: int,
    device: str = "cpu",
    price: float | None = None,
) -> Estimate:
    """Fit a sample of a job's data for about so many seconds, and reckon what all of it takes.

    Args:
        seconds: of wall time that the fits of the sample may take.
        workers: that the job is to have, each like a process of this machine.
        processes: that fit the sample at once: as many as the job will have workers on one machine, since they share
            its memory and its clock rate.
        seed: which data are drawn.
        price: of a device-hour.

    Raises:
        CallerError: if the dataset is empty or none of its first data can be read.
    """
    sample = fitted_sample(job, seconds=seconds, processes=processes, seed=seed, device=device)
    return reckoned(sample, job, workers=workers, seed=seed, price=price)


def reckoned(sample: FittedSample, job: EncodeJob, *, workers: int, seed: int, price: float | None = None) -> Estimate:
    """The estimate that a fitted sample gives."""
    plan, rows = sample.plan, sample.rows
    count, drawn = plan.data_count, len(rows)
    random = np.random.default_rng(seed)
    cost = _Resampled(drawn, count, random).of_mean(sample.worker_seconds())
    device_seconds = Interval(count * cost.low / _MACHINE, count * cost.value, count * cost.high * _MACHINE)
    ok = rows.filter(STATUS.isin(OK_STATUSES))
    qualities = ok["quality"].to_numpy()
    reached = np.array([steps is not None for steps in rows["steps_to_target"].to_pylist()], float)
    failed = np.full(drawn, 0.0)
    failed[: drawn - len(ok)] = 1.0
    quality = {}
    if len(qualities):
        among = _Resampled(len(qualities), max(len(qualities), round(count * len(qualities) / drawn)), random)
        quality = {percent: among.of_percentile(qualities, percent) for percent in _QUANTILES}
    hours = Interval(*(value / 3600 for value in device_seconds))
    return Estimate(
        name=job.name,
        fingerprint=plan.fingerprint,
        data=count,
        sampled=drawn,
        device_hours=hours,
        wall_seconds=_wall(device_seconds, sample, workers),
        workers=workers,
        quality_name=plan.quality_name,
        quality=quality,
        share_at_target=None if job.fit.target is None else _share(reached, count),
        failed_share=_share(failed, count),
        bytes=round(count * sum(commit.bytes for commit in sample.commits) / drawn),
        memory_bytes=sample.peak_bytes,
        batch=sample.slots,
        money=None if price is None else Interval(*(value * price for value in hours)),
    )


def actual(folder: RunFolder) -> dict[str, float]:
    """What a run has come to so far, under the names of `Estimate.figures`; of quality only what its rows say."""
    commits = folder.commits()
    quality = WeightsTable(folder).to_arrow(["status", "quality", "steps_to_target"])
    rows = len(quality)
    figures = {
        "data": rows,
        "device_hours": sum(commit.seconds for commit in commits) / 3600,
        "bytes": sum(commit.bytes for commit in commits),
    }
    if rows:
        ok = quality.filter(STATUS.isin(OK_STATUSES))
        figures["failed_share"] = 1 - len(ok) / rows
        figures["share_at_target"] = (rows - quality["steps_to_target"].null_count) / rows
        if len(ok):
            figures["median_quality"] = float(np.median(ok["quality"].to_numpy()))
    return figures


def _wall(device_seconds: Interval, sample: FittedSample, workers: int) -> Interval:
    """Fits are shared out, planning and calibration are not, and at the end workers wait for the last shard's."""
    alone = sample.plan_seconds + sample.calibration_seconds
    shards = len(sample.plan.shards())
    rounds = math.ceil(shards / workers) * workers / shards  # 3 equal shards on 2 workers take the time of 4
    shared = [value / workers for value in device_seconds]
    low, high = _START_SECONDS
    return Interval(
        shared[0] + alone / _MACHINE + low,
        shared[1] * (1 + rounds) / 2 + alone + (low + high) / 2,
        shared[2] * rounds + alone * _MACHINE + high,
    )


@dataclass(frozen=True)
class _Resampled:
    """Bootstrap of a sample without replacement out of a finite population."""

    drawn: int
    count: int
    random: np.random.Generator

    def of_mean(self, values: np.ndarray) -> Interval:
        """Of the mean of values [n], by resampled t statistics (Hall, 1988), which follow the skew that costs have."""
        mean = float(values.mean())
        if self.drawn < 2:
            return Interval(-math.inf, mean, math.inf)
        again = values[self._which(len(values))]
        spread, spreads = values.std(ddof=1), again.std(axis=-1, ddof=1)
        t = (again.mean(axis=-1) - mean)[spreads > 0] / spreads[spreads > 0]
        if not len(t):
            return Interval(mean, mean, mean)
        low, high = np.percentile(t, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        scale = spread * self._unseen
        return Interval(max(float(values.min()), mean - scale * float(high)), mean, mean - scale * float(low))

    def of_percentile(self, values: np.ndarray, percent: float) -> Interval:
        """Of a percentile of values [n], by the bootstrap; a little wider, as Student's t is, since n may be small."""
        found = float(np.percentile(values, percent))
        if self.drawn < 2:
            return Interval(-math.inf, found, math.inf)
        again = np.percentile(values[self._which(len(values))], percent, axis=-1)
        from scipy import stats  # half a second, of which most commands need nothing

        tail = (1 + CONFIDENCE) / 2
        # Resampling n values has a variance of (n - 1) / n of the sample's.
        scale = self._unseen * math.sqrt(self.drawn / (self.drawn - 1))
        scale *= float(stats.t.ppf(tail, self.drawn - 1)) / NormalDist().inv_cdf(tail)
        low, high = np.percentile(again - found, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        return Interval(found + scale * float(low), found, found + scale * float(high))

    def _which(self, count: int) -> np.ndarray:
        return self.random.integers(0, count, (_RESAMPLES, count))

    @property
    def _unseen(self) -> float:
        """What was seen of the whole is certain."""
        return math.sqrt(max(0.0, 1 - self.drawn / self.count))


def _share(hits: np.ndarray, count: int) -> Interval:
    """Of data for which something is so, by the sample's 0s and 1s (Wilson, 1927, with the population's correction)."""
    n, share, z = len(hits), float(hits.mean()), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    n_effective = n / max(1e-9, 1 - n / count) if n < count else math.inf
    if math.isinf(n_effective):
        return Interval(share, share, share)
    centre = (share + z * z / (2 * n_effective)) / (1 + z * z / n_effective)
    half = z / (1 + z * z / n_effective) * math.sqrt(share * (1 - share) / n_effective + (z / (2 * n_effective)) ** 2)
    return Interval(min(share, max(0.0, centre - half)), share, max(share, min(1.0, centre + half)))
