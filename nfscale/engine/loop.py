"""The loop: slots are filled, stepped, looked at every `check_every` steps, emptied and refilled.

The host looks at the device at checks only. What happens to a field between two checks depends on the
field alone, so results do not change with the batch size or with what the neighbours do. On a CPU that is
so bit for bit: in native and torch steps always, in plain steps for widths that are multiples of 4 (for others
the matrix library picks its path by the alignment of a field's block, and results agree to rounding).
"""

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, ParamSpec, get_args

import torch
from torch import Tensor

from nfscale.engine.batch import MINIMUM_SLOTS, Batch, Slot
from nfscale.engine.calibrate import Calibration
from nfscale.engine.dispatch import PrecisionName, Step, StepName, chosen
from nfscale.engine.memory import batch_slots, estimated_field_bytes, is_out_of_memory, measured_field_bytes
from nfscale.engine.problem import unsolvable
from nfscale.engine.result import Fitted, Result, Stop
from nfscale.engine.sampling import DRAWN_IN_FULL, Sampler, Sampling
from nfscale.engine.snapshot import Snapshot, put_back, snapshot_of
from nfscale.engine.staging import ALONE, Staged
from nfscale.engine.step import evaluate, stack_samples
from nfscale.fields import Field, theta0_of
from nfscale.optim import Optimizer, Scheduled, Solver
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply, Kind

_Keys = ParamSpec("_Keys")
_FALLEN = 10.0
"""A field has diverged when its loss is this many times its best, and within the same factor of its start:
lost for good, while a spike of a field that is already good recovers as the learning rate decays."""
_FILLED_TOGETHER = {"cuda": 256}
"""Slots: the data that come into them are held once more meanwhile. On a CPU one by one takes no longer."""


SELECTS_WITHOUT_CHECK = (
    "sampling=error goes by the errors that checks see, and data of this kind are checked on samples that no step "
    "takes; use sampling=stratified"
)


LADDER_IS_NO_PLATEAU = (
    "each budget of a ladder (first_steps) begins with a loss of quality, which plateau_checks take for a plateau; "
    "use one of the two"
)


LADDER_AND_PLAN = (
    "a step plan gives each field a schedule of its own length, and a ladder (first_steps) gives all of them several; "
    "use one of the two"
)


@dataclass(frozen=True)
class Check:
    """What an observer is told after each look at the batch."""

    active: int
    finished: int
    steps: int
    """Field steps taken since the last check, summed over the active slots."""
    step: str
    """The name of the step that took them: plain, torch, native, fused."""
    step_seconds: float = 0.0
    """By the clock, of these steps."""
    check_seconds: float = 0.0
    """By the clock, of measuring the slots after them."""
    snapshot: Callable[[], Snapshot] | None = field(default=None, compare=False, repr=False)
    """The fields that go on, as they are now: to be called before the next field or check comes out."""
    slots: int = 0
    """Fields that the batch may hold, whether or not so many are left."""


