"""What optimisers do between the passes by hand: their updates in place, on the rows of a chunk of fields.

Twins of the optimisers' `update` on rows [k, row_size] whose padding has gradients of zero and stays zero. What a
step has of its own (its size, its corrections) is reckoned for all steps at once; a step makes no temporaries but of
one number per field.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from nfscale.engine.handwritten_passes import Passes
from nfscale.layout import Params
from nfscale.optim import ESGD, Adam, Optimizer, Solver
from nfscale.optim.base import State
from nfscale.rng import Stream, signs, words

if TYPE_CHECKING:
    from nfscale.engine.calibrate import Calibration  # which takes a step itself

_SMALLEST_STEP = 1e-30  # a step of this size changes no weight, and its reciprocal is finite


class Update(Protocol):
    """The memory of an optimiser for one chunk: what it does at each step, then back into the batch's state."""

    @property
    def inputs(self) -> list[Tensor]:
        """What differs between the steps of one call and those of another, memory included."""
        ...

    def wants_products(self, number: int) -> bool:
        """Whether step `number` takes products with the Hessian; `passes.probes` are then set by `prepare`."""
        ...

    def prepare(self, number: int) -> None:
        """Before the passes of a step."""
        ...

    def apply(self, number: int) -> None:
        """After them: moves `passes.rows`."""
        ...

    def store(self, state: State, moving: Tensor) -> None:
        """Into the state of the batch: the first of the chunk's fields are those `moving` [<= k]."""
        ...


class _Pace(NamedTuple):
    """What decides the sizes of the steps of a chunk of k fields, as optimisers take it."""

    every: Tensor
    """int64 [k, count]: updates before each step."""
    rate: Tensor
    """float32 [k, 1]"""
    length: Tensor | None
    """int64 [k, 1], see `Extra`."""


def knows(optimizer: Optimizer | Solver) -> bool:
    """Whether there is an update of this optimiser here; a subclass may do something else."""
    return type(optimizer) in (Adam, ESGD)


def update_of(
    optimizer: Optimizer,
    calibration: "Calibration | None",
    passes: Passes,
    state: State,
    index: Tensor,
    steps: Tensor,
    rate: Tensor,
    count: int,
    words: Tensor | None,
    lengths: Tensor | None = None,
) -> Update:
    """The update for `count` steps of the fields `index` [k] of a batch, whose state, steps and so on these are.

    Args:
        words: int64 [k, U, P / 32], as `probe_words` draws them.
    """
    every = steps[index, None] + torch.arange(count, device=steps.device)
    pace = _Pace(every, rate[index, None], None if lengths is None else lengths[index, None])
    if isinstance(optimizer, Adam):
        return _Adam(optimizer, passes, state, index, pace)
    assert isinstance(optimizer, ESGD), "the dispatcher leaves other optimisers to the plain update"
    if optimizer.curvature == "shared":
        assert calibration is not None, "fit() refuses an optimiser that lacks its calibration"
        return _Shared(optimizer, passes, state, index, pace, calibration)
    assert words is not None
    return _PerField(optimizer, passes, state, index, pace, words)


def _by_step(values: Tensor) -> Tensor:
    """[k, count] -> [count, k, 1], each step's numbers side by side."""
    return values.T.contiguous().unsqueeze(2)


def _only(params: Params) -> Tensor:
    (tensor,) = params.values()
    return tensor


class _Moments:
    """Running means of a chunk, taken out of the batch's state by name and put back."""

    def __init__(self, passes: Passes, state: State, index: Tensor, names: tuple[str, ...]) -> None:
        self._plan, self._names = passes.plan, names
        self.passes = passes
        self.means = [self._taken(_only(state[name])[index]) for name in names]

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.means]

    def _taken(self, rows: Tensor) -> Tensor:
        return self._plan.pack(rows, torch.zeros_like(self.passes.rows))

    def wants_products(self, number: int) -> bool:
        return False

    def prepare(self, number: int) -> None:
        pass

    def store(self, state: State, moving: Tensor) -> None:
        for name, mean in zip(self._names, self.means, strict=True):
            _only(state[name])[moving] = self._plan.unpack(mean)[: len(moving)]


class _Adam(_Moments):
    def __init__(self, optimizer: Adam, passes: Passes, state: State, index: Tensor, pace: _Pace) -> None:
        super().__init__(passes, state, index, ("mean", "square"))
        self._optimizer = optimizer
        step_size, correction = optimizer.step_sizes(*pace)
        step_size = step_size.clamp(min=_SMALLEST_STEP)
        # size m / (sqrt(v) / correction + epsilon) as m / (scale sqrt(v) + floor)
        self._scale = _by_step(1 / (correction * step_size))
        self._floor = _by_step(optimizer.epsilon / step_size)
        self._scratch = torch.empty_like(passes.rows)

    @property
    def inputs(self) -> list[Tensor]:
        return [*super().inputs, self._scale, self._floor]

    def apply(self, number: int) -> None:
        optimizer, gradient, (mean, square) = self._optimizer, self.passes.gradients, self.means
        mean.lerp_(gradient, 1 - optimizer.beta1)
        square.mul_(optimizer.beta2).addcmul_(gradient, gradient, value=1 - optimizer.beta2)
        divisor = torch.sqrt(square, out=self._scratch).mul_(self._scale[number]).add_(self._floor[number])
        self.passes.rows.addcdiv_(mean, divisor, value=-1)


