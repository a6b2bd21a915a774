"""Initializations of coordinate MLPs: the half-widths of the uniform distributions that weights are drawn from, and the
deviation of Gaussian noise on top of them.

Biases are torch's default for a linear layer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), in all of them, as in the code of the
papers (but FINER's first, which are its own).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nfscale.fields.activations import Activation, Scales


@dataclass(frozen=True)
class Place:
    """A weight matrix in its field."""

    fan_in: int
    fan_out: int
    is_first: bool
    is_last: bool
    activation: Activation
    scales: Scales
    weight_scale: float
    index: int = 0
    """Of its layer."""
    omega: float = 30.0
    """Of its layer's activation."""
    dimensions: int = 2
    """Of the coordinates."""
    centroid: float = 0.0
    """The target's spectral centroid over its channels."""


def siren(place: Place) -> float:
    """The activation's own bounds, which for sines are those of SIREN (Sitzmann et al., NeurIPS 2020, section 3.2)."""
    if place.is_first:
        return place.activation.first_bound(place.fan_in)
    return place.activation.hidden_bound(place.fan_in, place.scales)


def weight_scaling(place: Place) -> float:
    """Those times `weight_scale` in every matrix but the last (Yeom, Lee & Lee, ICLR 2025, eq. 6)."""
    return siren(place) * (1.0 if place.is_last else place.weight_scale)


def xavier(place: Place) -> float:
    """sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio, AISTATS 2010, eq. 16)."""
    return math.sqrt(6 / (place.fan_in + place.fan_out))


def kaiming(place: Place) -> float:
    """sqrt(6 / fan_in) (He et al., ICCV 2015, eq. 10, as a uniform distribution)."""
    return math.sqrt(6 / place.fan_in)


def torch_default(place: Place) -> float:
    """1 / sqrt(fan_in), what torch.nn.Linear does."""
    return 1 / math.sqrt(place.fan_in)


def small_last(place: Place) -> float:
    """The activation's own bounds, and a last layer of variance fan_in^(-3/2) (Saratchandran, Ramasinghe & Lucey, "From
    Activation to Initialization: Scaling Insights for Optimizing Neural Fields", CVPR 2024), drawn uniformly.

    With sines SIREN's last layer is smaller still up to a width of 200,000, so this enlarges it.
    """
    return math.sqrt(3) * place.fan_in**-0.75 if place.is_last else siren(place)


_NOISE_OF = {1: (3500.0, 7.0, 3.0), 2: (50.0, 5.0, 0.4)}
"""Of WINNER, by the dimensions of the coordinates (sounds, images): the largest s_0, its rate, and the slope of s_1."""


def winner(place: Place) -> float:
    """Deviation of the noise on the weights of the first two layers (Chandravamsi et al., "Spectral Bottleneck in
    Sinusoidal Representation Networks: Noise is All You Need", 2025, and the constants of its code).

    s_0 = s_max (1 - exp(-a psi)) and s_1 = b psi in units of the preactivations, hence over the layer's omega, with psi
    the spectral centroid of the target as a share of the Nyquist frequency, over its channels. The constants know
    nothing of how many samples the target has. The paper has sines and no encoding; behind one, the noise of a
    preactivation is what it would be of the coordinates themselves.
    """
    if place.dimensions not in _NOISE_OF:
        raise ValueError(
            f"initialization=winner has constants for 1 and 2 coordinates (sounds, images), not for {place.dimensions}"
        )
    largest, rate, slope = _NOISE_OF[place.dimensions]
    scales = (largest * (1 - math.exp(-rate * place.centroid)), slope * place.centroid)
    if place.index >= len(scales):
        return 0.0
    inputs = place.fan_in / place.dimensions if place.is_first else 1.0
    return scales[place.index] / place.omega / math.sqrt(inputs)


INITIALIZATIONS: dict[str, Callable[[Place], float]] = {
    "weight_scaling": weight_scaling,
    "siren": siren,
    "frequency_tuning": siren,
    "xavier": xavier,
    "kaiming": kaiming,
    "torch": torch_default,
    "nfsl": small_last,
    "winner": siren,
}
"""Half-widths. frequency_tuning: SIREN's, and `weight_scale` multiplies omega_0 instead (a rival in the same paper)."""

NOISES: dict[str, Callable[[Place], float]] = {"winner": winner}
"""Deviations of the noise that some initializations put on top."""
