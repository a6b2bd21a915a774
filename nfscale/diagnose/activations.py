"""How the units of each layer are distributed at the start of a field."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.errors import CallerError
from nfscale.fields import MLP, Field

_MOST_POINTS = 4096


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer, over its units and the coordinates."""

    layer: int
    preactivation_std: float
    """Of what goes into the activation, omega included where it has one."""
    mean: float
    std: float
    """Of the activations; those of an arcsine distribution have 0.707."""
    arcsine_distance: float
    """Kolmogorov's distance to the arcsine law on [-1, 1]: the largest difference of the distribution functions, which
    is 0 where it holds. Sines of widely spread arguments have it, in every layer (Sitzmann et al., NeurIPS 2020,
    lemma 1.3; Yeom, Lee & Lee, ICLR 2025, for weight scales of 1 and more)."""


def layer_statistics(
    field: Field, row: Tensor, coordinates: Tensor
) -> tuple[list[LayerStatistics], list[tuple[Tensor, Tensor]]]:
    """Statistics of each activated layer, and its preactivations and activations [N, W].

    Args:
        row: weights [P].
        coordinates: [N, D], of which at most 4,096 are taken, evenly.

    Raises:
        CallerError: if the field has no layers to look into.
    """
    if not isinstance(field, MLP):
        raise CallerError(f"activations are those of field.kind=mlp; got {type(field).__name__}")
    taken = coordinates[:: -(-len(coordinates) // _MOST_POINTS)]
    with torch.no_grad():
        layers = list(field.layers(field.layout.unravel(row[None]), taken[None]))[: field.depth]
    statistics, values = [], []
    for index, (before, after) in enumerate(layers):
        omega = field.first_omega if index == 0 else field.omega_hidden
        scaled = before[0] * (omega if field.activation in ("sine", "finer") else 1.0)
        found = LayerStatistics(
            index, float(scaled.std()), float(after.mean()), float(after.std()), arcsine_distance(after)
        )
        statistics.append(found)
        values.append((scaled, after[0]))
    return statistics, values


def arcsine_distance(values: Tensor) -> float:
    """The largest difference between the values' distribution function and 1/2 + arcsin(x) / pi."""
    ordered = values.flatten().double().sort().values
    law = 0.5 + torch.asin(ordered.clamp(-1, 1)) / math.pi
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64, device=values.device) / len(ordered)
    return float(torch.maximum((law - steps[:-1]).abs(), (steps[1:] - law).abs()).max())
