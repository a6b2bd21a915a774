"""The Hessian of one field's loss: whole, by its products, and the Gauss-Newton part's diagonal. All in float64.

A loss of values f(theta) has H = J^T A J + (terms with second derivatives of f), with J the derivatives of the values
by the weights and A those of the loss by the values twice, which for squared errors is a constant: the first term is
Gauss and Newton's, and the second vanishes where the residuals do.

Axis 0 of the params is the field, and fields do not know each other. So the Hessian's columns are products of as many
copies of the field with unit vectors, and the gradients of single samples those of as many copies with one sample each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nfscale.diagnose.subject import Subject
from nfscale.errors import CallerError
from nfscale.fields import Field
from nfscale.layout import Params
from nfscale.optim.curvature import gradient_and_hvp
from nfscale.signals import Samples, Signal

MOST_WEIGHTS = 3_000
"""Of a field whose whole Hessian is taken: 72 MB, and seconds for its eigenvalues each time it is preconditioned."""
MOST_SAMPLES = 8_192
"""That a loss is taken over, evenly spread; a word of speech has 5,000."""
_CHUNK_POINTS = 1 << 15
"""Samples of all copies at once: their activations stay in cache."""


@dataclass(frozen=True)
class Loss:
    """The loss of one field over its samples, as a function of its weights [P]."""

    field: Field
    signal: Signal
    samples: Samples
    """float64, at most 8,192."""

    @classmethod
    def of(cls, subject: Subject) -> "Loss":
        taken = Samples(subject.samples.coordinates, subject.samples.values, subject.samples.mask)
        apart = -(-len(taken.values) // MOST_SAMPLES)
        return cls(subject.field, subject.signal, taken.map(lambda tensor: tensor[::apart].double()))

    def products(self, row: Tensor, vectors: Tensor) -> Tensor:
        """H v of each vector: [P], [K, P] -> [K, P]."""
        copies = max(1, _CHUNK_POINTS // (len(self.samples.values) * self.signal.points_per_sample))
        return torch.cat([self._products(row.double(), part) for part in vectors.double().split(copies)])

    def _products(self, row: Tensor, vectors: Tensor) -> Tensor:
        count, unravel = len(vectors), self.field.layout.unravel
        samples = self.samples.map(lambda tensor: tensor.expand(count, *tensor.shape))

        def loss_of(params: Params) -> Tensor:
            return self.signal.loss(self.signal.predict(partial(self.field.apply, params), samples), samples)

        products = gradient_and_hvp(loss_of, unravel(row.expand(count, -1)), unravel(vectors))[2]
        return self.field.layout.ravel(products)

    def hessian(self, row: Tensor) -> Tensor:
        """H [P, P] at weights [P]."""
        columns = self.products(row, torch.eye(self.field.layout.size, dtype=torch.float64))
        return (columns + columns.mT) / 2  # equal but for rounding

    def refuse_whole(self) -> None:
        """Refuse a field whose whole Hessian would be too large.

        Raises:
            CallerError: saying so.
        """
        size = self.field.layout.size
        if size > MOST_WEIGHTS:
            raise CallerError(
                f"the whole Hessian is taken of fields of at most {MOST_WEIGHTS:,} weights, and this one has {size:,}; "
                "make it narrower (field.width=16), or ask for --extremes, which needs its products alone"
            )

    def gauss_newton_diagonal(self, row: Tensor) -> Tensor:
        """diag(J^T J) [P] at weights [P], a sample counting by its weight in the mask, over the sum of those."""
        total = torch.zeros(self.field.layout.size, dtype=torch.float64)
        weights = torch.ones(len(self.samples.values)) if self.samples.mask is None else self.samples.mask
        for jacobian, part in self._jacobians(row.double()):
            total += part @ jacobian.square()
        return total / weights.sum()

    def _jacobians(self, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Derivatives [n, P] of one value of each of n samples, and the samples' weights [n]; by and by all values."""
        layout, every = self.field.layout, self.samples
        most = max(1, (_CHUNK_POINTS * 8) // layout.size)
        for first in range(0, len(every.values), most):
            part = every.map(lambda tensor, first=first: tensor[first : first + most, None])
            rows = row.expand(len(part.values), -1)
            leaves = {name: p.detach().requires_grad_() for name, p in layout.unravel(rows).items()}
            values = self.signal.predict(partial(self.field.apply, leaves), part).flatten(1)
            weights = torch.ones(len(rows), dtype=torch.float64) if part.mask is None else part.mask.flatten()
            for index in range(values.shape[1]):
                grads = torch.autograd.grad(values[:, index].sum(), list(leaves.values()), retain_graph=True)
                yield layout.ravel(dict(zip(leaves, grads, strict=True))), weights
