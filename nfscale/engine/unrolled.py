"""Fits that gradients go through: what `MAML` and `MetaSGD` learn by.

A round fits a few data for K steps of annealed Adam, each step part of one graph. The mean of log(loss) at their ends,
on what the next few steps would see, is what theta0 and the logarithms of the factors on the rates descend, by Adam on
gradients of norm 1. The graph holds what K steps of all tasks compute: about 40 bytes for each unit of
each layer, sample, step and task.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.engine.learners import MAML
from nfscale.engine.sampling import Sampler
from nfscale.engine.step import losses_of, training_samples
from nfscale.fields import Field
from nfscale.optim import Adam, Schedule
from nfscale.signals import Samples, Signal

_MEASURED_STEPS = 4
"""Whose samples tell how good a fit is: less noise than those of one, and no more than a few steps' work."""
_SMALLEST_SQUARE = 1e-20
"""Beside the mean square gradient of Adam: its root has a slope at zero too, and it is far below epsilon squared."""


@dataclass(frozen=True)
class Unrolled:
    """Steps of Adam from theta0, as the engine takes them, but within a graph."""

    field: Field
    signal: Signal
    learning_rate: float
    betas: tuple[float, float]
    sampler: Sampler

    def fitted(self, theta0: Tensor, factors: Tensor, samples: Samples, seeds: Tensor, count: int) -> Tensor:
        """Params [T, P] after `count` steps from theta0 [T, P], the rate of each times its factor [T, P].

        Args:
            samples: of T data, [T, N, ...].
            seeds: int64 [T], by which minibatches are drawn.
        """
        fields = len(seeds)
        adam = Adam(self.learning_rate, Schedule("cosine", count), *self.betas)
        steps = torch.zeros(fields, dtype=torch.int64, device=seeds.device)
        positions = None if self.sampler.is_full else self.sampler.positions(seeds, steps, count)
        rows, mean, square = theta0, torch.zeros_like(theta0), torch.zeros_like(theta0)
        for number in range(count):
            drawn = None if positions is None else positions[:, number]
            part = training_samples(self.signal, samples, drawn, seeds, steps + number)
            (gradient,) = torch.autograd.grad(self._losses(rows, part).sum(), rows, create_graph=True)
            mean = adam.beta1 * mean + (1 - adam.beta1) * gradient
            square = adam.beta2 * square + (1 - adam.beta2) * gradient.square()
            size, correction = adam.step_sizes(steps[0] + number, torch.ones((), device=seeds.device))
            root = (square + _SMALLEST_SQUARE).sqrt() / correction + adam.epsilon
            rows = rows - size * factors * mean / root
        return rows

    def log_losses(self, rows: Tensor, samples: Samples, seeds: Tensor, count: int) -> Tensor:
        """Of params [T, P] after `count` steps, on the samples of the next few: [T]."""
        steps = torch.full_like(seeds, count)
        positions = None
        if not self.sampler.is_full:
            positions = self.sampler.positions(seeds, steps, _MEASURED_STEPS).flatten(1)
        return self._losses(rows, training_samples(self.signal, samples, positions, seeds, steps)).log()

    def _losses(self, rows: Tensor, samples: Samples) -> Tensor:
        return losses_of(self.field, self.signal, samples)(self.field.layout.unravel(rows))


class Descent:
    """theta0 and factors on the way down."""

    def __init__(self, learner: MAML, unrolled: Unrolled, theta0: Tensor) -> None:
        self.learner, self.unrolled = learner, unrolled
        self._rows = [
            theta0.clone().requires_grad_(),
            torch.zeros_like(theta0, requires_grad=learner.learns_rates),  # the logarithms of the factors
        ]
        groups = [{"params": [row]} for row in self._rows if row.requires_grad]
        self._adam = torch.optim.Adam(groups, betas=learner.BETAS)

    @property
    def theta0(self) -> Tensor:
        """float32 [P]."""
        return self._rows[0].detach()

    @property
    def factors(self) -> Tensor | None:
        """float32 [P] on the rates; None where they are not learned."""
        return self._rows[1].detach().exp() if self.learner.learns_rates else None

    def go_on(self, samples: Samples, seeds: Tensor, done: int) -> int:
        """One round after `done` of them; how many steps its fits took in all. Fits that diverge are left out.

        Raises:
            FloatingPointError: if more than half of them diverge.
        """
        count = self.learner.steps_after(done)
        each = [row.detach().repeat(len(seeds), 1).requires_grad_(row.requires_grad) for row in self._rows]
        rows = self.unrolled.fitted(each[0], each[1].exp(), samples, seeds, count)
        self.unrolled.log_losses(rows, samples, seeds, count).sum().backward()
        for group, tasks, rate in zip(self._adam.param_groups, each, self.learner.outer_rates(done), strict=False):
            (row,) = group["params"]
            row.grad, group["lr"] = _typical(tasks.grad), rate
        self._adam.step()
        return count * len(seeds)


def _typical(gradients: Tensor | None) -> Tensor:
    """The direction of tasks together, of their gradients [T, P], none of them longer than the median: [P] of norm 1.

    Gradients through fits that go astray are a hundred times longer than the others, and say nothing.
    """
    assert gradients is not None, "of what is learned"
    norms = gradients.norm(dim=1, keepdim=True)
    good = torch.isfinite(norms[:, 0])
    if 2 * int(good.sum()) < len(norms):
        raise FloatingPointError
    mean = (gradients[good] * (norms[good].median() / norms[good]).clamp(max=1)).mean(dim=0)
    return mean / mean.norm()
