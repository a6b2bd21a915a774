"""Fits that gradients go through: what `MAML` and `MetaSGD` learn by.

A round fits a few data for K steps of annealed Adam. The mean of log(loss) at their ends, on what the next few steps
would see, is what theta0 and the logarithms of the factors on the rates descend, by Adam on gradients of norm 1. The
way back through the steps needs no graph: the slope after a step gives the slope before it by one Hessian-vector
product of the batched step (reverse mode by hand; Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994), so a
step that is learned through costs about four that are only taken. Kept are 16 bytes for each weight, step and task.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nfscale.engine.dispatch import Step
from nfscale.engine.learners import MAML
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import training_samples
from nfscale.fields import Field
from nfscale.optim import Adam, Schedule
from nfscale.signals import Samples, Signal

_MEASURED_STEPS = 4
"""Whose samples tell how good a fit is: less noise than those of one, and no more than a few steps' work."""
_MEMORY, _LOST = 0.9, 0.5
"""Of the running mean of log(loss), and how far above its lowest it says that a descent is lost: 2.2 dB."""
_SMALLEST_SQUARE = 1e-20
"""Beside the mean square gradient of Adam: its root has a slope at zero too, and it is far below epsilon squared."""


@dataclass(frozen=True)
class Unrolled:
    """Some data, and steps of Adam on them as the engine takes them, each kept for the way back."""

    field: Field
    signal: Signal
    adam: Adam
    """Its rate and betas; its schedule is a cosine over the steps of the round."""
    sampler: Sampler
    step: Step
    samples: Samples
    """Of T data, [T, N, ...]."""
    seeds: Tensor
    """int64 [T], by which minibatches are drawn."""
    count: int
    """Of the steps."""

    def fitted(self, theta0: Tensor, factors: Tensor) -> "Path":
        """From theta0 [T, P], the rate of each param times its factor [T, P], all the steps on."""
        path = Path(self, factors, [theta0], [], [], [])
        mean, square = torch.zeros_like(theta0), torch.zeros_like(theta0)
        for number in range(self.count):
            _, gradient = self.step.gradient(self.field, self.signal, path.rows, self.part(number))
            mean = torch.lerp(mean, gradient, 1 - self.adam.beta1)
            square = torch.lerp(square, gradient.square(), 1 - self.adam.beta2)
            size, correction = self.sizes(number)
            root = (square + _SMALLEST_SQUARE).sqrt() / correction + self.adam.epsilon
            path.starts.append(path.rows - size * factors * mean / root)
            path.gradients.append(gradient)
            path.means.append(mean)
            path.squares.append(square)
        return path

    def part(self, number: int) -> Samples:
        """What the step of this number sees; the number after the last one is what fits are measured on."""
        steps = torch.full_like(self.seeds, number)
        if self.sampler.is_full:
            return training_samples(self.signal, self.samples, None, self.seeds, steps)
        at_once = 1 if number < self.count else _MEASURED_STEPS
        positions = self.sampler.positions(self.seeds, steps, at_once).flatten(1)
        return training_samples(self.signal, self.samples, positions, self.seeds, steps)

    def sizes(self, number: int) -> tuple[Tensor, Tensor]:
        """As `Adam.step_sizes`."""
        annealed = replace(self.adam, schedule=Schedule("cosine", self.count))
        return annealed.step_sizes(torch.tensor(number), torch.ones(()))


