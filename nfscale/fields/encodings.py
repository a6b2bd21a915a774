"""Encodings: fixed functions of the coordinates that a field's first layer sees in their place."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nfscale.rng import Stream, as_tensor, datum_seed, uniform


class Encoding(Protocol):
    """D coordinates to features, the same for all fields."""

    @property
    def features(self) -> int: ...

    def apply(self, coordinates: Tensor) -> Tensor:
        """[..., D] -> [..., features]."""
        ...

    def description(self) -> dict[str, Any]:
        """What a reader without nfscale needs: a formula, and the numbers that it names."""
        ...


@dataclass(frozen=True)
class NoEncoding:
    """The coordinates themselves."""

    dimensions: int
    count: int
    scale: float

    @property
    def features(self) -> int:
        return self.dimensions

    def apply(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def description(self) -> dict[str, Any]:
        return {"formula": "x"}


@dataclass(frozen=True)
class Positional:
    """x, sin(2^k pi x), cos(2^k pi x) for k = 0 .. count - 1 (Mildenhall et al., "NeRF", ECCV 2020, eq. 4)."""

    dimensions: int
    count: int
    scale: float

    @property
    def features(self) -> int:
        return self.dimensions * (2 * self.count + 1)

    def apply(self, coordinates: Tensor) -> Tensor:
        octaves = torch.arange(self.count, device=coordinates.device)
        phases = (coordinates.unsqueeze(-2) * (math.pi * 2.0**octaves).to(coordinates)[:, None]).flatten(-2)
        return torch.cat([coordinates, torch.sin(phases), torch.cos(phases)], dim=-1)

    def description(self) -> dict[str, Any]:
        formula = (
            "[x, sin(2^k * pi * x), cos(2^k * pi * x)]: x, then the sines of all k (and of each k all x), then cosines"
        )
        return {"formula": formula, "k": list(range(self.count))}


@dataclass(frozen=True)
class Fourier:
    """cos(2 pi B x), sin(2 pi B x), B normal with standard deviation `scale`: `count` random Fourier features, one B
    for all fields (Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", NeurIPS 2020)."""

    dimensions: int
    count: int
    scale: float
    _SEED: ClassVar[str] = "random Fourier features"

    @property
    def features(self) -> int:
        return 2 * self.count

    @cached_property
    def matrix(self) -> Tensor:
        """B, float32 [count, D]: the same on every machine."""
        key = as_tensor([datum_seed(0, self._SEED)])
        drawn = uniform(key, Stream.INIT, 0, 2 * self.count * self.dimensions).double()[0]
        radius = torch.sqrt(-2 * torch.log1p(-drawn[0::2]))  # Box and Muller
        normal = radius * torch.cos(2 * math.pi * drawn[1::2])
        return (self.scale * normal).float().view(self.count, self.dimensions)

    def apply(self, coordinates: Tensor) -> Tensor:
        phases = coordinates @ (2 * math.pi * self.matrix).to(coordinates).mT
        return torch.cat([torch.cos(phases), torch.sin(phases)], dim=-1)

    def description(self) -> dict[str, Any]:
        return {"formula": "[cos(2 * pi * B @ x), sin(2 * pi * B @ x)]", "B": self.matrix.tolist()}


ENCODINGS: dict[str, type] = {"none": NoEncoding, "positional": Positional, "fourier": Fourier}
"""Each is made from dimensions, count and scale."""
