"""A start that fields share because it was learned from some of them: theta0 from which few steps go far.

From the weight-scaled initialization on, in rounds: a few data are fitted from theta0 for some steps of annealed Adam,
and theta0 moves by what became of them. Reptile (Nichol, Achiam & Schulman, "On First-Order Meta-Learning Algorithms",
2018) moves it towards the mean of the fitted params; first-order MAML (Finn, Abbeel & Levine, ICML 2017, section 5.2)
against the mean of the gradients at them, as if the steps between were not there. For neural fields: Sitzmann et al.,
"MetaSDF" (NeurIPS 2020), and Tancik et al., "Learned Initializations for Optimizing Coordinate-Based Neural
Representations" (CVPR 2021).

Differences: the steps are those of the engine, minibatches and schedule included, and the gradients of first-order MAML
are those of log(loss), which is what a quality in dB is made of, so that fields that are nearly fitted count as much as
the others.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from nfscale.engine.batch import MINIMUM_SLOTS, Batch, Slot
from nfscale.engine.dispatch import Step, StepName, chosen
from nfscale.engine.sampling import Sampler, Sampling
from nfscale.engine.step import stack_samples, training_samples
from nfscale.fields import Field, theta0_of
from nfscale.optim import Adam, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Samples, Signal


class Learner(Protocol):
    """The contract of every entry of `LEARNERS`: how many data are fitted how far, and what theta0 makes of it."""

    @property
    def data(self) -> int: ...

    @property
    def rounds(self) -> int: ...

    @property
    def tasks(self) -> int: ...

    @property
    def inner_steps(self) -> int: ...

    @property
    def outer_rate(self) -> float: ...

    def outer_step(self, theta0: Tensor, fitted: Tensor, slopes: Tensor, moments: Tensor, done: int) -> Tensor:
        """The next theta0 [P] from fitted params [T, P] and the gradients of log(loss) at them, after `done` rounds.

        `moments` [2, P] begins at zero and is the learner's own to move.
        """
        ...


@dataclass(frozen=True)
class Reptile:
    """theta0 moves a share of the way to the mean of the fitted params; the share falls to zero linearly."""

    data: int = 256
    """That are learned from: a seeded sample of the dataset."""
    rounds: int = 200
    tasks: int = 16
    """Data that are fitted in a round."""
    inner_steps: int = 50
    """Of each of them."""
    outer_rate: float = 0.5

    def __post_init__(self) -> None:
        _refuse_bad(self)

    def outer_step(self, theta0: Tensor, fitted: Tensor, slopes: Tensor, moments: Tensor, done: int) -> Tensor:
        share = min(self.outer_rate, 1.0) * (1 - done / self.rounds)
        return theta0 + share * (fitted.mean(dim=0) - theta0)


@dataclass(frozen=True)
class FirstOrderMAML:
    """theta0 takes a step of Adam, whose rate falls to zero along a cosine, on the gradients at the fitted params."""

    data: int = 256
    """As of reptile, and so are the next three."""
    rounds: int = 200
    tasks: int = 16
    inner_steps: int = 50
    outer_rate: float = 1e-4
    """Of Adam."""

    _BETAS: ClassVar[tuple[float, float]] = (0.9, 0.99)

    def __post_init__(self) -> None:
        _refuse_bad(self)

    def outer_step(self, theta0: Tensor, fitted: Tensor, slopes: Tensor, moments: Tensor, done: int) -> Tensor:
        adam = Adam(self.outer_rate, Schedule("cosine", self.rounds), *self._BETAS)
        size, correction = adam.step_sizes(torch.tensor(done), torch.tensor(1.0))
        gradient = slopes.mean(dim=0)
        moments[0].lerp_(gradient, 1 - adam.beta1)
        moments[1].lerp_(gradient.square(), 1 - adam.beta2)
        return theta0 - size * moments[0] / (moments[1].sqrt() / correction + adam.epsilon)


def _refuse_bad(learner: Learner) -> None:
    for name in ("data", "rounds", "tasks", "inner_steps"):
        if getattr(learner, name) < 1:
            raise ValueError(f"learning.{name} is at least 1, got {getattr(learner, name)}")
    if learner.outer_rate <= 0:
        raise ValueError(f"learning.outer_rate is above 0, got {learner.outer_rate}")


LEARNERS: dict[str, type] = {"reptile": Reptile, "fomaml": FirstOrderMAML}


@dataclass(frozen=True)
class LearnedStart:
    """Where fields start, and what it took to learn it."""

    theta0: Tensor
    """float32 [P], on the CPU."""
    data: int
    """That it was learned from."""
    field_steps: int
    """Optimiser steps of all data in all rounds."""
    loss_before: float
    """After the inner steps from the drawn start: geometric mean over the data of the first round."""
    loss_after: float
    """Likewise from theta0, of the same data and minibatches."""

    def figures(self) -> dict[str, float]:
        """All but theta0."""
        names = ("data", "field_steps", "loss_before", "loss_after")
        return {name: getattr(self, name) for name in names}


def learn_start(
    field: Field,
    signal: Signal,
    data: Sequence[tuple[str, Samples]],
    *,
    learner: Learner,
    learning_rate: float,
    seed: int,
    theta0: Tensor | None = None,
    samples: int | Literal["full"] = "full",
    sampling: Sampling = "stratified",
    step: StepName = "auto",
    device: torch.device | str | None = None,
) -> LearnedStart:
    """Learn theta0 from data of one kind; a function of the data, the learner and the seed.

    Args:
        data: (id, samples) pairs; what they hold back or are checked on is not looked at.
        learning_rate: of Adam in the inner steps, with cosine decay.
        theta0: float32 [P], where learning begins; by default where `fit` would start for this seed.
        samples, sampling, step: as in `fit`; sampling="error" is here "stratified".

    Raises:
        ValueError: if the data are of several kinds or none, or if what was learned is worse than where it began.
    """
    if len({part.kind for _, part in data}) != 1:
        raise ValueError("a start is learned from data of one kind: one sample count, and a mask in all or none")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    optimizer: Any = Adam(learning_rate, Schedule("cosine", learner.inner_steps))
    available = data[0][1].kind.count
    inner = _Inner(
        field,
        signal,
        optimizer,
        Sampler(available, available if samples == "full" else samples, _without_errors(sampling)),
        chosen(step, device, field, signal, optimizer),
        [(datum_id, replace(part, check=None, heldout=None)) for datum_id, part in data],
        learner.inner_steps,
        seed,
        device,
    )
    drawn = (theta0_of(field, seed) if theta0 is None else theta0).to(device)
    row, moments = drawn, torch.zeros((2, *drawn.shape), device=device)
    rounds = list(_rounds([datum_id for datum_id, _ in data], learner, seed))
    before = math.nan
    for done, places in enumerate(rounds):
        fitted, losses, slopes = inner.fits(row, places, done)
        before = _geometric_mean(losses) if done == 0 else before
        row = learner.outer_step(row, fitted, slopes, moments, done)
    after = _geometric_mean(inner.fits(row, rounds[0], 0)[1])
    if not after < before:
        raise ValueError(
            f"after {learner.inner_steps} steps the fields have a loss of {after:.3g} from the start that was learned, "
            f"and of {before:.3g} from where it began; {_WAY_OUT}"
        )
    taken = learner.inner_steps * sum(map(len, [*rounds, rounds[0]]))
    return LearnedStart(row.cpu(), len(data), taken, before, after)


_WAY_OUT = "use a smaller learning.outer_rate, more learning.rounds, or field.init=shared"


@dataclass(frozen=True)
class _Inner:
    """The fits of a round."""

    field: Field
    signal: Signal
    optimizer: Any  # Adam
    sampler: Sampler
    step: Step
    data: Sequence[tuple[str, Samples]]
    steps: int
    seed: int
    device: torch.device

    def fits(self, row: Tensor, places: Sequence[int], number: int) -> tuple[Tensor, Tensor, Tensor]:
        """What some data become from a start [P]: params [T, P], losses [T] and the slopes of their logarithms [T, P].

        Losses and slopes are those on the minibatch that would come next. Fits that diverge are left out.

        Args:
            number: of the round, by which its minibatches are drawn.

        Raises:
            ValueError: if more than half of them diverge.
        """
        ids = [self.data[place][0] for place in places]
        together = stack_samples([self.data[place][1] for place in places], self.device)
        batch = Batch(
            self.field,
            self.signal,
            self.optimizer,
            self.sampler,
            None,
            rows=row.repeat(len(places), 1),
            samples=together,
            seeds=as_tensor([datum_seed(self.seed, f"{number}\0{one}") for one in ids], self.device),
            slots=[Slot(one, 0) for one in ids],
            step=self.step,
        )
        batch.advance(self.steps)
        positions = None
        if not self.sampler.is_full:
            positions = self.sampler.positions(batch.seeds, batch.steps, 1)[:, 0]
        part = training_samples(self.signal, batch.samples, positions, batch.seeds, batch.steps)
        losses, gradients = self.step.gradient(self.field, self.signal, batch.rows, part)
        good = torch.isfinite(losses) & torch.isfinite(batch.rows).all(dim=1)
        if 2 * int(good.sum()) < len(places):
            raise ValueError(f"the fits of round {number + 1} diverged from the start that is learned; {_WAY_OUT}")
        return batch.rows[good], losses[good], gradients[good] / losses[good, None]


def _geometric_mean(losses: Tensor) -> float:
    return math.exp(float(losses.double().log().mean()))


def _without_errors(sampling: Sampling) -> Sampling:
    return "stratified" if sampling == "error" else sampling


def _rounds(ids: Sequence[str], learner: Learner, seed: int) -> Iterator[list[int]]:
    """Which data each round fits: pass after pass over all of them, each in an order of its own."""
    passes = (
        sorted(range(len(ids)), key=lambda place, number=number: datum_seed(seed, f"{number}\0order\0{ids[place]}"))
        for number in count()
    )
    order = chain.from_iterable(passes)
    for _ in range(learner.rounds):
        yield list(islice(order, max(learner.tasks, MINIMUM_SLOTS)))
