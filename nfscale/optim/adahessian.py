"""AdaHessian (Yao et al., AAAI 2021) in the two variants that Chng, Saratchandran & Lucey (CVPR 2025) name.

A step is m / (D^hessian_power + epsilon), both moments corrected for their start at zero (equations 9 to 11 of Yao et
al.; matrices have no blocks to average over). What D is, by what each variant computes:

- `e`: sqrt(E[(Hv)_i^2]), the equilibrated diagonal. For probes of signs (v_i (Hv)_i)^2 = (Hv)_i^2, so that this is
  stock AdaHessian, although its paper speaks of the diagonal of the Hessian.
- `j`: |E[v_i (Hv)_i]|, the diagonal of the Hessian itself: the mean comes before the absolute value.

The code released with the CVPR paper calls something else "AdaHessian (J)": the running mean of |Hv|, first power, of
which it takes a square root, so that its steps go with 1 / sqrt(|Hv|). It and stock AdaHessian take a probe at every
step; here every `update_every`, and means are corrected by the number of probes. `epsilon` is absolute, as theirs:
results change where values are rescaled. `esgd` and `jacobi` are the same two diagonals with relative damping.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nfscale.layout import Params
from nfscale.optim.base import State, map_params
from nfscale.optim.own_diagonal import OwnDiagonal, blend, unbiased


@dataclass(frozen=True)
class AdaHessian(OwnDiagonal):
    """Adam with curvature in the place of the second moment of the gradient."""

    variant: Literal["e", "j"] = "e"
    """e: equilibrated; j: Jacobi."""
    beta2: float = 0.99
    hessian_power: float = 1.0
    epsilon: float = 0.1

    @staticmethod
    def auto_learning_rate(width: int, weight_scale: float, samples: int) -> float:
        """0.1, between what the variants like: a rule does not know which it is for.

        Evidence: 8 photograph tiles of 64 x 64, 200 steps of 256 samples with cosine decay and a warm-up of 40, width
        64, weight_scale 1.5: `e` reaches medians of 31.0, 33.8 and 35.0 dB at 0.1, 0.2 and 0.3, `j` 33.4, 29.0 and
        25.6; with 64 samples `j` wants 0.05. With the papers' epsilon of 1e-4 (and their rate of 0.15) neither variant
        passes 26 dB at any rate tried: a diagonal from one probe in ten steps has entries near zero.
        """
        return 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("e", "j"):
            raise ValueError(f"unknown variant {self.variant!r}; known: e, j")
        if not 0 < self.hessian_power <= 1:
            raise ValueError(f"hessian_power is above 0 and at most 1, got {self.hessian_power}")

    def observe(self, state: State, hv: Params, probe: Params, fields: Tensor) -> None:
        seen = map_params(torch.square, hv) if self.variant == "e" else map_params(torch.mul, probe, hv)
        blend(state["curvature"], seen, self.beta2, fields)

    def denominator(self, state: State) -> Params:
        mean = unbiased(state["curvature"], self.beta2, state["probes"])
        diagonal = map_params(torch.sqrt if self.variant == "e" else torch.abs, mean)
        if self.hessian_power != 1:  # in float64: see Schedule.factor
            diagonal = map_params(lambda d: d.double().pow(self.hessian_power).to(d.dtype), diagonal)
        return map_params(lambda d: d + self.epsilon, diagonal)