class _Preconditioned(_Moments):
    """m / (D + damping), where `inverse` is 1 / (D + damping)."""

    def __init__(self, optimizer: ESGD, passes: Passes, state: State, index: Tensor, pace: _Pace) -> None:
        super().__init__(passes, state, index, ("momentum",))
        self.optimizer, self.every = optimizer, pace.every
        self.step_size = _by_step(-optimizer.step_size(*pace) / optimizer.correction(pace.every))
        self.correction = _by_step(optimizer.correction(pace.every))
        self.inverse, self.direction = torch.zeros_like(passes.rows), torch.empty_like(passes.rows)

    @property
    def inputs(self) -> list[Tensor]:
        return [*super().inputs, self.every, self.step_size, self.correction]

    def move(self, step_size: Tensor) -> None:
        self.passes.rows.addcmul_(self.direction, step_size)

    def turn(self) -> None:
        (momentum,) = self.means
        momentum.lerp_(self.passes.gradients, 1 - self.optimizer.beta1)
        torch.mul(momentum, self.inverse, out=self.direction)


class _Shared(_Preconditioned):
    """As in `Batch.advance`, curvature is looked up every so many steps since the check and holds for the others."""

    def __init__(
        self,
        optimizer: ESGD,
        passes: Passes,
        state: State,
        index: Tensor,
        pace: _Pace,
        calibration: "Calibration",
    ) -> None:
        super().__init__(optimizer, passes, state, index, pace)
        self._calibration = calibration
        self._root_of_size = passes.plan.field.layout.size**0.5
        self._longest = torch.empty(0)

    def prepare(self, number: int) -> None:
        if number % self.optimizer.update_every:
            return
        diagonal, typical = self._calibration.at(self.every[:, number])
        damped = _only(self.optimizer.damped({"rows": diagonal}))
        self.passes.plan.pack(damped.reciprocal_(), self.inverse)
        if self.optimizer.clip is not None:  # of a norm instead of a root mean square, before the correction
            self._longest = (self.optimizer.clip * self._root_of_size * typical)[:, None]

    def apply(self, number: int) -> None:
        self.turn()
        step_size = self.step_size[number]
        if self.optimizer.clip is not None:
            norm = torch.linalg.vector_norm(self.direction, dim=1, keepdim=True)
            step_size = (self._longest * self.correction[number] / norm).clamp_(max=1).mul_(step_size)
        self.move(step_size)


class _PerField(_Preconditioned):
    def __init__(
        self,
        optimizer: ESGD,
        passes: Passes,
        state: State,
        index: Tensor,
        pace: _Pace,
        words: Tensor,
    ) -> None:
        super().__init__(optimizer, passes, state, index, pace)
        self._words, self._square = words, self._taken(_only(state["square"])[index])
        self._probes, self._counted = state["probes"][index], optimizer.wants_curvature(pace.every)
        if not self.wants_products(0):
            self._invert()

    @property
    def inputs(self) -> list[Tensor]:
        return [*super().inputs, self._words, self._square, self._probes, self._counted]

    def wants_products(self, number: int) -> bool:
        return number % self.optimizer.update_every == 0

    def prepare(self, number: int) -> None:
        if self.wants_products(number):
            words = self._words[:, number // self.optimizer.update_every]
            self.passes.plan.pack(signs(words, self.passes.plan.field.layout.size), self.passes.probes)

    def apply(self, number: int) -> None:
        if self.wants_products(number):
            counted = self._counted[:, number]
            weight = counted.to(self._square.dtype) * (1 - self.optimizer.beta2)
            self._square.lerp_(self.passes.products.square_(), weight[:, None])
            self._probes += counted
            self._invert()
        self.turn()
        self.move(self.step_size[number])

    def _invert(self) -> None:
        """The twin of `corrected` and `damped`, in place."""
        weight = (1 - self.optimizer.beta2 ** self._probes.to(torch.float64)).to(self._square.dtype)
        diagonal = torch.div(self._square, weight[:, None], out=self.inverse).sqrt_()
        mean = diagonal.sum(dim=1, keepdim=True) / self.passes.plan.field.layout.size
        diagonal.add_(mean * self.optimizer.damping).reciprocal_()

    def store(self, state: State, moving: Tensor) -> None:
        super().store(state, moving)
        _only(state["square"])[moving] = self.passes.plan.unpack(self._square)[: len(moving)]
        state["probes"][moving] = self._probes[: len(moving)]


def probe_words(optimizer: Optimizer, size: int, seeds: Tensor, steps: Tensor, count: int) -> Tensor | None:
    """The random words behind the probes [F, U, size / 32] of `count` steps, where the optimiser wants products.

    All at once: a generator of many small operations costs more than it draws if each chunk and step calls it.
    """
    if "hv" not in optimizer.needs:
        return None
    every = steps[:, None] + torch.arange(0, count, getattr(optimizer, "update_every", 1), device=steps.device)
    drawn = words(seeds.repeat_interleave(every.shape[1]), Stream.PROBE, every.flatten(), (size + 31) // 32)
    return drawn.view(*every.shape, -1)
