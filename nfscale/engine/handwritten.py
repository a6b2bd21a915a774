"""Twins of the plain step without autograd, for sine MLPs on any device: gradients, Hessian-vector products, forward,
and all steps between two checks.

On a CPU a chunk of fields takes all its steps before the next chunk begins, so that it stays in cache. The passes
are in `handwritten_passes`, what the optimisers do in `handwritten_updates`.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nfscale.engine.handwritten_passes import Passes, Plan, forward
from nfscale.engine.handwritten_updates import knows, probe_words, update_of
from nfscale.engine.products import Precision
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import not_siren
from nfscale.fields import MLP, Field
from nfscale.optim import Optimizer
from nfscale.optim.base import State
from nfscale.signals import Samples, Signal
from nfscale.signals.base import Apply

if TYPE_CHECKING:
    from nfscale.engine.calibrate import Calibration  # which takes a step itself

__all__ = [
    "Run",
    "handwritten_apply",
    "handwritten_gradient",
    "handwritten_gradient_and_hvp",
    "handwritten_steps",
    "knows",
    "plan_of_steps",
    "refusal",
]

_DRAWN_STEPS = 20  # whose samples are drawn at once, as in `Batch.advance`


def refusal(device: torch.device, field: Field, signal: Signal) -> str | None:
    """Why the step cannot serve these, or None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it runs on a CPU or a CUDA device, not on {device}"
    if why := not_siren(field):
        return why
    if not getattr(signal, "squared_error", False):
        return f"it knows signals whose loss is the mean squared error at points, which {type(signal).__name__} is not"
    return None


