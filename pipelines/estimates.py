"""Does `nfscale estimate` hold what it says? Each job is encoded once, and estimated from ten samples of its data.

    python -m pipelines.estimates                     # photos, speech and shapes, all of what their jobs encode
    python -m pipelines.estimates --small             # 200 tiles of photographs, five samples

For each job the share of samples whose interval of 90 % confidence holds the run's device-hours and its median
quality, and how wide the intervals are. Encodes and estimates alternate, since neighbours on a machine come and go: the
run is compared as it took place, not as the machine was at its best.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from nfscale.job import EncodeJob, load_job
from nfscale.plan import Estimate, actual, estimate
from nfscale.store import RunFolder

PIPELINES = Path(__file__).parent
WORKERS = 2
SECONDS = {"photos": 10.0, "speech": 15.0, "shapes": 60.0}
"""Of fits, for a sample: about an eighth to a third of the data."""


def compared(name: str, samples: int, seconds: float, overrides: list[str]) -> None:
    """Encode a job, estimate it from so many samples, and print a line for each and one for all."""
    with tempfile.TemporaryDirectory() as temporary:
        keys = [f"output={temporary}/run", f"workers={WORKERS}", "track.enabled=false", *overrides]
        file = PIPELINES / f"{name}.yaml"
        job = load_job(file, keys)
        before = [_estimated(job, seconds, seed) for seed in range(samples // 2)]
        subprocess.run([sys.executable, "-m", "nfscale", "encode", str(file), *keys], check=True, capture_output=True)
        found = actual(RunFolder(f"{temporary}/run"))
        all_of_them = before + [_estimated(job, seconds, seed) for seed in range(samples // 2, samples)]
    hours, quality = found["device_hours"], found["median_quality"]
    print(f"\n{name}: {found['data']:,.0f} data took {3600 * hours:.1f} s of device, median quality {quality:.3f}")
    print(f"{'sampled':>8s} {'device s':>9s} {'interval':>17s} {'median':>8s} {'interval':>17s}")
    cost_hits, quality_hits, factors, widths = 0, 0, [], []
    for one in all_of_them:
        cost, median = one.device_hours, one.median_quality
        assert median is not None
        cost_hits += cost.low <= hours <= cost.high
        quality_hits += median.low <= quality <= median.high
        factors.append(cost.high / cost.low)
        widths.append(median.high - median.low)
        low, value, high = (3600 * end for end in cost)
        ends = f"{median.low:.3f} to {median.high:.3f}"
        print(f"{one.sampled:8d} {value:9.1f} {f'{low:.1f} to {high:.1f}':>17s} {median.value:8.3f} {ends:>17s}")
    print(
        f"{name}: the interval holds the cost in {cost_hits} of {samples}, the median quality in {quality_hits}; "
        f"at most a factor {max(factors):.2f} (median {statistics.median(factors):.2f}) and {max(widths):.3f} "
        f"(median {statistics.median(widths):.3f}) wide",
        flush=True,
    )


def _estimated(job: EncodeJob, seconds: float, seed: int) -> Estimate:
    return estimate(job, seconds=seconds, workers=WORKERS, processes=WORKERS, seed=seed)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", nargs="*", default=list(SECONDS), help="of: photos, speech, shapes")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--samples", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.small:
        compared("photos", 5, 3.0, ["dataset.limit=200"])
        return
    for name in arguments.jobs:
        compared(name, arguments.samples, SECONDS[name], [])


if __name__ == "__main__":
    main()
