"""Momentum over the Jacobi preconditioner, the diagonal of the Hessian: D_i = |H_ii|.

With independent signs v, E[v_i (Hv)_i] = H_ii (Hutchinson, 1990; Bekas, Kokiopoulou & Saad, 2007); its running mean
is corrected by the number of probes taken. One of the preconditioners that Chng, Saratchandran & Lucey (CVPR 2025)
compare with the equilibrated one. One probe has the variance sum_{j != i} H_ij^2: for the dense Hessians of sines
that is far above H_ii^2, so the mean is of many probes (`beta2` is closer to 1 than ESGD's), and where it happens to
be near zero the damping decides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import State, map_params
from nfscale.optim.own_diagonal import OwnDiagonal, blend, damped, unbiased


@dataclass(frozen=True)
class Jacobi(OwnDiagonal):
    """Momentum over the absolute diagonal of the Hessian."""

    beta2: float = 0.95
    damping: float = 0.3
    """Added to the diagonal, as a fraction of its mean over the params of a field."""

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """0.2, halved above weight_scale 1.75 or at 64 samples per step and fewer.

        Evidence: 8 photograph tiles of 64 x 64, 200 steps of 256 samples with cosine decay and a warm-up of 40, width
        64, weight_scale 1.5: 0.1, 0.2, 0.3 and 0.4 reach medians of 35.0, 35.5, 34.5 and 33.9 dB; 0.2 has the better
        median at widths 32 and 128, too, and half of it with 64 samples and at weight_scale 2.
        """
        return 0.1 if weight_scale > 1.75 or samples <= 64 else 0.2

    def observe(self, state: State, hv: Params, probe: Params, fields: Tensor) -> None:
        blend(state["curvature"], map_params(torch.mul, probe, hv), self.beta2, fields)

    def diagonal(self, state: State) -> Params:
        """The estimate of H_ii, with its sign."""
        return unbiased(state["curvature"], self.beta2, state["probes"])

    def denominator(self, state: State) -> Params:
        return damped(map_params(torch.abs, self.diagonal(state)), self.damping)
