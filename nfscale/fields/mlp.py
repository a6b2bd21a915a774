"""Coordinate MLPs with a leading field axis, as batched matrix products.

The default is SIREN (Sitzmann et al., "Implicit Neural Representations with Periodic Activation
Functions", NeurIPS 2020): h_1 = sin(omega_0 (W_1 x + b_1)), h_l = sin(omega_hidden (W_l h_{l-1} + b_l)),
y = W_L h_{L-1} + b_L. `weight_scale` is the alpha of Yeom, Lee & Lee, "Fast Training of Sinusoidal
Neural Fields via Scaling Initialization" (ICLR 2025, eq. 6): every weight matrix but the last is
multiplied by it; biases and omega stay; 1 is SIREN exactly. Other activations, encodings and initializations
are a word each.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from nfscale.fields.activations import ACTIVATIONS, Scales
from nfscale.fields.encodings import ENCODINGS, Encoding
from nfscale.fields.initializations import INITIALIZATIONS, NOISES, Place
from nfscale.fields.keys import refuse_unless_positive
from nfscale.layout import Layout, Params
from nfscale.rng import Stream, normal, uniform

_LARGEST_AUTOMATIC = 1.5  # weight scale; see the evidence of `MLP.auto_weight_scale`


@dataclass(frozen=True)
class MLP:
    """`depth` activated layers of `width` units, then a linear layer: D coordinates -> C channels."""

    dimensions: int
    channels: int
    width: int = 64
    depth: int = 4
    activation: Literal[tuple(ACTIVATIONS)] = "sine"  # type: ignore[valid-type]
    encoding: Literal[tuple(ENCODINGS)] = "none"  # type: ignore[valid-type]
    initialization: Literal[tuple(INITIALIZATIONS)] = "weight_scaling"  # type: ignore[valid-type]
    omega_0: float = 30.0
    """Of the first layer of sines and FINER; the others do not use it."""
    omega_hidden: float = 30.0
    weight_scale: float = 1.5
    """Of the initializations weight_scaling (of the weights) and frequency_tuning (of omega_0)."""
    frequency: float = 10.0
    """Of sinc (8 in the code of Yeom, Lee & Lee) and the Gabors (10 in that of WIRE)."""
    spread: float = 10.0
    """Of gaussian (20 in the code of Yeom, Lee & Lee; 14 in that of Chng et al.) and the Gabors (10)."""
    encoding_count: int = 8
    """Octaves of the positional encoding; random Fourier features, of which 64 to 256 are usual."""
    encoding_scale: float = 5.0
    """Standard deviation of random Fourier features, in cycles per unit of the coordinates."""
    spectral_centroid: float | None = None
    """Of the values, as a share of their Nyquist frequency, from 0 to 1: what the initialization winner goes by.
    null: a job measures it in its first data."""

    def __post_init__(self) -> None:
        names = {"activation": ACTIVATIONS, "encoding": ENCODINGS, "initialization": INITIALIZATIONS}
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        sizes = ("dimensions", "channels", "width", "depth", "encoding_count")
        scales = ("omega_0", "omega_hidden", "weight_scale", "frequency", "spread", "encoding_scale")
        refuse_unless_positive(self, (*sizes, *scales))
        if self.initialization in NOISES:
            if self.spectral_centroid is None:
                raise ValueError(f"initialization={self.initialization} needs spectral_centroid; a job measures it")
            if not 0 <= self.spectral_centroid <= 1:
                raise ValueError(f"spectral_centroid is a share from 0 to 1, got {self.spectral_centroid}")
            self._noise(0)

    @cached_property
    def _encoding(self) -> Encoding:
        return ENCODINGS[self.encoding](self.dimensions, self.encoding_count, self.encoding_scale)

    @property
    def first_omega(self) -> float:
        """omega of the first layer: omega_0, which frequency tuning multiplies."""
        return self.omega_0 * (self.weight_scale if self.initialization == "frequency_tuning" else 1.0)

    @property
    def is_siren(self) -> bool:
        """Whether the forward is that of SIREN: the one that the engine's hand-written steps know."""
        return self.activation == "sine" and self.encoding == "none"

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(fan_out, fan_in) of each of the depth + 1 weight matrices, in units."""
        widths = [self._encoding.features] + [self.width] * self.depth + [self.channels]
        return tuple(zip(widths[1:], widths[:-1], strict=True))

    @cached_property
    def layout(self) -> Layout:
        named = []
        for index, (fan_out, fan_in) in enumerate(self.shapes):
            maps, outputs = self._maps(index)
            named += [
                (f"layers.{index}.weight", (*maps, fan_out, fan_in)),
                (f"layers.{index}.bias", (*outputs, fan_out)),
            ]
        return Layout.of(named)

    def _maps(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes before the weights' and the biases' own: the maps of a unit, or real and imaginary part."""
        activation = ACTIVATIONS[self.activation]
        if activation.maps == 1:
            return (), ()
        maps, is_last = (activation.maps,), index == self.depth
        if activation.is_complex:  # real at the first layer; the values are real
            return () if index == 0 else maps, () if index == 0 or is_last else maps
        return () if is_last else maps, () if is_last else maps

    @staticmethod
    def auto_weight_scale(
        samples_per_axis: float, omega_0: float, depth: int, objective: Literal["fit", "interpolate"]
    ) -> float:
        """The weight scale a for which omega_0 a^depth is the number of samples along an axis of [-1, 1], or twice it.

        The first layer reaches omega_0 a, and each further layer multiplies the highest frequency by about a;
        pi / 2 times the samples is the highest frequency that they can tell. "interpolate" stays below it, "fit" goes
        beyond, which is faster and invents detail between the samples. Never below 1, which is SIREN, nor above 1.5,
        beyond which fields of sounds, maps and meshes fit worse in as many steps.

        Evidence: `python -m pipelines.weight_scale_rule` and `python -m pipelines.weight_scaling --small` (tables in
        pipelines/benchmarks/RESULTS.md). On whole photographs with every second pixel held back, the scale of
        "interpolate" loses at most 1 dB of what was held back where 69 samples lie along an axis, and 1.5 where 35 do
        (of a scale of 1.1, above the rule's 1.04); on words 1.6 dB, on maps and meshes nothing. Width made little
        difference.
        """
        wanted = (2.0 if objective == "fit" else 1.0) * samples_per_axis / omega_0
        return min(max(1.0, wanted) ** (1 / depth), _LARGEST_AUTOMATIC)

    def bounds(self, index: int) -> tuple[float, float]:
        """Half-widths of the uniform distributions of layer `index`: (weights, biases)."""
        (_, fan_in), activation = self.shapes[index], ACTIVATIONS[self.activation]
        bias = activation.first_bias_bound(fan_in) if index == 0 else 1 / math.sqrt(fan_in)
        return INITIALIZATIONS[self.initialization](self._place(index)), bias

    def _place(self, index: int) -> Place:
        (fan_out, fan_in), activation = self.shapes[index], ACTIVATIONS[self.activation]
        return Place(
            fan_in,
            fan_out,
            index == 0,
            index == self.depth,
            activation,
            self._scales(max(index, 1)),  # SIREN's bounds of hidden layers, whatever omega_0
            self.weight_scale,
            index,
            self._scales(index).omega,
            self.dimensions,
            (self.spectral_centroid or 0.0) / self.channels,
        )

    def _noise(self, index: int) -> float:
        """Deviation of the Gaussian noise on the weights of layer `index`."""
        noise = NOISES.get(self.initialization)
        return 0.0 if noise is None else noise(self._place(index))

    def _scales(self, index: int) -> Scales:
        return Scales(self.omega_hidden if index else self.first_omega, self.frequency, self.spread)

    def init(self, seeds: Tensor) -> Params:
        """One draw per seed: [F] -> {name: [F, ...]}, float32. Equal seeds give equal fields."""
        drawn = uniform(seeds, Stream.INIT, 0, self.layout.size).mul_(2).sub_(1)
        params = self.layout.unravel(drawn)
        for index in range(self.depth + 1):
            weight_bound, bias_bound = self.bounds(index)
            weight = params[f"layers.{index}.weight"].mul_(weight_bound)
            params[f"layers.{index}.bias"].mul_(bias_bound)
            if noise := self._noise(index):
                drawn = normal(seeds, Stream.NOISE, index, weight[0].numel())
                weight.add_(drawn.view_as(weight), alpha=noise)
        return params

    def apply(self, params: Params, coordinates: Tensor) -> Tensor:
        """Values at coordinates: [F|1, N, D] -> [F, N, C]."""
        *_, (values, _) = self.layers(params, coordinates)
        return values

    def encoded(self, coordinates: Tensor) -> Tensor:
        """What goes into the first layer: [F|1, N, D] -> [F|1, N, W]."""
        return self._encoding.apply(coordinates)

    def layers(self, params: Params, coordinates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What goes into each layer's activation and what comes out, [F, N, W] (of complex fields twice as wide); at
        last the values [F, N, C], twice."""
        activation = ACTIVATIONS[self.activation]
        fields = next(iter(params.values())).shape[0]
        hidden = self.encoded(coordinates).expand(fields, -1, -1)
        for index in range(self.depth + 1):
            weight, bias = params[f"layers.{index}.weight"], params[f"layers.{index}.bias"]
            matrix = _as_real(weight, index == self.depth) if activation.is_complex and index else weight.flatten(1, -2)
            preactivation = torch.baddbmm(bias.flatten(1).unsqueeze(1), hidden, matrix.mT)
            hidden = preactivation
            if index < self.depth:
                hidden = activation.apply(preactivation.split(self.width, dim=-1), self._scales(index))
            yield preactivation, hidden

    def forward_description(self) -> dict[str, Any]:
        """The exact forward, for a reader who has the table and no nfscale; `keys` rebuild the field."""
        said: dict[str, Any] = {"kind": "mlp", "keys": asdict(self)}
        if self.is_siren and self.initialization != "frequency_tuning":
            return said | {
                "formula": (
                    "h = sin(omega_0 * (layers.0.weight @ x + layers.0.bias)); then for l = 1 .. depth-1: "
                    "h = sin(omega_hidden * (layers.l.weight @ h + layers.l.bias)); "
                    "y = layers.depth.weight @ h + layers.depth.bias"
                ),
            }
        activation = ACTIVATIONS[self.activation]
        z = "z = layers.l.weight @ h + layers.l.bias"
        if activation.maps > 1:
            z = "z_m = layers.l.weight[m - 1] @ h + layers.l.bias[m - 1] for m = 1, 2"
        end = "y = layers.depth.weight @ h + layers.depth.bias"
        if activation.is_complex:
            z = "z = W @ h + b, with W = weight[0] + i weight[1], b alike; of layers.0 both are real"
            end = "y = the real part of (weight[0] + i weight[1]) @ h, + layers.depth.bias"
        return said | {
            "encoding": self._encoding.description(),
            "omegas": [self._scales(index).omega for index in range(self.depth)],
            "formula": f"h = encoding(x); then for l = 0 .. depth-1: {z}; h = {activation.formula}; {end}",
        }


def _as_real(weight: Tensor, is_last: bool) -> Tensor:
    """Complex weights [F, 2, O, I] as real ones on [real, imaginary]: [F, 2 O, 2 I]; [F, O, 2 I] for a real result."""
    real, imaginary = weight.unbind(1)
    above = torch.cat([real, -imaginary], dim=2)
    return above if is_last else torch.cat([above, torch.cat([imaginary, real], dim=2)], dim=1)
