"""Data that are cut into blocks: do seams show, and what memory does it take?

    python -m pipelines.tiles photo          # or sound, head: about 5 minutes each on two cores

Encodes one datum by the commands that a user types, decodes it whole, and compares what blocks that fade into each
other say with what they say where one is switched to the next, in the middle of what they share. By axis: how much the
error steps from cell to cell where blocks meet, as a share of the range, and over how much it does elsewhere (1: no
seam); and the same of the error's mean over an eighth of a block before and after that (patches). Memory is that of all
processes together at its highest, shared pages shared out.
"""

import argparse
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from nfscale.run import OpenRun
from nfscale.signals.tiles import Cut
from nfscale.store import RunFolder, open_weights

JOBS = {
    "photo": ("photos_whole", "Wood", ".png"),
    "sound": ("speech_whole", "demo-instruct", ".wav"),
    "head": ("brain_whole", "t1", ".nii.gz"),
}
"""Job file, the datum that is decoded, and to what."""

_SAMPLE_SECONDS = 0.2
_FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=JOBS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/tiles"))
    parser.add_argument("--id", help="the datum that is decoded")
    parser.add_argument("overrides", nargs="*", help="of the job, as section.key=value")
    options = parser.parse_intermixed_args(arguments)
    name, datum_id, suffix = JOBS[options.what]
    datum_id = options.id or datum_id
    run = options.output / options.what
    keys = [f"output={run}", f"workers={options.workers}", "track.enabled=false", *options.overrides]
    encoded = watched(["encode", str(_FOLDER / f"{name}.yaml"), *keys])
    decoded = watched(["decode", str(run), "--id", datum_id, "-o", str(options.output / (options.what + suffix))])
    lines = [
        f"{datum_id}: encoded in {encoded}, decoded in {decoded}",
        "",
        "| blocks meet | whole, dB | steps: of the range, over elsewhere | of means: likewise |",
        "|---|---|---|---|",
        *_rows(str(run), datum_id),
    ]
    (options.output / f"{options.what}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@dataclass(frozen=True)
class Spent:
    """What a command took."""

    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s and {self.peak_bytes / 2**20:,.0f} MiB"


def watched(arguments: list[str]) -> Spent:
    """Run `nfscale` and look at the memory of its processes until it ends.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    started, peak, ended = time.perf_counter(), 0, threading.Event()
    with subprocess.Popen([sys.executable, "-m", "nfscale", *arguments]) as process:

        def watch() -> None:
            nonlocal peak
            while not ended.wait(_SAMPLE_SECONDS):
                peak = max(peak, sum(map(_bytes_of, _family(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
    if code:
        raise subprocess.CalledProcessError(code, arguments)
    return Spent(time.perf_counter() - started, peak)


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(after_name[1]), []).append(int(status.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _bytes_of(pid: int) -> int:
    """Resident memory of a process, of shared pages its part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _rows(run: str, datum_id: str) -> list[str]:
    """Blocks that fade, and blocks that are switched."""
    table, job = open_weights(run), OpenRun(RunFolder(run)).job
    signal: Any = table.signal
    data = job.open_dataset()
    original = signal.original(data.read(list(data.ids).index(datum_id)).content)
    assert job.tile is not None
    cuts = job.tile.cuts(signal.grid_of(original), signal.cells_per_unit(original))
    fades = Cut.fades
    rows = []
    for how in ("fading", "switched"):
        with patch.object(Cut, "fades", fades if how == "fading" else _switched(fades)):
            rebuilt = table.decode([datum_id])[0]
        error = array_of(rebuilt) - array_of(original)
        error /= float(np.ptp(array_of(original)))
        found = ([f"{share:.5f} ({ratio:.2f})" for share, ratio in of(error, cuts)] for of in (seam_steps, patch_steps))
        seams, patches = map(", ".join, found)
        rows.append(f"| {how} | {signal.whole_quality(original, rebuilt):.2f} | {seams} | {patches} |")
    return rows


def _switched(fades: Any) -> Any:
    return lambda cut: [(middle, 0.0) for middle, _ in fades(cut)]


def array_of(content: Any) -> np.ndarray:
    """Values by cell, the channels last."""
    return content if isinstance(content, np.ndarray) else content.values


def seam_steps(error: np.ndarray, cuts: tuple[Cut, ...]) -> list[tuple[float, float]]:
    """Along each axis: root mean square of the error's steps from cell to cell where blocks meet; over all others'."""
    found = []
    for axis, cut in enumerate(cuts):
        at = [round(middle) - 1 for middle, _ in cut.fades()]
        found.append(_ratio(np.diff(error, axis=axis), axis, at, []))
    return found


def patch_steps(error: np.ndarray, cuts: tuple[Cut, ...]) -> list[tuple[float, float]]:
    """As `seam_steps`, of means over an eighth of a block along every axis, as far apart as blocks fade."""
    found = []
    for axis, cut in enumerate(cuts):
        means = error
        for other, one in enumerate(cuts):
            means = _running_means(means, other, max(1, one.size // 8))
        length = max(1, cut.size // 8)
        apart = length + round(max((width for _, width in cut.fades()), default=0.0))
        steps = np.take(means, range(apart, means.shape[axis]), axis) - np.take(
            means, range(means.shape[axis] - apart), axis
        )
        at = [round(middle - (apart + length) / 2) for middle, _ in cut.fades()]
        near = [place + shift for place in at for shift in range(-apart // 2 - length, apart // 2 + length + 1)]
        found.append(_ratio(steps, axis, at, near))
    return found


def _running_means(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Means of `length` neighbours along an axis, which gets shorter by one less than that."""
    sums = np.cumsum(np.insert(values.astype(np.float64), 0, 0, axis=axis), axis=axis)
    count = sums.shape[axis]
    return (np.take(sums, range(length, count), axis) - np.take(sums, range(count - length), axis)) / length


def _ratio(values: np.ndarray, axis: int, at: list[int], near: list[int]) -> tuple[float, float]:
    """Root mean square at some places of an axis, and over that at all that are neither there nor near."""
    squares = np.square(values.astype(np.float64)).mean(axis=tuple(set(range(values.ndim)) - {axis}))
    chosen, others = np.zeros(len(squares), bool), np.ones(len(squares), bool)
    chosen[[place for place in at if 0 <= place < len(squares)]] = True
    others[[place for place in [*at, *near] if 0 <= place < len(squares)]] = False
    if not chosen.any() or not others.any():
        return 0.0, 1.0
    there, elsewhere = (float(np.sqrt(squares[places].mean())) for places in (chosen, others))
    return there, there / elsewhere


if __name__ == "__main__":
    main()
