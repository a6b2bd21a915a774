"""The slots of a batch: tensors whose axis 0 is the slot, and a record of the datum in each slot.

Danger: torch's matrix library takes another path for a single matrix, so a batch never has fewer than
`MINIMUM_SLOTS`; a lone field shares the batch with an idle slot, so that its result stays the same.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nfscale.engine.calibrate import Calibration
from nfscale.engine.dispatch import PLAIN, Step
from nfscale.engine.problem import FieldProblem
from nfscale.engine.sampling import Sampler, fetched, fetched_steps, selected
from nfscale.engine.step import training_samples
from nfscale.fields import Field
from nfscale.layout import Params
from nfscale.optim import Extra, Optimizer, Solver
from nfscale.optim.base import State
from nfscale.rng import Stream, as_tensor, rademacher
from nfscale.signals import Samples, Signal, Source

MINIMUM_SLOTS = 2
_ROWS = "rows"
_DRAWN_STEPS = 20
"""Steps whose samples are drawn at once. Drawing for each step alone would cost a tenth of the step; for more steps
at once it saves nothing and takes memory that grows with `check_every`."""


@dataclass
class Slot:
    """The datum in one place of the batch and what its checks saw."""

    id: str
    seed: int
    source: Source | None = None
    """Where the datum's samples stay, if they are not in the batch."""
    max_steps: int | None = None
    """Of a step plan: at most, and of its schedule; None: those of all."""
    restarts: int = 0
    step: int = 0
    wall_seconds: float = 0.0
    start_loss: float = float("inf")
    best_loss: float = float("inf")
    best_quality: float = float("-inf")
    history_step: list[int] = field(default_factory=list)
    history_quality: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Factor on the learning rate: halved for each restart."""
        return 0.5**self.restarts

    def copied(self) -> "Slot":
        """A record of its own."""
        return replace(self, history_step=[*self.history_step], history_quality=[*self.history_quality])

    def restarted(self) -> "Slot":
        """The same datum before its first step, one restart later."""
        return Slot(self.id, self.seed, self.source, self.max_steps, self.restarts + 1, wall_seconds=self.wall_seconds)


class Batch:
    """F fields, of data of one kind, that step together."""

    def __init__(
        self,
        field: Field,
        signal: Signal,
        optimizer: Optimizer | Solver,
        sampler: Sampler,
        calibration: Calibration | None,
        rows: Tensor,
        samples: Samples,
        seeds: Tensor,
        slots: list["Slot | None"],
        step: Step = PLAIN,
    ) -> None:
        self.field, self.signal, self.optimizer, self.sampler = field, signal, optimizer, sampler
        self.calibration, self.step = calibration, step
        self.rows, self.samples, self.seeds, self.slots = rows, samples, seeds, slots
        self.presented = _without_measured(samples).map(torch.clone) if sampler.selects else samples
        """What steps draw from: the samples; those of them that `select` chose; or what was fetched for a few steps."""
        self.drawing = sampler
        """How steps draw from it."""
        self.best_rows = rows.clone()
        self.steps = torch.zeros(len(slots), dtype=torch.int64, device=rows.device)
        self.rate = torch.ones(len(slots), dtype=torch.float32, device=rows.device)
        self.lengths = self._lengths()
        """int64 [F]: steps of each field's own schedule, where a step plan gives them."""
        self.state = self._begun(rows)

    def _lengths(self) -> Tensor | None:
        planned = [None if slot is None else slot.max_steps for slot in self.slots]
        there = next((length for length in planned if length is not None), None)
        if there is None:
            return None
        return torch.tensor([length or there for length in planned], device=self.rows.device)

    def _begun(self, rows: Tensor) -> State:
        """The state of fields that have had no step."""
        if isinstance(self.optimizer, Solver):
            return self.optimizer.init(rows, self.field.layout)
        return self.optimizer.init(self._params(rows))

    def _params(self, rows: Tensor) -> Params:
        return {_ROWS: rows} if self._by_rows else self.field.layout.unravel(rows)

    def _rows(self, params: Params) -> Tensor:
        return params[_ROWS] if self._by_rows else self.field.layout.ravel(params)

    @property
    def _by_rows(self) -> bool:
        return not isinstance(self.optimizer, Solver) and self.optimizer.elementwise

    @property
    def occupied(self) -> list[int]:
        return [index for index, slot in enumerate(self.slots) if slot is not None]

    def slot(self, index: int) -> Slot:
        """The record of an occupied slot."""
        slot = self.slots[index]
        assert slot is not None, f"slot {index} is empty"
        return slot

    def data(self) -> list[tuple[str, Samples]]:
        """The data in the occupied slots, as they were put in."""
        return [
            (slot.id, replace(self.samples.map(lambda t, i=index: t[i].cpu()), source=slot.source))
            for index, slot in ((index, self.slot(index)) for index in self.occupied)
        ]

    def remember(self, indices: list[int]) -> None:
        """Keep the current params of these slots as their best."""
        if indices:
            self.best_rows[indices] = self.rows[indices]

    def back_to_best(self, indices: list[int]) -> None:
        """Go on from the best params of these slots; the optimiser's memory stays."""
        if indices:
            self.rows[indices] = self.best_rows[indices]

    def select(self, indices: list[int], errors: Tensor) -> None:
        """Choose what the steps of these slots draw from until the next check, by the errors [len(indices), N]."""
        chosen, fields = selected(errors), torch.tensor(indices, device=errors.device)
        self._present(indices, _without_measured(self.samples).map(lambda tensor: tensor[fields[:, None], chosen]))

    def _present(self, indices: list[int], samples: Samples) -> None:
        self.presented.map(
            lambda ours, theirs: ours.index_copy_(0, torch.tensor(indices, device=ours.device), theirs), samples
        )

    def advance(self, count: int) -> None:
        """`count` steps of every slot; nothing here waits for the device, but solvers and data in files do."""
        sources = [None if slot is None else slot.source for slot in self.slots]
        there = next((source for source in sources if source is not None), None)
        if there is None:
            self._advance(count)
            return
        at_once = fetched_steps(self.sampler, self.samples, count, self._cadence)
        for _ in range(0, count, at_once):
            every = [source or there for source in sources]  # an idle slot steps with whatever there is
            self.presented, self.drawing = fetched(every, self.sampler, self.seeds, self.steps, at_once)
            self._advance(at_once)

    def _advance(self, count: int) -> None:
        if self.step.advance is not None:
            self.step.advance(
                self.field,
                self.optimizer,
                self.calibration,
                self.drawing,
                self.rows,
                self.state,
                self.presented,
                self.seeds,
                self.steps,
                self.rate,
                count=count,
                fields=self.occupied,
                lengths=self.lengths,
            )
            self.steps += count
            return
        positions, diagonal, step_rms = None, None, None
        for index in range(count):
            place = index % _DRAWN_STEPS
            if place == 0 and not self.drawing.is_full:
                positions = self.drawing.positions(self.seeds, self.steps, min(_DRAWN_STEPS, count - index))
            drawn = None if positions is None else positions[:, place]
            part = training_samples(self.signal, self.presented, drawn, self.seeds, self.steps)
            if isinstance(self.optimizer, Solver):
                problem = FieldProblem(self.field, self.signal, part, self.step)
                extra = Extra(self.steps, self.rate, length=self.lengths)
                self.rows, self.state = self.optimizer.solve(problem, self.rows, self.state, extra)
                self.steps += 1
                continue
            hv, wanted, signs, comes_round = None, None, None, index % self._cadence == 0
            if "hv" in self.optimizer.needs and comes_round:
                wanted = self.optimizer.wants_curvature(self.steps)
                probe = rademacher(self.seeds, Stream.PROBE, self.steps, self.field.layout.size)
                _, grads, products = self.step.gradient_and_hvp(self.field, self.signal, self.rows, part, probe)
                hv, signs = self._params(products), self._params(probe)
            else:
                _, grads = self.step.gradient(self.field, self.signal, self.rows, part)
            if "diagonal" in self.optimizer.needs and comes_round:
                diagonal, step_rms = self._shared_curvature()
            extra = Extra(self.steps, self.rate, hv, wanted, diagonal, step_rms, signs, comes_round, self.lengths)
            updates, self.state = self.optimizer.update(self._params(grads), self.state, self._params(self.rows), extra)
            self.rows += self._rows(updates)
            self.steps += 1

    @property
    def _cadence(self) -> int:
        return getattr(self.optimizer, "update_every", 1)

    def _shared_curvature(self) -> tuple[Params, Tensor]:
        assert self.calibration is not None, "fit() refuses an optimiser that lacks its calibration"
        diagonal, step_rms = self.calibration.at(self.steps)
        return self._params(diagonal), step_rms

    def fill(self, index: int, slot: Slot, row: Tensor, samples: Samples) -> None:
        """Put a datum into a slot, as new: its row, its samples, an empty optimiser state."""
        self.fill_all([index], [slot], row[None], samples.map(lambda tensor: tensor[None].to(row.device)))

    def fill_all(self, indices: list[int], slots: list[Slot], rows: Tensor, samples: Samples) -> None:
        """Put data into slots at once, for on a GPU one takes as many launches as all: [n, P], [n, N, ...]."""
        at = torch.tensor(indices, device=rows.device)

        def put(ours: Tensor, theirs: Tensor) -> Tensor:
            ours[at] = theirs
            return ours

        self.samples = self.samples.map(put, samples)
        self.seeds[at] = as_tensor([slot.seed for slot in slots], rows.device)
        self._reset(at, indices, slots, rows)

    def reset(self, index: int, slot: Slot, row: Tensor) -> None:
        """Start the datum in a slot again from `row`, at the rate its restarts leave it."""
        self._reset(torch.tensor([index], device=row.device), [index], [slot], row[None])

    def _reset(self, at: Tensor, indices: list[int], slots: list[Slot], rows: Tensor) -> None:
        for index, slot in zip(indices, slots, strict=True):
            self.slots[index] = slot
        if self.sampler.selects:
            self._present(indices, _without_measured(self.samples).map(lambda tensor: tensor[at]))
        self.rows[at] = rows
        self.best_rows[at] = rows
        self.steps[at] = 0
        self.rate[at] = torch.tensor([slot.rate for slot in slots], dtype=self.rate.dtype, device=rows.device)
        lengths = [slot.max_steps for slot in slots]
        if self.lengths is not None and None not in lengths:
            self.lengths[at] = torch.tensor(lengths, device=rows.device)
        _assign(self.state, self._begun(self.rows[at]), at)

    def keep(self, indices: list[int]) -> None:
        """Drop all slots but these."""
        self.rows, self.best_rows = self.rows[indices], self.best_rows[indices]
        self.samples = self.samples.map(lambda tensor: tensor[indices])
        self.presented = self.presented.map(lambda t: t[indices]) if self.sampler.selects else self.samples
        self.seeds, self.steps, self.rate = self.seeds[indices], self.steps[indices], self.rate[indices]
        self.lengths = None if self.lengths is None else self.lengths[indices]
        self.state = _pick(self.state, indices)
        self.slots = [self.slots[index] for index in indices]


def _without_measured(samples: Samples) -> Samples:
    """What steps see of samples."""
    return Samples(samples.coordinates, samples.values, samples.mask)


def _assign(state: State, fresh: State, at: Tensor) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            value[at] = fresh[name]
        else:
            _assign(value, fresh[name], at)


def _pick(state: State, indices: list[int]) -> State:
    return {name: v[indices] if isinstance(v, Tensor) else _pick(v, indices) for name, v in state.items()}