def fit_and_checks(
    field: Field,
    signal: Signal,
    data: Iterable[tuple[str, Samples | Staged]],
    *,
    optimizer: Optimizer | Solver,
    stop: Stop,
    seed: int,
    init: Literal["shared", "per_datum"] | Tensor = "shared",
    samples: int | Literal["full"] = "full",
    sampling: Sampling = "stratified",
    calibration: Calibration | None = None,
    batch: int | Literal["auto"] = "auto",
    step: StepName = "auto",
    precision: PrecisionName = "auto",
    device: torch.device | str | None = None,
    clock: Callable[[], float] | None = None,
    observe: Callable[[Check], None] | None = None,
    resume: Snapshot | None = None,
    step_plan: Mapping[str, int] | None = None,
    capacities: dict[Kind, int] | None = None,
) -> Iterator[Fitted | Check]:
    """Fit one field to each datum; fields come out in the order in which they finish, and among them each check.

    Args:
        data: (id, samples) pairs, read as slots free up. Data of one kind share a batch: equal counts of samples, of
            samples to check and of samples held back, and a mask in all or none. Whose reader has a thread of its own
            may stage them, see `nfscale.engine.staging`.
        init: "shared" starts every field from one draw of `seed`, "per_datum" from the datum's own;
            a tensor [P] is the shared start itself.
        samples: how many of a field's samples enter a step.
        sampling: which, see `nfscale.engine.sampling`.
        calibration: curvature shared by the fields, for optimisers that need it.
        batch: slots; "auto" chooses by the memory that a field takes in two steps on trial. Halved where
            that turns out to be too many.
        step: "plain" (autograd), "torch" (without autograd), "native" (C++, on a CPU) or "fused" (Triton, on a GPU,
            float16 products); "auto" takes the fastest that serves, see `nfscale.engine.dispatch`. They agree to
            rounding.
        precision: of the products between hidden layers: "float32"; on a GPU "tf32" or "float16" operands, both with
            11 bits; "auto" is float16 in the fused step up to weight scale 3, float32 otherwise.
        clock: seconds, for `wall_seconds`; without one they stay 0.
        observe: called after each check.
        resume: fields that go on from where a check had them; data that are not among them start as ever.
        step_plan: steps by the datum's id, of the field's own schedule and at most, in place of `stop.max_steps`, which
            holds for data that are not in it. Multiples of `stop.check_every`.
        capacities: slots that earlier fits of this kind have found, where `batch` is "auto"; what is found is put in.

    Raises:
        ValueError: if the optimiser needs a calibration and none is given, the step cannot serve what it is given
            or has not this precision, a solver cannot (for the sizes of the data, once they are read), or a number is
            out of its range.
    """
    _refuse_bad(optimizer, stop, samples, sampling, batch)
    if step_plan is not None:
        _refuse_plan(step_plan, optimizer, stop)
    if isinstance(optimizer, Solver):
        _refuse_unsolvable(optimizer, field, signal, samples)
    if "diagonal" in optimizer.needs and calibration is None:
        raise ValueError("this optimiser uses curvature that fields share; pass calibration=nfscale.calibrate(...)")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    taken = chosen(step, device, field, signal, optimizer, precision)
    loop = _Loop(
        field=field,
        signal=signal,
        optimizer=optimizer,
        stop=stop,
        seed=seed,
        theta0=_shared_start(field, seed, init, device),
        samples=samples,
        sampling=sampling,
        calibration=calibration.to(device) if calibration is not None else None,
        batch=batch,
        step=taken,
        device=device,
        clock=clock or (lambda: 0.0),
        observe=observe or (lambda check: None),
        resume=resume,
        step_plan=step_plan,
        capacities={} if capacities is None else capacities,
        at_start=_AtStart(taken.apply),
    )
    return loop.run_all(_Queue(data))


def _without_checks(both: Callable[_Keys, Iterator[Fitted | Check]]) -> Callable[_Keys, Iterator[Fitted]]:
    def fit(*args: _Keys.args, **keys: _Keys.kwargs) -> Iterator[Fitted]:
        return (event for event in both(*args, **keys) if isinstance(event, Fitted))

    functools.update_wrapper(fit, both)
    fit.__name__ = fit.__qualname__ = "fit"
    fit.__signature__ = inspect.signature(both).replace(return_annotation=Iterator[Fitted])  # type: ignore[attr-defined]
    fit.__doc__ = (both.__doc__ or "").replace(", and among them each check", "")
    return fit


fit = _without_checks(fit_and_checks)


def _refuse_unsolvable(solver: Solver, field: Field, signal: Signal, samples: int | Literal["full"]) -> None:
    name = type(solver).__name__
    if solver.full_batch and samples != "full":
        raise ValueError(f"{name} takes all samples at every step, got samples={samples}; use samples='full'")
    if why := unsolvable(solver, field, signal):
        raise ValueError(f"{name} cannot fit this: {why}")


def _refuse_bad(
    optimizer: Optimizer | Solver,
    stop: Stop,
    samples: int | Literal["full"],
    sampling: Sampling,
    batch: int | Literal["auto"],
) -> None:
    if sampling not in get_args(Sampling):
        raise ValueError(f"unknown sampling {sampling!r}; known: {', '.join(get_args(Sampling))}")
    if sampling == "error" and samples == "full":
        raise ValueError(
            "sampling='error' chooses which samples a step takes, and samples='full' takes all; give a number"
        )
    for name, value in (("samples", samples), ("batch", batch)):
        if not isinstance(value, str) and value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")
    _refuse_cadence(optimizer, stop, stop.max_steps)
    first = optimizer.schedule.first_steps if isinstance(optimizer, Scheduled) else None
    if first is None:
        return
    if first % stop.cadence:
        raise ValueError(f"the schedule's first_steps={first} is not a multiple of check_every={stop.check_every}")
    if stop.plateau_checks is not None:
        raise ValueError(LADDER_IS_NO_PLATEAU)


