"""A run as a worker sees it: the plan and what is built from it, its calibration, its data made ready for a fit."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfscale.datasets import Dataset, Datum
from nfscale.datasets.base import ids_digest
from nfscale.engine import (
    Calibration,
    Check,
    Fitted,
    Snapshot,
    Stop,
    calibrate,
    fit_and_checks,
)
from nfscale.engine.dispatch import StepName, chosen
from nfscale.engine.sampling import DRAWN_IN_FULL
from nfscale.engine.staging import Staged
from nfscale.errors import EncodeError
from nfscale.fields import Field
from nfscale.job import EncodeJob
from nfscale.media import MEDIA, Medium
from nfscale.optim import Optimizer, Scaled, Solver
from nfscale.signals import SIGNALS, Kind, Samples, Signal
from nfscale.signals.base import Apply
from nfscale.store.run_folder import RunFolder
from nfscale.store.table import built


class OpenRun:
    """A run folder opened for work: the plan, and what is built from it, each once per process."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.plan = folder.plan()
        self.job = EncodeJob.model_validate(self.plan.job)
        self.signal: Signal = built(SIGNALS, self.plan.forward["signal"])
        self.field: Field = self.job.build_field(self.signal.dimensions, self.signal.channels)
        optimizer: Any = self.job.build_optimizer(self.plan.samples_per_step)
        if self.plan.factors is not None:
            optimizer = Scaled(optimizer, torch.from_numpy(self.plan.factors))
        self.optimizer: Optimizer | Solver = optimizer
        self._capacities: dict[Kind, int] = {}
        self.committed_at: float | None = None
        """When this process last had rows ready to be committed, by `time.perf_counter`."""
        if self.field.layout != self.plan.layout:
            raise EncodeError("the field of this nfscale has another layout than the run's; use the run's version")

    @cached_property
    def apply(self) -> Callable[[Field, Tensor], Apply]:
        """The fastest evaluation of fields in this process, equal to `plain_apply` but for rounding."""
        step: StepName = "plain" if self.job.fit.step == "plain" else "auto"  # the fit's own may be of a GPU
        return chosen(step, torch.device("cpu"), self.field, self.signal, self.optimizer).apply

    @property
    def medium(self) -> Medium:
        """How the data of this run are read, written and shown."""
        return MEDIA[self.job.signal.kind]

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, with the ids that the plan was made for.

        Raises:
            EncodeError: if they are others by now.
        """
        data, blocks = self.job.open_dataset(), self.plan.blocks
        if ids_digest(data.ids) != self.plan.ids_sha256:
            then = self.plan.data_count if blocks is None else sum(times for times, _ in blocks)
            raise EncodeError(
                f"the dataset has other ids than when the run was planned ({len(data.ids)} data now, "
                f"{then} then); data were added, removed or renamed: restore them, or use a new output"
            )
        return self.job.blocks_of(data, blocks)

    @property
    def theta0(self) -> Tensor | None:
        return None if self.plan.theta0 is None else torch.from_numpy(self.plan.theta0)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the fields share, as the run's first lease stored it."""
        if not self.job.needs_calibration:
            return None
        _, step_rms, diagonal = self.folder.calibration()
        every = self.job.optimizer.update_every
        return Calibration(torch.from_numpy(diagonal.copy()), torch.from_numpy(step_rms.copy()), every)

    @cached_property
    def steps(self) -> dict[str, int] | None:
        """The job's step plan, if it has one."""
        return None if self.job.fit.step_plan is None else self.folder.steps()

    def fits(
        self, data: Iterator[tuple[str, Samples | Staged]], *, stop: Stop | None = None, resume: Snapshot | None = None
    ) -> Iterator[Fitted | Check]:
        """Fit data as the job says, but for where to `stop`, if that is given; see `fit_and_checks`."""
        job, theta0 = self.job, self.theta0
        return fit_and_checks(
            self.field,
            self.signal,
            data,
            optimizer=self.optimizer,
            stop=stop or job.fit.stop(),
            seed=job.seed,
            init="per_datum" if theta0 is None else theta0,
            samples=job.fit.samples,
            sampling=job.fit.sampling,
            calibration=self.calibration,
            batch=job.fit.batch,
            step=job.fit.step,
            precision=job.fit.precision,
            clock=time.perf_counter,
            resume=resume,
            step_plan=self.steps,
            capacities=self._capacities,
        )


def calibrate_run(run: OpenRun, positions: Sequence[int] | None = None, threads: int = 1) -> None:
    """Estimate what the fields share and store it, put-if-absent: the first lease of a run.

    Args:
        positions: of the data to try, in place of all that the plan has drawn.
        threads: as in `calibrate`.

    Raises:
        EncodeError: if too few data of the calibration sample can be read.
    """
    calibration = calibrate(
        run.field,
        run.signal,
        _calibration_samples(run, run.plan.calibration_positions if positions is None else positions),
        optimizer=run.optimizer,  # type: ignore[arg-type] (the job refuses other kinds)
        stop=run.job.fit.stop(),
        seed=run.job.seed,
        theta0=run.theta0,
        samples=run.job.fit.samples,
        sampling=run.job.fit.sampling,
        step=run.job.fit.step,
        precision=run.job.fit.precision,
        threads=threads,
    ).to("cpu")
    steps = [row * calibration.every for row in range(len(calibration.diagonal))]
    if not bool(torch.isfinite(calibration.diagonal).all()):
        raise EncodeError(
            "the calibration diverged, so the fields would have no curvature to share; "
            "use a smaller optimizer.learning_rate, or optimizer.kind=adam"
        )
    run.folder.write_calibration(steps, calibration.step_rms.numpy(), calibration.diagonal.numpy())


def _calibration_samples(run: OpenRun, positions: Sequence[int]) -> list[tuple[str, Samples]]:
    """Of the calibration; see `samples_of_one_kind`."""
    wanted = run.job.optimizer.calibration_data
    data = samples_of_one_kind(run.dataset, run.signal, positions, wanted, run.job.fit.samples == "full")
    if not data:
        raise EncodeError("none of the data drawn for the calibration can be read; see `nfscale status` after a fit")
    return data


def samples_of_one_kind(
    dataset: Dataset, signal: Signal, positions: Sequence[int], wanted: int, in_full: bool
) -> list[tuple[str, Samples]]:
    """The first `wanted` readable data of one kind at these positions, or all of the commonest kind."""
    by_kind: dict[Kind, list[tuple[str, Samples]]] = {}
    for position in positions:
        datum = dataset.read(position)
        prepared = prepared_of(signal, datum, in_full)
        if isinstance(prepared, Samples):
            prepared = replace(prepared, heldout=None)
            group = by_kind.setdefault(prepared.kind, [])
            group.append((datum.id, prepared))
            if len(group) == wanted:
                return group
    return max(by_kind.values(), key=len, default=[])


def prepared_of(signal: Signal, datum: Datum, in_full: bool) -> Samples | str:
    """A datum's samples, or the reason why it has none.

    Args:
        in_full: every step takes all of them.
    """
    if datum.content is None:
        return datum.error or "unreadable"
    try:
        samples = signal.samples(datum.content)
        return f"fit.{DRAWN_IN_FULL}" if in_full and samples.source is not None else samples
    except ValueError as error:
        return str(error)
    except MemoryError:
        return f"{_described(datum.content)} does not fit into the worker's memory"


def _described(content: Any) -> str:
    return f"an array of shape {list(content.shape)}" if isinstance(content, np.ndarray) else "the datum"
