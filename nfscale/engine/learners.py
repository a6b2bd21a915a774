"""How a shared start is learned: how many data are fitted how far, and how theta0 moves by what becomes of them.

Reptile (Nichol, Achiam & Schulman, "On First-Order Meta-Learning Algorithms", 2018) moves it towards the mean of the
fitted params; first-order MAML (Finn, Abbeel & Levine, ICML 2017, section 5.2) against the mean of the gradients at
them, as if the steps between were not there; MAML (ibid., section 2.2) against the gradients through all of the steps;
and Meta-SGD (Li, Zhou, Chen & Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017) learns by those a
rate of each param beside theta0.

Differences: gradients are those of log(loss), which is what a quality in dB is made of, so that fields that are nearly
fitted count as much as the others. The steps are those of Adam, with the schedule that unseen data will have; the
rates of Meta-SGD are factors on them. Through Adam, whose second moment forgets quickly, few steps go much further than
through plain gradient descent.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nfscale.optim import Adam, Schedule


class Learner(Protocol):
    """What every entry of `LEARNERS` has; beside it `outer_step`, or it is a `MAML`."""

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


class FirstOrder(Learner, Protocol):
    """A learner that looks at the end of the fits alone."""

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


@dataclass(frozen=True)
class MAML:
    """theta0 takes a step of Adam on the gradients through the steps of the fits, see `nfscale.engine.unrolled`.

    The first rounds take a quarter of the steps, and only after a quarter of the rounds they take all of them: through
    many steps from a start that nothing has been learned of, gradients say little.
    """

    data: int = 256
    """As of reptile, and so are the next three."""
    rounds: int = 1000
    tasks: int = 16
    inner_steps: int = 20
    """That unseen data should need: a third, say, of what they need from a draw."""
    outer_rate: float = 1e-3
    """Of Adam, along a cosine."""

    learns_rates: ClassVar[bool] = False
    BETAS: ClassVar[tuple[float, float]] = (0.9, 0.99)

    def __post_init__(self) -> None:
        _refuse_bad(self)

    def steps_after(self, done: int) -> int:
        """Of the fits in the round after `done` rounds."""
        return math.ceil(self.inner_steps * min(1.0, 0.25 + 3 * done / self.rounds))

    def outer_rates(self, done: int) -> tuple[float, ...]:
        """Of theta0, and of the logarithms of the factors where those are learned."""
        return (self.outer_rate * self._left(done),)

    def _left(self, done: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * done / self.rounds))


@dataclass(frozen=True)
class MetaSGD(MAML):
    """As maml, and with theta0 a factor of each param on the rate of optimizer.kind=adam."""

    rate_of_rates: float = 0.02
    """As outer_rate, of the logarithms of the factors."""

    learns_rates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate_of_rates <= 0:
            raise ValueError(f"learning.rate_of_rates is above 0, got {self.rate_of_rates}")

    def outer_rates(self, done: int) -> tuple[float, ...]:
        return (*super().outer_rates(done), self.rate_of_rates * self._left(done))


def _refuse_bad(learner: Learner) -> None:
    for name in ("data", "rounds", "tasks", "inner_steps"):
        if getattr(learner, name) < 1:
            raise ValueError(f"learning.{name} is at least 1, got {getattr(learner, name)}")
    if learner.outer_rate <= 0:
        raise ValueError(f"learning.outer_rate is above 0, got {learner.outer_rate}")


LEARNERS: dict[str, type] = {"reptile": Reptile, "fomaml": FirstOrderMAML, "maml": MAML, "metasgd": MetaSGD}
