"""A start that fields share because it was learned from some of them: theta0 from which few steps go far.

From the weight-scaled initialization on, in rounds: a few data are fitted from theta0 for some steps of annealed Adam,
and theta0 moves by what became of them, as one of the `LEARNERS` says. The steps are those of the engine, minibatches
and schedule included; where the learner looks through them, each is kept for the way back (`nfscale.engine.unrolled`).
For neural fields: Sitzmann et al., "MetaSDF" (NeurIPS 2020), and Tancik et al., "Learned Initializations for Optimizing
Coordinate-Based Neural Representations" (CVPR 2021).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, Literal

import torch
from torch import Tensor

from nfscale.engine.batch import MINIMUM_SLOTS, Batch, Slot
from nfscale.engine.dispatch import Step, StepName, chosen
from nfscale.engine.learners import MAML, FirstOrder, Learner
from nfscale.engine.sampling import Sampler, Sampling
from nfscale.engine.step import stack_samples, training_samples
from nfscale.engine.unrolled import Descent, Unrolled
from nfscale.fields import Field, theta0_of
from nfscale.optim import Adam, Scaled, Schedule
from nfscale.rng import as_tensor, datum_seed
from nfscale.signals import Samples, Signal


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
    factors: Tensor | None = None
    """float32 [P], on the CPU: what was learned beside theta0, if anything was; see `nfscale.optim.Scaled`."""

    def figures(self) -> dict[str, float]:
        """All but the tensors."""
        names = ("data", "field_steps", "loss_before", "loss_after")
        return {name: getattr(self, name) for name in names}


def learn_start(
    field: Field,
    signal: Signal,
    data: Sequence[tuple[str, Samples]],
    *,
    learner: FirstOrder | MAML,
    learning_rate: float,
    betas: tuple[float, float] = (Adam.beta1, Adam.beta2),
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
        learning_rate, betas: of Adam in the inner steps, with cosine decay.
        theta0: float32 [P], where learning begins; by default where `fit` would start for this seed.
        samples, sampling, step: as in `fit`; sampling="error" is here "stratified".

    Raises:
        ValueError: if the data are of several kinds or none, or if what was learned is worse than where it began.
    """
    if len({part.kind for _, part in data}) != 1:
        raise ValueError("a start is learned from data of one kind: one sample count, and a mask in all or none")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    optimizer: Any = Adam(learning_rate, Schedule("cosine", learner.inner_steps), *betas)
    available = data[0][1].kind.count
    inner = _Inner(
        field,
        signal,
        optimizer,
        Sampler(available, available if samples == "full" else samples, _without_errors(sampling)),
        chosen(step, device, field, signal, optimizer),
        step,
        [(datum_id, replace(part, check=None, heldout=None)) for datum_id, part in data],
        learner.inner_steps,
        seed,
        device,
    )
    drawn = (theta0_of(field, seed) if theta0 is None else theta0).to(device)
    rounds = list(_rounds([datum_id for datum_id, _ in data], learner, seed))
    if isinstance(learner, MAML):
        row, factors, before, taken = _descended(inner, learner, rounds, drawn)
    else:
        row, factors, before, taken = _moved(inner, learner, rounds, drawn)
    after = _geometric_mean(inner.scaled(factors).fits(row, rounds[0], 0)[1])
    if not after < before:
        raise ValueError(
            f"after {learner.inner_steps} steps the fields have a loss of {after:.3g} from the start that was learned, "
            f"and of {before:.3g} from where it began; {_WAY_OUT}"
        )
    taken += learner.inner_steps * len(rounds[0])
    return LearnedStart(row.cpu(), len(data), taken, before, after, None if factors is None else factors.cpu())


_WAY_OUT = "use a smaller learning.outer_rate, more learning.rounds, or field.init=shared"


_Outcome = tuple[Tensor, Tensor | None, float, int]
"""theta0 and factors after all rounds, the loss before them, and the steps that they took."""


def _moved(inner: "_Inner", learner: FirstOrder, rounds: list[list[int]], row: Tensor) -> _Outcome:
    """By what the fits end as."""
    moments, before = torch.zeros((2, *row.shape), device=row.device), math.nan
    for done, places in enumerate(rounds):
        fitted, losses, slopes = inner.fits(row, places, done)
        before = _geometric_mean(losses) if done == 0 else before
        row = learner.outer_step(row, fitted, slopes, moments, done)
    return row, None, before, learner.inner_steps * sum(map(len, rounds))


def _descended(inner: "_Inner", learner: MAML, rounds: list[list[int]], row: Tensor) -> _Outcome:
    """By gradients through the fits."""
    before, taken = _geometric_mean(inner.fits(row, rounds[0], 0)[1]), learner.inner_steps * len(rounds[0])
    descent = Descent(learner, row)
    for done, places in enumerate(rounds):
        fits = inner.unrolled(places, done, learner.steps_after(done))
        try:
            descent.go_on(fits, done)
        except FloatingPointError:
            raise ValueError(_diverged(done)) from None
        taken += fits.count * len(places)
    return descent.theta0, descent.factors, before, taken


def _diverged(done: int) -> str:
    return f"the fits of round {done + 1} diverged from the start that is learned; {_WAY_OUT}"


@dataclass(frozen=True)
class _Inner:
    """The fits of a round."""

    field: Field
    signal: Signal
    optimizer: Any  # Adam, or Scaled
    sampler: Sampler
    step: Step
    step_name: StepName
    data: Sequence[tuple[str, Samples]]
    steps: int
    seed: int
    device: torch.device

    def scaled(self, factors: Tensor | None) -> "_Inner":
        """Likewise, with a factor [P] on the rate of each param."""
        if factors is None:
            return self
        optimizer: Any = Scaled(self.optimizer, factors)
        step = chosen(self.step_name, self.device, self.field, self.signal, optimizer)
        return replace(self, optimizer=optimizer, step=step)

    def together(self, places: Sequence[int], number: int) -> tuple[Samples, Tensor]:
        """Data that are fitted in a round, and the seeds of their minibatches: [T, N, ...], int64 [T]."""
        samples = stack_samples([self.data[place][1] for place in places], self.device)
        seeds = [datum_seed(self.seed, f"{number}\0{self.data[place][0]}") for place in places]
        return samples, as_tensor(seeds, self.device)

    def unrolled(self, places: Sequence[int], number: int, count: int) -> Unrolled:
        """The fits of a round, to go back through."""
        return Unrolled(
            self.field, self.signal, self.optimizer, self.sampler, self.step, *self.together(places, number), count
        )

    def fits(self, row: Tensor, places: Sequence[int], number: int) -> tuple[Tensor, Tensor, Tensor]:
        """What some data become from a start [P]: params [T, P], losses [T] and the slopes of their logarithms [T, P].

        Losses and slopes are those on the minibatch that would come next. Fits that diverge are left out.

        Args:
            number: of the round, by which its minibatches are drawn.

        Raises:
            ValueError: if more than half of them diverge.
        """
        together, seeds = self.together(places, number)
        batch = Batch(
            self.field,
            self.signal,
            self.optimizer,
            self.sampler,
            None,
            rows=row.repeat(len(places), 1),
            samples=together,
            seeds=seeds,
            slots=[Slot(self.data[place][0], 0) for place in places],
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
            raise ValueError(_diverged(number))
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
