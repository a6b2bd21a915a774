"""Coordinate MLPs with a leading field axis, as batched matrix products.

The default is SIREN (Sitzmann et al., "Implicit Neural Representations with Periodic Activation
Functions", NeurIPS 2020): h_1 = sin(omega_0 (W_1 x + b_1)), h_l = sin(omega_hidden (W_l h_{l-1} + b_l)),
y = W_L h_{L-1} + b_L. `weight_scale` is the alpha of Yeom, Lee & Lee, "Fast Training of Sinusoidal
Neural Fields via Scaling Initialization" (ICLR 2025, eq. 6): every weight matrix but the last is
multiplied by it; biases and omega stay; 1 is SIREN exactly.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from nfscale.fields.activations import ACTIVATIONS
from nfscale.layout import Layout, Params
from nfscale.rng import Stream, uniform


@dataclass(frozen=True)
class MLP:
    """`depth` activated layers of `width` units, then a linear layer: D coordinates -> C channels."""

    dimensions: int
    channels: int
    width: int = 64
    depth: int = 4
    activation: Literal["sine"] = "sine"
    omega_0: float = 30.0
    omega_hidden: float = 30.0
    weight_scale: float = 1.5

    def __post_init__(self) -> None:
        for name in ("dimensions", "channels", "width", "depth", "omega_0", "omega_hidden", "weight_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, got {getattr(self, name)}")

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(fan_out, fan_in) of each of the depth + 1 weight matrices."""
        widths = [self.dimensions] + [self.width] * self.depth + [self.channels]
        return tuple(zip(widths[1:], widths[:-1], strict=True))

    @cached_property
    def layout(self) -> Layout:
        named = []
        for index, (fan_out, fan_in) in enumerate(self.shapes):
            named += [(f"layers.{index}.weight", (fan_out, fan_in)), (f"layers.{index}.bias", (fan_out,))]
        return Layout.of(named)

    def bounds(self, index: int) -> tuple[float, float]:
        """Half-widths of the uniform distributions of layer `index`: (weights, biases).

        Biases are torch's own default for a linear layer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as in
        the code of both papers.
        """
        fan_in = self.shapes[index][1]
        activation = ACTIVATIONS[self.activation]
        is_last = index == self.depth
        bound = activation.first_bound(fan_in) if index == 0 else activation.hidden_bound(fan_in, self.omega_hidden)
        return bound * (1.0 if is_last else self.weight_scale), 1 / math.sqrt(fan_in)

    def init(self, seeds: Tensor) -> Params:
        """One draw per seed: [F] -> {name: [F, ...]}, float32. Equal seeds give equal fields."""
        drawn = uniform(seeds, Stream.INIT, 0, self.layout.size).mul_(2).sub_(1)
        params = self.layout.unravel(drawn)
        for index in range(self.depth + 1):
            weight_bound, bias_bound = self.bounds(index)
            params[f"layers.{index}.weight"].mul_(weight_bound)
            params[f"layers.{index}.bias"].mul_(bias_bound)
        return params

    def apply(self, params: Params, coordinates: Tensor) -> Tensor:
        """Values at coordinates: [F|1, N, D] -> [F, N, C]."""
        activation = ACTIVATIONS[self.activation]
        fields = next(iter(params.values())).shape[0]
        hidden = coordinates.expand(fields, -1, -1)
        for index in range(self.depth + 1):
            weight, bias = params[f"layers.{index}.weight"], params[f"layers.{index}.bias"]
            hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT)
            if index < self.depth:
                hidden = activation.apply(hidden, self.omega_0 if index == 0 else self.omega_hidden)
        return hidden

    def forward_description(self) -> dict[str, Any]:
        """The exact forward, for a reader who has the table and no nfscale; `keys` rebuild the field."""
        return {
            "kind": "mlp",
            "keys": asdict(self),
            "formula": (
                "h = sin(omega_0 * (layers.0.weight @ x + layers.0.bias)); then for l = 1 .. depth-1: "
                "h = sin(omega_hidden * (layers.l.weight @ h + layers.l.bias)); "
                "y = layers.depth.weight @ h + layers.depth.bias"
            ),
        }
