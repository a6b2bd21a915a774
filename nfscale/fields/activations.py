"""Activations of coordinate MLPs, each with the bounds of the uniform initialization made for it.

A unit has one preactivation z, or several (`maps`), each from a linear map of its own. Complex activations take and
give a real and an imaginary part. What `omega`, `frequency` and `spread` mean to each is in its formula.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Scales(NamedTuple):
    """The keys of a field that activations read."""

    omega: float
    """Of this layer: omega_0 or omega_hidden."""
    frequency: float
    spread: float


class Activation(Protocol):
    """A pointwise function and the half-widths of its weights' uniform distribution."""

    formula: str
    """h as a function of z, or of z_1 and z_2, for readers."""
    maps: int
    """Preactivations of a unit; of a complex one its two parts."""
    is_complex: bool

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        """Preactivations [F, N, W], one per map -> [F, N, W], of a complex one real and imaginary [F, N, 2 W].

        A complex one gets the real part alone in the first layer, whose weights are real.
        """
        ...

    def first_bound(self, fan_in: int) -> float: ...

    def hidden_bound(self, fan_in: int, scales: Scales) -> float: ...

    def first_bias_bound(self, fan_in: int) -> float: ...


class _Usual:
    """One real map with the bounds of torch's linear layer, which the released codes of most activations leave."""

    maps = 1
    is_complex = False

    def first_bound(self, fan_in: int) -> float:
        return 1 / math.sqrt(fan_in)

    def hidden_bound(self, fan_in: int, scales: Scales) -> float:
        return 1 / math.sqrt(fan_in)

    def first_bias_bound(self, fan_in: int) -> float:
        return 1 / math.sqrt(fan_in)


class Sine(_Usual):
    """sin(omega z) with the initialization of SIREN (Sitzmann et al., NeurIPS 2020, section 3.2)."""

    formula = "sin(omega * z)"

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        return torch.sin(scales.omega * z[0])

    def first_bound(self, fan_in: int) -> float:
        return 1 / fan_in

    def hidden_bound(self, fan_in: int, scales: Scales) -> float:
        return math.sqrt(6 / fan_in) / scales.omega


class Finer(Sine):
    """sin(omega (|z| + 1) z), variable-periodic, SIREN's weights, first biases from U(-1, 1) (Liu et al., "FINER:
    Flexible Spectral-bias Tuning in Implicit NEural Representation by Variable-periodic Activation Functions", CVPR
    2024). The wider the first biases, the higher the frequencies at the start."""

    formula = "sin(omega * (|z| + 1) * z)"

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        return torch.sin(scales.omega * (z[0].abs() + 1) * z[0])

    def first_bias_bound(self, fan_in: int) -> float:
        return 1.0


class Gaussian(_Usual):
    """exp(-(spread z)^2) (Ramasinghe & Lucey, "Beyond Periodicity", ECCV 2022)."""

    formula = "exp(-(spread * z)^2)"

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        return torch.exp(-(scales.spread * z[0]).square())


class Sinc(_Usual):
    """sin(pi frequency z) / (pi frequency z) (Saratchandran et al., "A Sampling Theory Perspective on Activations for
    Implicit Neural Representations", ICML 2024)."""

    formula = "sin(pi * frequency * z) / (pi * frequency * z), 1 at 0"

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        return torch.sinc(scales.frequency * z[0])


class Gabor(_Usual):
    """cos(frequency z_1) exp(-(spread z_2)^2), the real Gabor wavelet, whose two maps double a layer's weights
    (the wavelet of Chng, Saratchandran & Lucey, CVPR 2025; Saragadam et al., "WIRE", CVPR 2023)."""

    formula = "cos(frequency * z_1) * exp(-(spread * z_2)^2)"
    maps = 2

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        return torch.cos(scales.frequency * z[0]) * torch.exp(-(scales.spread * z[1]).square())


class ComplexGabor(_Usual):
    """exp(i frequency z - |spread z|^2) of complex z, with complex weights but in the first layer; the values are the
    real part of the linear layer (Saragadam et al., "WIRE: Wavelet Implicit Neural Representations", CVPR 2023).

    A complex unit costs four real products; the paper takes fields narrower by the square root of two.
    """

    formula = "exp(i * frequency * z - |spread * z|^2), z complex"
    maps = 2
    is_complex = True

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        squared, damping = z[0].square(), torch.zeros(())
        if len(z) > 1:
            squared, damping = squared + z[1].square(), scales.frequency * z[1]
        size, phase = torch.exp(-damping - scales.spread**2 * squared), scales.frequency * z[0]
        return torch.cat([size * torch.cos(phase), size * torch.sin(phase)], dim=-1)


class ReLU(_Usual):
    """max(0, z). Needs an encoding to fit fine detail (Tancik et al., NeurIPS 2020), and scaling its weights scales
    its values and no more: it is homogeneous."""

    formula = "max(0, z)"

    def apply(self, z: Sequence[Tensor], scales: Scales) -> Tensor:
        return torch.relu(z[0])


ACTIVATIONS: dict[str, Activation] = {
    "sine": Sine(),
    "finer": Finer(),
    "gaussian": Gaussian(),
    "sinc": Sinc(),
    "gabor": Gabor(),
    "complex_gabor": ComplexGabor(),
    "relu": ReLU(),
}