def _refuse_cadence(optimizer: Optimizer | Solver, stop: Stop, max_steps: int) -> None:
    every = getattr(optimizer, "update_every", 1)
    if optimizer.needs & {"hv", "cadence"} and max_steps > stop.cadence and stop.cadence % every:
        raise ValueError(f"check_every={stop.check_every} is not a multiple of the optimiser's update_every={every}")


def _refuse_plan(step_plan: Mapping[str, int], optimizer: Optimizer | Solver, stop: Stop) -> None:
    _refuse_cadence(optimizer, stop, max(step_plan.values(), default=0))
    if isinstance(optimizer, Scheduled) and optimizer.schedule.first_steps is not None:
        raise ValueError(LADDER_AND_PLAN)
    for datum_id, steps in step_plan.items():
        if steps < 1 or steps % stop.cadence:
            raise ValueError(
                f"the step plan gives {datum_id!r} {steps} steps, which is no multiple of check_every={stop.cadence}"
            )


def _shared_start(
    field: Field, seed: int, init: Literal["shared", "per_datum"] | Tensor, device: torch.device
) -> Tensor | None:
    if isinstance(init, Tensor):
        return init.to(device)
    return theta0_of(field, seed).to(device) if init == "shared" else None


def _padded(indices: list[int], slots: int) -> list[int] | None:
    """At least `MINIMUM_SLOTS` of them, since a lone field rounds differently; None for all slots in order."""
    if indices == list(range(slots)):
        return None
    return indices + indices[:1] * (MINIMUM_SLOTS - len(indices))


_Datum = tuple[str, Samples | Staged]


def _as_read(samples: Samples | Staged) -> Samples:
    return samples.host if isinstance(samples, Staged) else samples


class _Queue:
    """Data that wait for a slot, by kind; reads ahead only as far as it must."""

    def __init__(self, data: Iterable[_Datum]) -> None:
        self._data = iter(data)
        self._waiting: dict[Kind, deque[_Datum]] = {}

    def _read(self) -> bool:
        """Read one more datum; False at the end."""
        datum = next(self._data, None)
        if datum is None:
            return False
        self._waiting.setdefault(datum[1].kind, deque()).append(datum)
        return True

    def most_waiting(self) -> Kind | None:
        """The kind of which most data wait; reads one datum where none waits."""
        if not any(self._waiting.values()) and not self._read():
            return None
        return max(self._waiting, key=lambda kind: len(self._waiting[kind]))

    def next_of(self, kind: Kind) -> tuple[str, Samples]:
        """The datum of this kind that comes next, left in the line."""
        datum_id, samples = self._waiting[kind][0]
        return datum_id, _as_read(samples)

    def put_back(self, kind: Kind, data: list[tuple[str, Samples]]) -> None:
        """Data that were taken and go to the head of the line again."""
        self._waiting[kind].extendleft(reversed(data))

    def take(self, kind: Kind, lookahead: int) -> _Datum | None:
        """The next datum of this kind, passing over at most `lookahead` data of other kinds."""
        line = self._waiting.setdefault(kind, deque())
        while not line and sum(len(other) for other in self._waiting.values()) < lookahead:
            if not self._read():
                break
        return line.popleft() if line else None


class _AtStart:
    """`apply` of rows that are all theta0: computed once for as long as the data have the same coordinates."""

    def __init__(self, apply: Callable[[Field, Tensor], Apply]) -> None:
        self._apply = apply
        self._known: tuple[Tensor, Tensor] | None = None
        """Coordinates [1, n, D] and the values there [1, n, C]."""

    def __call__(self, field: Field, rows: Tensor) -> Apply:
        def at(coordinates: Tensor) -> Tensor:
            if self._known is not None:
                known, values = self._known
                if known.shape[1:] == coordinates.shape[1:] and torch.equal(known.expand_as(coordinates), coordinates):
                    return values.expand(len(rows), -1, -1)
            values = self._apply(field, rows)(coordinates)
            self._known = coordinates[:1].clone(), values[:1].clone()
            return values

        return at


