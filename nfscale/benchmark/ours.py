"""nfscale's own steps on a problem: batches as `nfscale.fit` makes them, without its looks at the fields."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nfscale.benchmark.workloads import Problem
from nfscale.engine import Calibration
from nfscale.engine.batch import MINIMUM_SLOTS, Batch, Slot
from nfscale.engine.dispatch import PrecisionName, Step, StepName, chosen
from nfscale.engine.handwritten import handwritten_steps
from nfscale.engine.memory import batch_slots, measured_field_bytes
from nfscale.optim import Adam, Optimizer, Schedule


def constant_adam(learning_rate: float) -> Any:
    """What torch.optim.Adam does."""
    return Adam(learning_rate, Schedule("constant"))


class Ours:
    """The fields of a problem in as many batches as their memory asks for."""

    def __init__(
        self,
        problem: Problem,
        step: StepName | Step = "auto",
        optimizer: Optimizer | None = None,
        calibration: Calibration | None = None,
        precision: PrecisionName = "auto",
    ) -> None:
        self._problem, self._calibration = problem, calibration
        self._optimizer = constant_adam(problem.learning_rate) if optimizer is None else optimizer
        device = problem.rows.device
        if not isinstance(step, Step):
            step = chosen(step, device, problem.field, problem.signal, self._optimizer, precision)
        self._taken = step
        self.step_name = self._taken.name
        fields = len(problem.rows)
        needed = measured_field_bytes(lambda slots: self._batch([0] * slots), device)
        slots = fields if needed is None else batch_slots(needed, device)
        self._batches = [
            self._batch(list(range(start, min(start + slots, fields)))) for start in range(0, fields, slots)
        ]

    def _batch(self, fields: list[int]) -> Batch:
        problem, idle = self._problem, max(0, MINIMUM_SLOTS - len(fields))
        within = fields + fields[:1] * idle
        part: slice | list[int] = slice(fields[0], fields[-1] + 1)
        if within != list(range(part.start, part.stop)):
            part = within
        slots: list[Slot | None] = [Slot(str(field), int(problem.seeds[field])) for field in fields]
        return Batch(
            problem.field,
            problem.signal,
            self._optimizer,
            problem.sampler,
            self._calibration,
            rows=problem.rows[part].clone(),
            samples=problem.samples.map(lambda tensor: tensor[part]),
            seeds=problem.seeds[part].clone(),
            slots=slots + [None] * idle,
            step=self._taken,
        )

    def advance(self, count: int) -> None:
        for batch in self._batches:
            batch.advance(count)

    def rows(self) -> Tensor:
        return torch.cat([batch.rows[batch.occupied] for batch in self._batches])


def launched(problem: Problem) -> Ours:
    """The step of torch on a GPU whose kernels are launched one by one, also where it would replay a record of them."""
    optimizer = constant_adam(problem.learning_rate)
    step = chosen("torch", problem.rows.device, problem.field, problem.signal, optimizer)
    return Ours(problem, replace(step, advance=handwritten_steps))


def one_by_one(step: Step) -> Step:
    """The same step without the call that takes all steps between two checks."""
    return replace(step, advance=None)
