"""The Hessian of one field along its training: what preconditioners make of it, and what probes see of it.

Follows Chng, Saratchandran & Lucey, "Preconditioners for the Stochastic Training of Neural Fields" (CVPR 2025):
condition numbers (figure 1), the sparsity of Hv (figure 3), and Adam read as a diagonal Gauss-Newton method.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.diagnose.lanczos import extreme_eigenvalues
from nfscale.diagnose.loss import Loss
from nfscale.diagnose.preconditioners import Condition, condition, known_diagonals, scaling
from nfscale.diagnose.probes import (
    COUNTS,
    Estimates,
    LayerSparsity,
    SecondMoment,
    drawn_probes,
    equilibrated_estimate,
    estimates,
    second_moment,
    sparsity,
)
from nfscale.diagnose.subject import Subject
from nfscale.diagnose.training import Moment, along_training


@dataclass(frozen=True)
class HessianMoment:
    """The whole Hessian after so many steps."""

    steps: int
    quality: float
    conditions: list[Condition]
    spectra: dict[str, Tensor]
    """Absolute eigenvalues [P] by preconditioner, from the largest on, over that."""
    layers: list[LayerSparsity]
    estimates: list[Estimates]
    second: SecondMoment | None
    """Of Adam, after its first step."""
    clouds: tuple[Tensor, Tensor] | None
    """diag(J^T J) and Adam's v, [P] each: what `second` is of."""


@dataclass(frozen=True)
class Extremes:
    """The ends of the spectrum with one preconditioner, signs counted."""

    preconditioner: str
    largest: float
    smallest: float


@dataclass(frozen=True)
class ExtremesMoment:
    """What products alone say of the Hessian after so many steps."""

    steps: int
    quality: float
    extremes: list[Extremes]
    layers: list[LayerSparsity]


def hessian_along_training(subject: Subject, moments: Sequence[int]) -> Iterator[HessianMoment]:
    """The Hessian after these numbers of steps of the job's optimiser.

    Raises:
        CallerError: if the field has more than 3,000 weights.
    """
    loss, layout = Loss.of(subject), subject.field.layout
    loss.refuse_whole()
    probes = drawn_probes(subject.job.seed, subject.datum_id, layout.size)
    for moment in along_training(subject, moments):
        hessian, gauss_newton = loss.hessian(moment.row), loss.gauss_newton_diagonal(moment.row)
        products = probes @ hessian
        diagonals = known_diagonals(hessian, gauss_newton)
        diagonals |= {f"esgd_{count}": equilibrated_estimate(products[:count]) for count in COUNTS}
        second = moment.second_moment
        if second is not None:
            diagonals["adam"] = second.double().sqrt()
        found = {name: condition(name, hessian, diagonal) for name, diagonal in diagonals.items()}
        yield HessianMoment(
            moment.steps,
            moment.quality,
            [one for one, _ in found.values()],
            {name: shares for name, (_, shares) in found.items()},
            # From products by autograd: those with H have no exact zeros, but sums of rounded terms.
            sparsity(layout, loss.products(moment.row, probes)),
            estimates(hessian, probes, products),
            None if second is None else second_moment(layout, second, gauss_newton),
            None if second is None else (gauss_newton, second),
        )


def extremes_along_training(subject: Subject, moments: Sequence[int]) -> Iterator[ExtremesMoment]:
    """The ends of the spectrum and the sparsity of Hv, for fields whose Hessian is too large to be written down."""
    loss, layout = Loss.of(subject), subject.field.layout
    probes = drawn_probes(subject.job.seed, subject.datum_id, layout.size)
    for moment in along_training(subject, moments):
        products = loss.products(moment.row, probes)
        diagonals = {
            "none": torch.ones(layout.size, dtype=torch.float64),
            "gauss_newton": loss.gauss_newton_diagonal(moment.row),
            f"esgd_{len(probes)}": equilibrated_estimate(products),
        }
        if moment.second_moment is not None:
            diagonals["adam"] = moment.second_moment.double().sqrt()
        extremes = [_extremes(loss, moment, name, diagonal, probes[0]) for name, diagonal in diagonals.items()]
        yield ExtremesMoment(moment.steps, moment.quality, extremes, sparsity(layout, products))


def _extremes(loss: Loss, moment: Moment, name: str, diagonal: Tensor, start: Tensor) -> Extremes:
    scale = scaling(diagonal)

    def product(vector: Tensor) -> Tensor:
        return scale * loss.products(moment.row, (scale * vector)[None])[0]

    smallest, largest = extreme_eigenvalues(product, start)
    return Extremes(name, largest, smallest)
