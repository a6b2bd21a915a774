"""Diagonal preconditioners of a Hessian, and the condition number that each leaves.

In x = D^(1/2) theta the Hessian is D^(-1/2) H D^(-1/2), and a step of gradient descent is one of D^(-1) times the
gradient (Chng, Saratchandran & Lucey, "Preconditioners for the Stochastic Training of Neural Fields", CVPR 2025):

- jacobi: D = |diag H|;
- equilibrated: D_i = |H_i|, the norm of row i (Dauphin, de Vries & Bengio, NeurIPS 2015);
- esgd_K: the same estimated, sqrt(mean (Hv)^2) over K probes of signs;
- gauss_newton: D = diag(J^T J);
- root_gauss_newton: its root, which Adam divides by if its v is diag(J^T J);
- adam: sqrt(v), what Adam divides by.

A Hessian along training is indefinite and nearly singular, so that a condition number has to say what it is: here the
ratio of the largest absolute eigenvalue to the smallest (`condition`), which is one number of rounding wherever a
direction is flat, and to the 10 % quantile and the median of the absolute eigenvalues, which are not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-12
"""Of the largest: eigenvalues below count as this, which is what float64 leaves of nothing, and so do entries of D."""


@dataclass(frozen=True)
class Condition:
    """Of a Hessian with one preconditioner."""

    preconditioner: str
    largest: float
    """Eigenvalue, signs counted."""
    smallest: float
    """Likewise."""
    negative_share: float
    """Of the eigenvalues, below -1e-12 times the largest absolute one."""
    condition: float
    """Largest over smallest absolute eigenvalue, at most 1e12."""
    condition_10: float
    """Largest absolute eigenvalue over their 10 % quantile, at most 1e12: of nine tenths of the directions."""
    condition_50: float
    """The same over their median."""


def known_diagonals(hessian: Tensor, gauss_newton: Tensor) -> dict[str, Tensor]:
    """Preconditioners that follow from H [P, P] and diag(J^T J) [P]: each [P]."""
    return {
        "none": torch.ones_like(gauss_newton),
        "jacobi": hessian.diagonal().abs(),
        "equilibrated": hessian.norm(dim=1),
        "gauss_newton": gauss_newton,
        "root_gauss_newton": gauss_newton.sqrt(),
    }


def scaling(diagonal: Tensor) -> Tensor:
    """D^(-1/2) of a diagonal D [P] whose zeros count as 1e-12 of its largest entry."""
    return diagonal.clamp(min=FLOOR * float(diagonal.max())).rsqrt()


def condition(name: str, hessian: Tensor, diagonal: Tensor) -> tuple[Condition, Tensor]:
    """The condition with a preconditioner D [P], and the absolute eigenvalues [P] from the largest on, over that."""
    scale = scaling(diagonal.double())
    eigenvalues = torch.linalg.eigvalsh(scale[:, None] * hessian * scale)
    sizes = eigenvalues.abs().sort(descending=True).values
    shares = (sizes / sizes[0]).clamp(min=FLOOR)
    found = Condition(
        name,
        float(eigenvalues[-1]),
        float(eigenvalues[0]),
        float((eigenvalues < -FLOOR * sizes[0]).double().mean()),
        float(1 / shares[-1]),
        float(1 / shares.quantile(0.1)),
        float(1 / shares.quantile(0.5)),
    )
    return found, shares
