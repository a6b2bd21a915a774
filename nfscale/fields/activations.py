"""Activations of coordinate MLPs, each with the bounds of the uniform initialization made for it."""

import math
from typing import Protocol

import torch
from torch import Tensor


class Activation(Protocol):
    """A pointwise function and the half-widths of its weights' uniform distribution."""

    def apply(self, preactivation: Tensor, omega: float) -> Tensor: ...

    def first_bound(self, fan_in: int) -> float: ...

    def hidden_bound(self, fan_in: int, omega: float) -> float: ...


class Sine:
    """sin(omega z) with the initialization of SIREN (Sitzmann et al., NeurIPS 2020, section 3.2)."""

    def apply(self, preactivation: Tensor, omega: float) -> Tensor:
        return torch.sin(omega * preactivation)

    def first_bound(self, fan_in: int) -> float:
        return 1 / fan_in

    def hidden_bound(self, fan_in: int, omega: float) -> float:
        return math.sqrt(6 / fan_in) / omega


ACTIVATIONS: dict[str, Activation] = {"sine": Sine()}
