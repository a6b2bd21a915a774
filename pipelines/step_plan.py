"""Steps where they buy most, against one length for all: share at the target and device time, on photograph tiles.

    python -m pipelines.step_plan                          # ten minutes of one core
    python -m pipelines.step_plan --small --methods adam   # two

The job is `photos.yaml` with its target and its checks. Some tiles are fitted at five lengths of the schedule, as
`nfscale estimate --budget` does (`nfscale.plan.spend`); others, which the plans have not seen, are fitted with one
length for all, with a ladder of budgets, and with plans: for the steps that the one length took, and for the share of
the data that it brought to the target. A plan is followed by real fits: it was made by what it expects to take and to
reach, the figures are what it took and reached. Milliseconds are of the process, checks included.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nfscale
from nfscale.datasets import seeded_sample
from nfscale.difficulty import bits_at
from nfscale.fields import theta0_of
from nfscale.job import load_job
from nfscale.optim import ESGD, Adam, Schedule
from nfscale.plan.spend import Tried, allotted, cost_of_share, lengths_of
from nfscale.signals import Samples
from nfscale.track import log_folder

JOBS = Path(__file__).parent
JOB = load_job(JOBS / "photos.yaml")
CALIBRATION = 32
LADDERS = ((300, 600),)
"""First and last budgets."""


def target() -> float:
    """Of the job, in dB."""
    assert JOB.fit.target is not None, "the job has one"
    return JOB.fit.target


@dataclass(frozen=True)
class Data:
    """Tiles by what they are for, and what they are fitted with."""

    field: Any
    signal: Any
    calibration: list[tuple[str, Samples]]
    known: list[tuple[str, Samples]]
    unseen: list[tuple[str, Samples]]
    difficulty: dict[str, float]


def data_of(known: int, unseen: int) -> Data:
    """Different tiles for the calibration, for the model of difficulty, and for the comparison."""
    dataset = JOB.open_dataset()
    drawn = seeded_sample(dataset.ids, CALIBRATION + known + unseen, 3, "step plan")
    contents = [(dataset.ids[position], dataset.read(position).content) for position in drawn]
    signal = JOB.build_signal([content for _, content in contents[:8]])
    data = [(datum_id, signal.samples(content)) for datum_id, content in contents]
    bits = {dataset.ids[position]: value for position, value in bits_at(dataset, signal, drawn, target()).items()}
    first, last = CALIBRATION, CALIBRATION + known
    field = JOB.build_field(signal.dimensions, signal.channels)
    return Data(field, signal, data[:first], data[first:last], data[last:], bits)


@dataclass(frozen=True)
class Found:
    """Of some data, in the order of their ids."""

    reached: np.ndarray
    steps: np.ndarray
    qualities: np.ndarray
    milliseconds: float
    """Of the process, for a datum."""

    def row(self, name: str, beside: "Found | None" = None) -> str:
        ratio = "" if beside is None else f"{self.steps.mean() / beside.steps.mean():.2f}"
        return (
            f"| {name} | {self.reached.mean():.2f} | {self.steps.mean():.0f} | {self.milliseconds:.0f} | {ratio} | "
            f"{self.qualities.mean():.1f} | {np.percentile(self.qualities, 10):.1f} |"
        )


class Method:
    """An optimiser at its automatic rate, with what its fields share."""

    def __init__(self, name: str, data: Data) -> None:
        self._name, self._data, self._theta0 = name, data, theta0_of(data.field, JOB.seed)
        self._common = {"seed": JOB.seed, "samples": JOB.fit.samples}
        self._shared = None
        if name == "esgd":
            stop, optimizer = JOB.fit.stop(), self._optimizer(JOB.fit.max_steps)
            self._shared = nfscale.calibrate(
                data.field, data.signal, data.calibration, optimizer=optimizer, stop=stop, theta0=self._theta0,
                **self._common,
            )  # fmt: skip

    def _optimizer(self, length: int, first: int | None = None) -> Any:
        if self._name == "esgd":
            return ESGD(1.0, Schedule("cosine", length, ESGD.default_warmup, first))
        return Adam(JOB.learning_rate_of_adam(int(JOB.fit.samples)), Schedule("cosine", length, first_steps=first))

    def fitted(
        self,
        data: list[tuple[str, Samples]],
        length: int,
        first: int | None = None,
        plan: dict[str, int] | None = None,
    ) -> Found:
        """Fit data until they reach the target: with one length, with a ladder, or by a plan."""
        started = time.process_time()
        fits = nfscale.fit(
            self._data.field, self._data.signal, data, optimizer=self._optimizer(length, first), init=self._theta0,
            stop=nfscale.Stop(length, target=target(), check_every=JOB.fit.check_every), calibration=self._shared,
            step_plan=plan, **self._common,
        )  # fmt: skip
        done = sorted(fits, key=lambda one: one.id)
        spent = 1e3 * (time.process_time() - started) / len(done)
        return Found(
            np.array([one.steps_to_target is not None for one in done]),
            np.array([one.steps for one in done], float),
            np.array([one.quality for one in done]),
            spent,
        )


def difficulties(data: Data, part: list[tuple[str, Samples]]) -> np.ndarray:
    """Of these data, in the order of their ids."""
    return np.array([data.difficulty[datum_id] for datum_id, _ in sorted(part, key=lambda one: one[0])])


def compared(name: str, data: Data, fixed: Sequence[int]) -> Iterator[str]:
    """Rows of a table: one length, ladders, and plans for what each length took and reached."""
    method, lengths = Method(name, data), lengths_of(JOB)
    known = [method.fitted(data.known, length) for length in lengths]
    tried = Tried(
        lengths,
        difficulties(data, data.known),
        np.stack([found.reached for found in known]),
        np.stack([found.steps for found in known]),
    )
    ids = sorted(datum_id for datum_id, _ in data.unseen)
    chances, steps = tried.expected(difficulties(data, data.unseen))

    def planned(budget: float) -> Found:
        chosen = allotted(chances, steps, budget)
        plan = {datum_id: lengths[which] for datum_id, which in zip(ids, chosen.tolist(), strict=True)}
        return method.fitted(data.unseen, JOB.fit.max_steps, plan=plan)

    yield "| steps | share at the target | steps a datum | ms a datum | of the one length | mean dB | 10th percentile |"
    yield "|---" * 7 + "|"
    for first, last in LADDERS:
        yield method.fitted(data.unseen, last, first).row(f"ladder of {first}, {last}")
    for length in fixed:
        one = method.fitted(data.unseen, length)
        yield one.row(f"one of {length}")
        yield planned(one.steps.sum()).row("- plan for its steps", one)
        if one.reached.mean() <= chances.max(axis=0).mean():
            yield planned(cost_of_share(chances, steps, one.reached.mean())).row("- plan for its share", one)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=["esgd", "adam"], default=["esgd", "adam"])
    parser.add_argument("--known", type=int, default=64, help="tiles that the plans are made by")
    parser.add_argument("--unseen", type=int, default=128, help="tiles that are compared")
    parser.add_argument("--lengths", nargs="+", type=int, default=[300, 400, 600, 1000], help="of one schedule")
    parser.add_argument("--small", action="store_true", help="fewer tiles")
    parser.add_argument("--output", type=Path, default=Path("runs/step_plan"))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in a worker
    data = data_of(24, 24) if chosen.small else data_of(chosen.known, chosen.unseen)
    lines: list[str] = []
    for name in chosen.methods:
        lines += [
            "",
            f"{name}: {len(data.unseen)} tiles to {target():g} dB, plans made by {len(data.known)} others",
            "",
        ]
        print("\n".join(lines[-3:]))
        for line in compared(name, data, chosen.lengths):
            lines.append(line)
            print(line, flush=True)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "table.md").write_text("\n".join(lines[1:]) + "\n")
    if problem := log_folder(chosen.output, "step_plan", chosen.output.name, {"small": chosen.small}, {}):
        print(f"warning: MLflow does not have this: {problem}")


if __name__ == "__main__":
    main()