@torch.no_grad()
def handwritten_gradient(
    field: Field, signal: Signal, rows: Tensor, samples: Samples, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """Losses [F] and gradients [F, P] of rows of weights [F, P] on a batch of samples [F, N, ...]."""
    losses, gradients, _ = _evaluated(field, rows, samples, None, precision)
    return losses, gradients


@torch.no_grad()
def handwritten_gradient_and_hvp(
    field: Field,
    signal: Signal,
    rows: Tensor,
    samples: Samples,
    probe: Tensor,
    precision: Literal["float32", "tf32"] = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [F], gradients [F, P] and Hessian-vector products [F, P] with probes [F, P]."""
    losses, gradients, products = _evaluated(field, rows, samples, probe, precision)
    assert products is not None
    return losses, gradients, products


def _evaluated(
    field: Field, rows: Tensor, samples: Samples, probe: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor, Tensor | None]:
    plan = _plan(field, samples, len(rows), rows)
    workspaces = _Workspaces(plan, rows, probe is not None, precision)
    losses, gradients = rows.new_empty(len(rows)), torch.empty_like(rows)
    products = None if probe is None else torch.empty_like(rows)
    for chunk, index, moving in _chunks(plan, list(range(len(rows))), rows.device):
        passes = workspaces.of(chunk)
        plan.pack(rows[index], passes.rows)
        passes.load(*_taken(samples, index))
        if probe is None or products is None:
            found = passes.gradient(with_losses=True)
        else:
            plan.pack(probe[index], passes.probes)
            found = passes.gradient_and_product(with_losses=True)
            products[moving] = plan.unpack(passes.products)[: len(moving)]
        assert found is not None
        losses[moving] = found[: len(moving)]
        gradients[moving] = plan.unpack(passes.gradients)[: len(moving)]
    return losses, gradients, products


def handwritten_apply(field: Field, rows: Tensor) -> Apply:
    """`field.apply` of these rows of weights [F, P]: [F|1, N, D] -> [F, N, C], without gradients."""
    assert isinstance(field, MLP), "the dispatcher refuses other fields"

    @torch.no_grad()
    def apply(coordinates: Tensor) -> Tensor:
        return forward(field, rows, coordinates)

    return apply


@torch.no_grad()
def handwritten_steps(
    field: Field,
    optimizer: Optimizer,
    calibration: "Calibration | None",
    sampler: Sampler,
    rows: Tensor,
    state: State,
    samples: Samples,
    seeds: Tensor,
    steps: Tensor,
    rate: Tensor,
    count: int,
    fields: list[int],
    lengths: Tensor | None = None,
    precision: Precision = "float32",
) -> None:
    """`count` steps of some fields of a batch, in place; arguments as those of `native.native_steps`."""
    plan = plan_of_steps(field, sampler, samples, len(fields), rows)
    probes = probe_words(optimizer, field.layout.size, seeds, steps, count)
    workspaces = _Workspaces(plan, rows, probes is not None, precision)
    for chunk, index, moving in _chunks(plan, fields, rows.device):
        words = None if probes is None else probes[index]
        run = Run(
            workspaces.of(chunk),
            optimizer,
            calibration,
            sampler,
            rows,
            state,
            samples,
            seeds,
            steps,
            rate,
            count,
            index,
            words,
            lengths,
        )
        for first in range(0, count, _DRAWN_STEPS):
            upcoming = min(_DRAWN_STEPS, count - first)
            run.draw(first, upcoming)
            run.take(first, upcoming)
        run.store(rows, state, moving)


class Run:
    """The next `count` steps of a chunk of fields, `index` [k] of a batch whose rows, state and so on these are.

    What the steps read lies in the passes and in `inputs`; `draw` the samples of some steps, then `take` these.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: Optimizer,
        calibration: "Calibration | None",
        sampler: Sampler,
        rows: Tensor,
        state: State,
        samples: Samples,
        seeds: Tensor,
        steps: Tensor,
        rate: Tensor,
        count: int,
        index: Tensor,
        words: Tensor | None,
        lengths: Tensor | None,
    ) -> None:
        self._passes = passes
        passes.plan.pack(rows[index], passes.rows)
        own = _taken(samples, index)
        self._update = update_of(optimizer, calibration, passes, state, index, steps, rate, count, words, lengths)
        self._drawn = None if sampler.is_full else _Drawn(sampler, own, seeds[index], steps[index])
        if self._drawn is None:
            passes.load(*own)

    @property
    def inputs(self) -> list[Tensor]:
        """What differs between this run, once its samples are drawn, and another one with the same passes."""
        return [*self._update.inputs, *([] if self._drawn is None else self._drawn.inputs)]

    def draw(self, first: int, count: int) -> None:
        if self._drawn is not None:
            self._drawn.draw(first, count)

    def take(self, first: int, count: int) -> None:
        """Steps of numbers `first` and so on, for which samples have been drawn."""
        for place in range(count):
            if self._drawn is not None:
                self._passes.load(*self._drawn.at(place))
            self._update.prepare(first + place)
            if self._update.wants_products(first + place):
                self._passes.gradient_and_product()
            else:
                self._passes.gradient()
            self._update.apply(first + place)

    def store(self, rows: Tensor, state: State, moving: Tensor) -> None:
        """Into the rows and the state of the batch: the first of the chunk's fields are those `moving` [<= k]."""
        rows[moving] = self._passes.plan.unpack(self._passes.rows)[: len(moving)]
        self._update.store(state, moving)


def plan_of_steps(field: Field, sampler: Sampler, samples: Samples, fields: int, rows: Tensor) -> Plan:
    """The plan for steps of so many fields, see `_plan`."""
    return _plan(field, samples, fields, rows, sampler.available if sampler.is_full else sampler.per_step)


def _plan(field: Field, samples: Samples, fields: int, rows: Tensor, points: int | None = None) -> Plan:
    """The plan for a batch of samples.

    Raises:
        ValueError: if their shapes are not those of the field (both are printed).
    """
    assert isinstance(field, MLP), "the dispatcher refuses other fields"
    count, available = samples.values.shape[:2]
    for tensor, last in ((samples.coordinates, field.dimensions), (samples.values, field.channels)):
        if tensor.shape != (count, available, last):
            raise ValueError(f"samples {tuple(tensor.shape)} where the field takes {(count, available, last)}")
    return Plan.of(field, points or available, fields, rows)


class _Workspaces:
    """Passes by the number of fields of a chunk, of which there are at most two."""

    def __init__(self, plan: Plan, like: Tensor, with_products: bool, precision: Precision) -> None:
        self._made: dict[int, Passes] = {}
        self._plan, self._like, self._with_products = plan, like, with_products
        self._precision: Precision = precision

    def of(self, chunk: list[int]) -> Passes:
        if len(chunk) not in self._made:
            self._made[len(chunk)] = Passes(self._plan, len(chunk), self._like, self._with_products, self._precision)
        return self._made[len(chunk)]


def _chunks(plan: Plan, fields: list[int], device: torch.device) -> list[tuple[list[int], Tensor, Tensor]]:
    """Chunks, as a list and as an index; and the fields of each once, whose results count."""
    chunks = []
    for chunk in plan.chunks(fields, device.type == "cpu"):
        index = torch.tensor(chunk, device=device)
        chunks.append((chunk, index, index[: len(set(chunk))]))
    return chunks


def _taken(samples: Samples, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coordinates, values and masks of some fields."""
    mask = None if samples.mask is None else samples.mask[index]
    return samples.coordinates[index], samples.values[index], mask


class _Drawn:
    """The samples of each step of a chunk, drawn for some steps at once."""

    def __init__(
        self, sampler: Sampler, own: tuple[Tensor, Tensor, Tensor | None], seeds: Tensor, steps: Tensor
    ) -> None:
        self._sampler, self._seeds, self._steps = sampler, seeds, steps
        self._own = [tensor if tensor is None else tensor.flatten(0, 1) for tensor in own]
        self._first = torch.arange(len(seeds), device=seeds.device)[:, None] * sampler.available
        self._positions = torch.empty(0)

    @property
    def inputs(self) -> list[Tensor]:
        return [self._positions, *(tensor for tensor in self._own if tensor is not None)]

    def draw(self, first: int, count: int) -> None:
        """For steps of numbers `first` and so on."""
        positions = self._sampler.positions(self._seeds, self._steps + first, count)
        self._positions = (positions.transpose(0, 1) + self._first).contiguous()

    def at(self, place: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The samples of one of the steps that were drawn for."""
        flat, shape = self._positions[place].flatten(), self._positions[place].shape
        coordinates, values, mask = (
            None if tensor is None else tensor.index_select(0, flat).view(*shape, *tensor.shape[1:])
            for tensor in self._own
        )
        assert coordinates is not None
        assert values is not None
        return coordinates, values, mask
