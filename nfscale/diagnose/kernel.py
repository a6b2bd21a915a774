"""The empirical neural tangent kernel of one field (Jacot, Gabriel & Hongler, NeurIPS 2018).

K = J J^T with J the derivatives of the field's values at some samples by its weights. Gradient descent at a small rate
shrinks the residual along K's eigenvectors at rates in proportion to its eigenvalues.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.diagnose.subject import Subject
from nfscale.diagnose.training import along_training
from nfscale.fields import Field

_MOST_VALUES = 256
_CHUNK = 32
_ZERO = 1e-10  # of the largest eigenvalue: what float64 leaves of nothing


@dataclass(frozen=True)
class KernelStatistics:
    """Of the kernel at one moment."""

    steps: int
    quality: float
    """Of the fit at this moment, in the signal's unit."""
    largest: float
    """Eigenvalue, over the number of values."""
    condition: float
    """The largest eigenvalue over the smallest."""
    effective_rank: float
    """exp of the entropy of the eigenvalues as shares of their sum (Roy & Vetterli, EUSIPCO 2007)."""
    alignment: float
    """y^T K y / (|K| |y|^2) of the centred target y (Cristianini et al., "On Kernel-Target Alignment", NIPS 2001)."""
    residual_alignment: float
    """The same of the residual, with the largest eigenvalue in place of |K|: the share of the highest rate at which
    the residual as it is shrinks."""


def tangent_kernel(field: Field, row: Tensor, coordinates: Tensor) -> Tensor:
    """K [N C, N C] in float64 at weights [P] and coordinates [N, D]; row n C + c is channel c of sample n."""

    def values(weights: Tensor) -> Tensor:
        return field.apply(field.layout.unravel(weights[None]), coordinates.double()[None]).flatten()

    jacobian = torch.func.jacrev(values, chunk_size=_CHUNK)(row.double())
    return jacobian @ jacobian.mT


def kernel_statistics(
    kernel: Tensor, target: Tensor, residual: Tensor, steps: int, quality: float
) -> tuple[KernelStatistics, Tensor]:
    """Statistics of a kernel [M, M], and its eigenvalues [M] from the largest on, over M."""
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    entropy = -(shares * torch.where(shares > 0, shares, 1).log()).sum()
    smallest = eigenvalues[-1].clamp(min=_ZERO * eigenvalues[0])
    y, r = (target - target.mean()).double().flatten(), residual.double().flatten()
    found = KernelStatistics(
        steps,
        quality,
        float(eigenvalues[0]) / len(kernel),
        float(eigenvalues[0] / smallest),
        float(entropy.exp()),
        float(y @ kernel @ y / (torch.linalg.matrix_norm(kernel) * (y @ y))),
        float(r @ kernel @ r / (eigenvalues[0] * (r @ r))),
    )
    return found, eigenvalues / len(kernel)


def kernel_along_training(subject: Subject, moments: Sequence[int]) -> Iterator[tuple[KernelStatistics, Tensor]]:
    """The kernel after these numbers of steps of the job's optimiser, at up to 256 values spread over the samples."""
    samples = subject.samples
    apart = -(-len(samples.values) // max(_MOST_VALUES // samples.values.shape[1], 1))
    coordinates, target = samples.coordinates[::apart], samples.values[::apart]
    for moment in along_training(subject, moments):
        kernel = tangent_kernel(subject.field, moment.row, coordinates)
        with torch.no_grad():
            values = subject.field.apply(subject.field.layout.unravel(moment.row[None]), coordinates[None])[0]
        yield kernel_statistics(kernel, target, target - values, moment.steps, moment.quality)