@dataclass(frozen=True)
class Path:
    """What the steps did: params [T, P] before each and after the last, gradients and moments of each."""

    fits: Unrolled
    factors: Tensor
    starts: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]

    @property
    def rows(self) -> Tensor:
        """Params [T, P] after all steps."""
        return self.starts[-1]

    def end(self) -> tuple[Tensor, Tensor]:
        """log(loss) [T] of where it ends and its slopes there [T, P], on the samples of the next few steps."""
        fits = self.fits
        losses, gradient = fits.step.gradient(fits.field, fits.signal, self.rows, fits.part(fits.count))
        return losses.log(), gradient / losses[:, None]

    def back(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """From slopes [T, P] at the end to those by theta0, and by the logarithms of the factors: [T, P] each."""
        fits, adam, by_rows = self.fits, self.fits.adam, slopes
        by_mean, by_square, by_factors = (torch.zeros_like(by_rows) for _ in range(3))
        for number in reversed(range(fits.count)):
            gradient, mean, square = self.gradients[number], self.means[number], self.squares[number]
            size, correction = fits.sizes(number)
            bare = (square + _SMALLEST_SQUARE).sqrt()
            root = bare / correction + adam.epsilon
            pull = size * self.factors * by_rows / root
            by_factors -= pull * mean
            by_mean = by_mean - pull
            by_square = by_square + pull * mean / root / (2 * correction * bare)
            by_gradient = (1 - adam.beta1) * by_mean + 2 * (1 - adam.beta2) * gradient * by_square
            *_, through = fits.step.gradient_and_hvp(
                fits.field, fits.signal, self.starts[number], fits.part(number), by_gradient
            )
            by_rows = by_rows + through
            by_mean, by_square = adam.beta1 * by_mean, adam.beta2 * by_square
        return by_rows, by_factors


class Descent:
    """theta0 and factors on the way down.

    Fits of many steps are chaotic in some regions, where gradients lead nowhere: a descent that has got there goes back
    to where it was best, and on at half the rates.
    """

    def __init__(self, learner: MAML, theta0: Tensor) -> None:
        self.learner = learner
        self._rows = [
            theta0.clone().requires_grad_(),
            torch.zeros_like(theta0, requires_grad=learner.learns_rates),  # the logarithms of the factors
        ]
        groups = [{"params": [row]} for row in self._rows if row.requires_grad]
        self._adam = torch.optim.Adam(groups, betas=learner.BETAS)
        self._share = 1.0  # of the rates that the learner says
        self._mean = math.nan  # of log(loss) over the last rounds of all steps
        self._best, self._best_rows = math.inf, [row.detach().clone() for row in self._rows]

    @property
    def theta0(self) -> Tensor:
        """float32 [P]."""
        return self._rows[0].detach()

    @property
    def factors(self) -> Tensor | None:
        """float32 [P] on the rates; None where they are not learned."""
        return self._rows[1].detach().exp() if self.learner.learns_rates else None

    def go_on(self, fits: Unrolled, done: int) -> None:
        """One round after `done` of them. Fits that diverge are left out.

        Raises:
            FloatingPointError: if more than half of them diverge.
        """
        theta0, logarithms = (row.detach().repeat(len(fits.seeds), 1) for row in self._rows)
        path = fits.fitted(theta0, logarithms.exp())
        losses, slopes = path.end()
        if fits.count == self.learner.inner_steps and self._is_lost(float(losses.nan_to_num(math.inf).median())):
            self._go_back()
            return
        learned = [(row, slope) for row, slope in zip(self._rows, path.back(slopes), strict=True) if row.requires_grad]
        for group, (row, slope), rate in zip(
            self._adam.param_groups, learned, self.learner.outer_rates(done), strict=True
        ):
            row.grad, group["lr"] = _typical(slope), rate * self._share
        self._adam.step()

    def _is_lost(self, loss: float) -> bool:
        """Whether a round, with those before it, says that theta0 has become worse."""
        known = math.isfinite(self._mean)
        self._mean = _MEMORY * self._mean + (1 - _MEMORY) * loss if known else loss
        if self._mean < self._best:
            self._best, self._best_rows = self._mean, [row.detach().clone() for row in self._rows]
        return self._mean > self._best + _LOST

    def _go_back(self) -> None:
        for row, best in zip(self._rows, self._best_rows, strict=True):
            row.detach().copy_(best)
        self._adam.state.clear()
        self._mean, self._share = self._best, self._share / 2


def _typical(gradients: Tensor) -> Tensor:
    """The direction of tasks together, of their gradients [T, P], none of them longer than the median: [P] of norm 1.

    Gradients through fits that go astray are a hundred times longer than the others, and say nothing.
    """
    norms = gradients.norm(dim=1, keepdim=True)
    good = torch.isfinite(norms[:, 0])
    if 2 * int(good.sum()) < len(norms):
        raise FloatingPointError
    mean = (gradients[good] * (norms[good].median() / norms[good]).clamp(max=1)).mean(dim=0)
    return mean / mean.norm()
