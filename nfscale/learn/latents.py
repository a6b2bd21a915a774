"""Principal components of standardised weights: a short vector for each field, and the way back.

Fields that share theta0 move from it nearly linearly in their datum, so a few dozen directions of a thousand carry what
tells data apart. Latents have deviation 1 on the training rows, and the way back is linear.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.errors import CallerError
from nfscale.learn.transforms import Standardizer

_EXACT = 2048
"""Rows or weights up to which all components are computed: seconds. Beyond, a randomised SVD (Halko et al., 2011)."""


@dataclass(frozen=True)
class Latents:
    """Differences from theta0 [B, P] <-> latents [B, k]."""

    standardizer: Standardizer
    directions: Tensor
    """float32 [k, P], orthonormal"""
    deviation: Tensor
    """float32 [k], of the training rows along each direction"""
    explained: float
    """Share of the variance of standardised training rows."""

    @classmethod
    def of(cls, rows: Tensor, standardizer: Standardizer, count: int) -> "Latents":
        """The first `count` principal components of training rows [B, P].

        Raises:
            CallerError: if there are fewer rows or weights than components.
        """
        if count >= min(rows.shape):
            raise CallerError(f"{count} components of {rows.shape[0]} rows of {rows.shape[1]} weights; ask for fewer")
        standard = standardizer(rows)
        total = standard.square().sum()
        if min(rows.shape) <= _EXACT:
            directions = torch.linalg.svd(standard, full_matrices=False).Vh[:count]
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                _, _, found = torch.svd_lowrank(standard, q=count + 32, niter=4)
            directions = found[:, :count].T.contiguous()
        along = (standard @ directions.T).square()
        deviation = along.mean(dim=0).sqrt().clamp(min=1e-12)
        return cls(standardizer, directions, deviation, float(along.sum() / total))

    def __call__(self, rows: Tensor) -> Tensor:
        return self.standardizer(rows) @ self.directions.T / self.deviation

    def inverse(self, latents: Tensor) -> Tensor:
        return self.standardizer.inverse((latents * self.deviation) @ self.directions)
