"""Frequencies in a field, and in the datum that it is fitted to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.fields import Field

_GRID = {1: 2048, 2: 128, 3: 32}
"""Points along an axis, by dimensions."""


@dataclass(frozen=True)
class SpectrumStatistics:
    """Of a power spectrum without its mean."""

    centroid: float
    """Cycles per unit of the coordinates."""
    bandwidth: float
    """Below it lies 95 % of the power."""
    high_share: float
    """Of the power, above half of the highest frequency."""


def field_spectrum(field: Field, row: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """The power spectrum of a field with weights [P] over [-1, 1]^D, see `power_spectrum`."""
    side = _GRID[dimensions]
    axis = torch.linspace(-1, 1, side)
    coordinates = torch.stack(torch.meshgrid([axis] * dimensions, indexing="ij"), dim=-1).view(1, -1, dimensions)
    with torch.no_grad():
        values = field.apply(field.layout.unravel(row[None]), coordinates)[0]
    return power_spectrum(values.view(*[side] * dimensions, -1))


def power_spectrum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Power by frequency, averaged over directions and channels, of values [..., C] on a grid over [-1, 1]^D.

    A Hann window keeps the borders from looking like high frequencies.

    Returns:
        Frequencies in cycles per unit [K], up to that of the coarsest axis, and the power at each [K], which sums to 1.
    """
    axes = tuple(range(values.dim() - 1))
    values = values.double() - values.double().mean(dim=axes, keepdim=True)
    for axis in axes:
        shape = [-1 if other == axis else 1 for other in range(values.dim())]
        values = values * torch.hann_window(values.shape[axis], periodic=False, dtype=torch.float64).view(shape)
    power = torch.fft.fftn(values, dim=axes).abs().square().sum(dim=-1)
    frequencies = [torch.fft.fftfreq(values.shape[axis], 2 / values.shape[axis], dtype=torch.float64) for axis in axes]
    radius = torch.stack(torch.meshgrid(frequencies, indexing="ij")).square().sum(dim=0).sqrt()
    count = min(values.shape[axis] for axis in axes) // 2 + 1
    bins = (2 * radius).round().long().flatten()  # of half a cycle per unit: one cycle over the whole domain
    kept = bins < count
    totals = torch.zeros(count, dtype=torch.float64).index_add_(0, bins[kept], power.flatten()[kept])
    return torch.arange(count, dtype=torch.float64) / 2, totals / totals.sum().clamp(min=1e-300)


def spectrum_statistics(frequencies: Tensor, power: Tensor) -> SpectrumStatistics:
    """Centroid, bandwidth and share of high frequencies of a spectrum."""
    below = power.cumsum(0)
    bandwidth = frequencies[int(torch.searchsorted(below, 0.95 * below[-1]).clamp(max=len(power) - 1))]
    high = power[frequencies > frequencies[-1] / 2].sum()
    return SpectrumStatistics(float((frequencies * power).sum() / power.sum()), float(bandwidth), float(high))
