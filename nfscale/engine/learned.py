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
from typing import ClassVar, Literal, Protocol

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

_BEGINNING = 0.1  # of the rounds, and as many at the end: what is compared to tell whether anything was learned


class Learner(Protocol):
    """The contract of every entry of `LEARNERS`: how many data are fitted how far, and what theta0 makes of it."""

    data: int
    rounds: int
    tasks: int
    inner_steps: int
    outer_rate: float

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
    field_steps: int
    """Optimiser steps of all data in all rounds."""
    loss_before: float
    """After the inner steps, from the drawn start: geometric mean over the data of the first tenth of the rounds."""
    loss_after: float
    """Likewise of the last tenth."""

    def figures(self) -> dict[str, float]:
        """All but theta0."""
        return {"field_steps": self.field_steps, "loss_before": self.loss_before, "loss_after": self.loss_after}


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
    data = [(datum_id, replace(part, check=None, heldout=None)) for datum_id, part in data]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    optimizer = Adam(learning_rate, Schedule("cosine", learner.inner_steps))
    available = data[0][1].kind.count
    sampler = Sampler(available, available if samples == "full" else samples, _without_errors(sampling))
    taken = chosen(step, device, field, signal, optimizer)
    row = (theta0_of(field, seed) if theta0 is None else theta0).to(device)
    moments = torch.zeros((2, *row.shape), device=device)
    history: list[float] = []
    for done, drawn in enumerate(_rounds([datum_id for datum_id, _ in data], learner, seed)):
        part = stack_samples([data[place][1] for place in drawn], device)
        seeds = as_tensor([datum_seed(seed, f"{done}\0{data[place][0]}") for place in drawn], device)
        slots: list[Slot | None] = [Slot(data[place][0], 0) for place in drawn]
        rows = row.repeat(len(drawn), 1)
        batch = Batch(field, signal, optimizer, sampler, None, rows, part, seeds, slots, taken)
        batch.advance(learner.inner_steps)
        losses, slopes = _slopes(batch, taken)
        good = torch.isfinite(losses) & torch.isfinite(batch.rows).all(dim=1)
        if 2 * int(good.sum()) < len(drawn):
            raise ValueError(f"the fits of round {done + 1} diverged from the start that is learned; {_WAY_OUT}")
        history.append(float(losses[good].double().log().mean()))
        row = learner.outer_step(row, batch.rows[good], slopes[good], moments, done)
    few = max(1, round(_BEGINNING * len(history)))
    before, after = (math.exp(sum(part) / few) for part in (history[:few], history[-few:]))
    if learner.rounds > 1 and not after < before:
        raise ValueError(
            f"after {learner.inner_steps} steps the fields have a loss of {after:.3g} from the start that was learned, "
            f"and of {before:.3g} from where it began; {_WAY_OUT}"
        )
    return LearnedStart(row.cpu(), learner.rounds * learner.tasks * learner.inner_steps, before, after)


_WAY_OUT = "use a smaller learning.outer_rate, more learning.rounds, or field.init=shared"


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


def _slopes(batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
    """Losses [F] on the minibatch that would come next, and the gradients of their logarithms [F, P]."""
    positions = None
    if not batch.sampler.is_full:
        positions = batch.sampler.positions(batch.seeds, batch.steps, 1)[:, 0]
    part = training_samples(batch.signal, batch.samples, positions, batch.seeds, batch.steps)
    losses, gradients = step.gradient(batch.field, batch.signal, batch.rows, part)
    return losses, gradients / losses[:, None]
