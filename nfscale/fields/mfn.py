"""Multiplicative filter networks (Fathony, Sahu, Willmott & Kolter, ICLR 2021), many at once.

z_1 = g_1(x), z_{l+1} = (W_l z_l + b_l) * g_{l+1}(x), y = W z + b, with filters that see the coordinates alone:
Fourier filters g(x) = sin(omega x + phi) (section 3.1) or Gabor filters, the same under a Gaussian window (3.2).
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from nfscale.fields.keys import refuse_unless_positive
from nfscale.layout import Layout, Params
from nfscale.rng import Stream, uniform

_GAMMA_SHAPE = 6.0  # of all windows together, whose sizes the released code draws from Gamma(6 / depth, 1)
_HALVINGS = 60


@dataclass(frozen=True)
class MultiplicativeFilters:
    """`depth` filters of `width` units with `depth` - 1 linear layers between them, and a linear layer on top."""

    dimensions: int
    channels: int
    width: int = 64
    depth: int = 4
    filter: Literal["fourier", "gabor"] = "fourier"
    input_scale: float = 64.0
    """Frequencies are U(-s, s) / sqrt(depth D) in radians per unit of the coordinates; 256 in the released code."""
    weight_scale: float = 1.0
    """Linear layers are U(-sqrt(weight_scale / width), sqrt(weight_scale / width))."""

    def __post_init__(self) -> None:
        if self.filter not in ("fourier", "gabor"):
            raise ValueError(f"unknown filter {self.filter!r}; known: fourier, gabor")
        refuse_unless_positive(self, ("dimensions", "channels", "width", "depth", "input_scale", "weight_scale"))

    @cached_property
    def layout(self) -> Layout:
        named: list[tuple[str, tuple[int, ...]]] = []
        for index in range(self.depth):
            named += [(f"filters.{index}.frequency", (self.width, self.dimensions))]
            named += [(f"filters.{index}.phase", (self.width,))]
            if self.filter == "gabor":
                named += [(f"filters.{index}.center", (self.width, self.dimensions))]
                named += [(f"filters.{index}.sharpness", (self.width,))]
        for index in range(self.depth):
            fan_out = self.channels if index == self.depth - 1 else self.width
            named += [(f"layers.{index}.weight", (fan_out, self.width)), (f"layers.{index}.bias", (fan_out,))]
        return Layout.of(named)

    def init(self, seeds: Tensor) -> Params:
        """One draw per seed: [F] -> {name: [F, ...]}, float32, as the released code draws."""
        params = self.layout.unravel(uniform(seeds, Stream.INIT, 0, self.layout.size).mul_(2).sub_(1))
        for index in range(self.depth):
            frequency = params[f"filters.{index}.frequency"]
            frequency.mul_(self.input_scale / math.sqrt(self.depth * self.dimensions))
            params[f"filters.{index}.phase"].mul_(math.pi)
            if self.filter == "gabor":
                sharpness = params[f"filters.{index}.sharpness"]
                sharpness.copy_(_gamma((sharpness + 1) / 2, _GAMMA_SHAPE / self.depth))
                frequency.mul_(sharpness.sqrt().unsqueeze(-1))
            params[f"layers.{index}.weight"].mul_(math.sqrt(self.weight_scale / self.width))
            params[f"layers.{index}.bias"].mul_(1 / math.sqrt(self.width))
        return params

    def apply(self, params: Params, coordinates: Tensor) -> Tensor:
        """Values at coordinates: [F|1, N, D] -> [F, N, C]."""
        fields = next(iter(params.values())).shape[0]
        coordinates = coordinates.expand(fields, -1, -1)
        hidden = self._filtered(params, coordinates, 0)
        for index in range(self.depth):
            weight, bias = params[f"layers.{index}.weight"], params[f"layers.{index}.bias"]
            hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT)
            if index < self.depth - 1:
                hidden = hidden * self._filtered(params, coordinates, index + 1)
        return hidden

    def _filtered(self, params: Params, coordinates: Tensor, index: int) -> Tensor:
        """g_index at coordinates: [F, N, D] -> [F, N, W]."""
        of = f"filters.{index}."
        phase = params[of + "phase"].unsqueeze(1)
        wave = torch.sin(torch.baddbmm(phase, coordinates, params[of + "frequency"].mT))
        if self.filter == "fourier":
            return wave
        center, sharpness = params[of + "center"], params[of + "sharpness"].unsqueeze(1)
        squares = coordinates.square().sum(-1, keepdim=True) + center.square().sum(-1).unsqueeze(1)
        distance = torch.baddbmm(squares, coordinates, center.mT, alpha=-2)
        return wave * torch.exp(-0.5 * sharpness * distance)

    def forward_description(self) -> dict[str, Any]:
        """The exact forward, for a reader who has the table and no nfscale; `keys` rebuild the field."""
        window = " * exp(-filters.l.sharpness / 2 * |x - filters.l.center|^2)" if self.filter == "gabor" else ""
        return {
            "kind": "mfn",
            "keys": asdict(self),
            "formula": (
                f"g_l(x) = sin(filters.l.frequency @ x + filters.l.phase){window}; h = g_0(x); "
                "then for l = 0 .. depth-2: h = (layers.l.weight @ h + layers.l.bias) * g_{l+1}(x); "
                "y = layers.{depth-1}.weight @ h + layers.{depth-1}.bias"
            ),
        }


def _gamma(drawn: Tensor, shape: float) -> Tensor:
    """Uniform numbers in [0, 1) as draws of Gamma(shape, 1), whose distribution function is inverted by halving."""
    wanted, order = drawn.double(), torch.full((), shape, dtype=torch.float64, device=drawn.device)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 40.0 + 4 * shape)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_below = torch.special.gammainc(order, middle) < wanted
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return high.to(drawn.dtype)