@dataclass(frozen=True)
class _Loop:
    field: Field
    signal: Signal
    optimizer: Optimizer | Solver
    stop: Stop
    seed: int
    theta0: Tensor | None
    samples: int | Literal["full"]
    sampling: Sampling
    calibration: Calibration | None
    batch: int | Literal["auto"]
    step: Step
    device: torch.device
    clock: Callable[[], float]
    observe: Callable[[Check], None]
    resume: Snapshot | None
    step_plan: Mapping[str, int] | None
    capacities: dict[Kind, int]
    """Slots by kind of data, once they are known; fewer where those turned out to be too many."""
    at_start: _AtStart

    def run_all(self, queue: _Queue) -> Iterator[Fitted | Check]:
        """Fit all data, one kind after the other."""
        while (kind := queue.most_waiting()) is not None:
            yield from self.run(queue, kind)

    def run(self, queue: _Queue, kind: Kind) -> Iterator[Fitted | Check]:
        """Fit data of one kind until no more of them wait."""
        available = kind.count
        sampler = Sampler(available, available if self.samples == "full" else self.samples, self.sampling)
        if sampler.selects and kind.check is not None:
            raise ValueError(SELECTS_WITHOUT_CHECK)
        if kind.is_drawn and self.samples == "full":
            raise ValueError(DRAWN_IN_FULL)
        if isinstance(self.optimizer, Solver):
            residuals = min(sampler.per_step, available) * self.signal.channels
            if why := self.optimizer.too_large(self.field.layout.size, residuals):
                raise ValueError(f"{type(self.optimizer).__name__} cannot fit this: {why}")
        capacity = self.capacities.get(kind) or self._capacity(queue.next_of(kind), sampler)
        self.capacities[kind] = capacity
        batch = self._new_batch(queue, kind, sampler, capacity)
        self._begin(batch, batch.occupied)
        while batch.occupied:
            before, active = self.clock(), batch.occupied
            try:
                self._advance(batch, active)
                between = self._now()
                measured = self._look(batch, active)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch.slots) <= MINIMUM_SLOTS:
                    raise
                # Fields begin again: their numbers are keyed by their own steps, so they end as they would have.
                self.capacities[kind] = capacity = len(batch.slots) // 2
                queue.put_back(kind, batch.data())
                del batch
                batch = self._new_batch(queue, kind, sampler, capacity)
                self._begin(batch, batch.occupied)
                continue
            after = self.clock()
            share = (after - before) / len(active)
            for index in active:
                batch.slot(index).wall_seconds += share
            fresh, leaving, climbing = [], [], []
            for index in active:
                verdict = self._verdict(batch.slot(index), *measured[index])
                if verdict is Result.DIVERGED and batch.slot(index).restarts < self.stop.max_restarts:
                    slot = batch.slot(index).restarted()
                    batch.reset(index, slot, self._start_row(slot.id))
                    fresh.append(index)
                elif verdict is not None:
                    leaving.append((index, verdict))
                elif batch.slot(index).step in self._rungs:
                    climbing.append(index)
            batch.back_to_best(climbing)
            yield from self._leave(batch, leaving)
            taken = len(active) * self.stop.cadence
            seconds = between - before, after - between
            snapshot = functools.partial(snapshot_of, batch)
            check = Check(len(active), len(leaving), taken, self.step.name, *seconds, snapshot, capacity)
            self.observe(check)
            yield check
            self._look(batch, fresh)
            self._begin(batch, self._refill(batch, queue, kind, capacity))
            self._compact(batch)

    @cached_property
    def _rungs(self) -> frozenset[int]:
        """The steps after which a budget of a ladder ends and the next one begins."""
        return frozenset(self.optimizer.schedule.budgets[:-1] if isinstance(self.optimizer, Scheduled) else ())

    def _advance(self, batch: Batch, active: list[int]) -> None:
        """To the next check."""
        batch.advance(self.stop.cadence)
        for index in active:
            batch.slot(index).step += self.stop.cadence

    def _now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def _start_row(self, datum_id: str) -> Tensor:
        """Where a field starts: [P]."""
        if self.theta0 is not None:
            return self.theta0
        seeds = as_tensor([datum_seed(self.seed, datum_id)], self.device)
        return self.field.layout.ravel(self.field.init(seeds))[0]

    def _new_batch(self, queue: _Queue, kind: Kind, sampler: Sampler, capacity: int) -> Batch:
        taken: list[tuple[str, Samples]] = []
        while len(taken) < capacity and (datum := queue.take(kind, capacity)) is not None:
            taken.append((datum[0], _as_read(datum[1])))
        return self._batch_of(taken, sampler)

    def _batch_of(self, data: list[tuple[str, Samples]], sampler: Sampler) -> Batch:
        slots: list[Slot | None] = [self._slot(datum_id, samples) for datum_id, samples in data]
        idle = max(0, MINIMUM_SLOTS - len(data))
        slots += [None] * idle
        data = data + data[:1] * idle
        return Batch(
            self.field,
            self.signal,
            self.optimizer,
            sampler,
            self.calibration,
            rows=torch.stack([self._start_row(datum_id) for datum_id, _ in data]),
            samples=stack_samples([part for _, part in data], self.device),
            seeds=as_tensor([datum_seed(self.seed, datum_id) for datum_id, _ in data], self.device),
            slots=slots,
            step=self.step,
        )

    def _slot(self, datum_id: str, samples: Samples) -> Slot:
        """The record of a datum before its first step."""
        max_steps = None if self.step_plan is None else self.step_plan.get(datum_id, self.stop.max_steps)
        return Slot(datum_id, datum_seed(self.seed, datum_id), samples.source, max_steps)

    def _capacity(self, datum: tuple[str, Samples], sampler: Sampler) -> int:
        """Slots for data of this one's kind; what a field takes is measured, or estimated where that fails."""
        if self.batch != "auto":
            return self.batch
        try:
            with ALONE:
                field_bytes = measured_field_bytes(lambda slots: self._batch_of([datum] * slots, sampler), self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            field_bytes = None
        return batch_slots(field_bytes or estimated_field_bytes(self.field, self.signal, sampler), self.device)

    def _begin(self, batch: Batch, indices: list[int]) -> None:
        """Look at data that have come into these slots; those that a snapshot has go on from there."""
        gone_on: list[int] = []
        snapshot = self.resume
        for index in indices:
            if snapshot is None:
                break
            place = snapshot.place(batch.slot(index).id)
            if place is not None and snapshot.slots[place].history_step:
                put_back(batch, index, snapshot, place)
                gone_on.append(index)
            elif place is not None:  # it had just been restarted
                slot = snapshot.slots[place].copied()
                batch.reset(index, slot, self._start_row(slot.id))
        self._look(batch, [index for index in indices if index not in gone_on])
        if batch.sampler.selects and gone_on:
            which = _padded(gone_on, len(batch.slots))
            errors = self._errors(batch, which)
            evaluate(self.field, self.signal, batch.rows, batch.samples, which, self.step.apply, errors)
            batch.select(gone_on, errors[: len(gone_on)])

    @staticmethod
    def _errors(batch: Batch, which: list[int] | None) -> Tensor:
        """Where the errors of samples are put: [F, N]."""
        return batch.samples.values.new_empty((len(which or batch.slots), batch.samples.values.shape[1]))

    def _look(self, batch: Batch, indices: list[int]) -> dict[int, tuple[float, float]]:
        """Measure these slots over all their samples, note it, and keep the params that are best so far."""
        if not indices:
            return {}
        which = _padded(indices, len(batch.slots))
        errors = self._errors(batch, which) if batch.sampler.selects else None
        begin = self.theta0 is not None and not any(batch.slot(index).step for index in indices)
        apply = self.at_start if begin else self.step.apply
        measured = evaluate(self.field, self.signal, batch.rows, batch.samples, which, apply, errors)
        loss, quality = (t.tolist() for t in measured)
        if errors is not None and (moved := [n for n, index in enumerate(indices) if batch.slot(index).step]):
            batch.select([indices[n] for n in moved], errors[moved])
        better = []
        for index, slot_loss, slot_quality in zip(indices, loss, quality, strict=False):
            slot = batch.slot(index)
            slot.history_step.append(slot.step)
            slot.history_quality.append(slot_quality)
            if slot.step == 0:
                slot.start_loss = slot_loss
            if slot_quality > slot.best_quality:
                slot.best_loss, slot.best_quality = slot_loss, slot_quality
                better.append(index)
        batch.remember(better)
        return dict(zip(indices, zip(loss, quality, strict=True), strict=False))

    def _verdict(self, slot: Slot, loss: float, quality: float) -> Result | None:
        """Why the field leaves now, or None if it goes on."""
        if self.stop.target is not None and quality >= self.stop.target:
            return Result.CONVERGED
        fallen = loss > _FALLEN * slot.best_loss and loss > slot.start_loss / _FALLEN
        if not math.isfinite(loss) or fallen or loss > 2 * slot.start_loss:
            return Result.DIVERGED
        if slot.step >= (slot.max_steps or self.stop.max_steps):
            return Result.MAX_STEPS
        checks = self.stop.plateau_checks
        if checks is not None and len(slot.history_quality) > checks:
            before = max(slot.history_quality[:-checks])
            if max(slot.history_quality[-checks:]) < before + self.stop.plateau_gain:
                return Result.PLATEAU
        return None

    def _leave(self, batch: Batch, leaving: list[tuple[int, Result]]) -> Iterator[Fitted]:
        if not leaving:
            return
        indices = [index for index, _ in leaving]
        weights = batch.best_rows[indices].cpu()
        held_back = self._measure_heldout(batch, indices)
        for row, quality_heldout, (index, verdict) in zip(weights, held_back, leaving, strict=True):
            slot = batch.slot(index)
            batch.slots[index] = None
            yield Fitted(
                id=slot.id,
                weights=row,
                loss=slot.best_loss,
                quality=slot.best_quality,
                steps=slot.step,
                result=verdict,
                seed=slot.seed,
                restarts=slot.restarts,
                steps_to_target=slot.step if verdict is Result.CONVERGED else None,
                wall_seconds=slot.wall_seconds,
                history_step=slot.history_step,
                history_quality=slot.history_quality,
                quality_heldout=quality_heldout,
            )

    def _measure_heldout(self, batch: Batch, indices: list[int]) -> list[float | None]:
        """Quality of the best params of these slots on what their data hold back."""
        heldout = batch.samples.heldout
        if heldout is None:
            return [None] * len(indices)
        which = _padded(indices, len(batch.slots))
        measured = evaluate(self.field, self.signal, batch.best_rows, heldout, which, self.step.apply)
        return measured[1].tolist()[: len(indices)]

    def _refill(self, batch: Batch, queue: _Queue, kind: Kind, lookahead: int) -> list[int]:
        """Put waiting data into the empty slots, some at a time; which slots these were."""
        filled: list[int] = []
        coming: list[_Datum] = []
        for index in [index for index, occupant in enumerate(batch.slots) if occupant is None]:
            if (datum := queue.take(kind, lookahead)) is None:
                break
            filled.append(index)
            coming.append(datum)
            if len(coming) == _FILLED_TOGETHER.get(self.device.type, 1):
                self._fill(batch, filled[-len(coming) :], coming)
                coming = []
        if coming:
            self._fill(batch, filled[-len(coming) :], coming)
        return filled

    def _fill(self, batch: Batch, indices: list[int], data: list[_Datum]) -> None:
        slots = [self._slot(datum_id, _as_read(samples)) for datum_id, samples in data]
        rows = [self._start_row(datum_id) for datum_id, _ in data]
        samples = [samples.arrived() if isinstance(samples, Staged) else samples for _, samples in data]
        if len(data) == 1:
            batch.fill(indices[0], slots[0], rows[0], samples[0])
        else:
            batch.fill_all(indices, slots, torch.stack(rows), stack_samples(samples, self.device))

    def _compact(self, batch: Batch) -> None:
        """Drop empty slots that nothing waits for. On a GPU only by halves: each size is a shape of its own."""
        occupied = batch.occupied
        if not occupied or len(occupied) == len(batch.slots):
            return
        if self.device.type == "cuda" and len(occupied) > len(batch.slots) // 2:
            return
        idle = [index for index, slot in enumerate(batch.slots) if slot is None]
        kept = sorted(occupied + idle[: max(0, MINIMUM_SLOTS - len(occupied))])
        if len(kept) < len(batch.slots):
            batch.keep(kept)
