"""The contract of a signal, and the measures that several signals share."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

PSNR_CEILING_DB = 200.0
"""A perfect reconstruction has no finite PSNR; this is reported instead, far above what float32 reaches."""


@dataclass(frozen=True)
class Samples:
    """What a field is fitted to. One datum: [N, ...]; a batch of fields: [F, N, ...].

    The order of the samples is the signal's, and neighbours in the order are neighbours in space:
    a stratified draw takes one sample out of each run of neighbours.
    """

    coordinates: Tensor
    """float32 [N, D], in [-1, 1]."""
    values: Tensor
    """float32 [N, C]."""
    mask: Tensor | None = None
    """float32 [N] weights of the samples in loss and quality, or None where all count alike."""


class Signal(Protocol):
    """The contract of every entry of `SIGNALS`."""

    dimensions: int
    channels: int
    quality_name: str
    """Names what `quality` measures, with its unit: `psnr_db`. Higher is better."""

    def samples(self, datum: np.ndarray) -> Samples:
        """Samples of one datum.

        Raises:
            ValueError: if the datum does not fit the signal, in a sentence that becomes the row's reason.
        """
        ...

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor: ...

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor: ...

    def measures(self, datum: np.ndarray) -> dict[str, float]:
        """What the table's `metrics` says of the datum itself, such as its height and width."""
        ...

    def shape_of(self, measures: dict[str, float]) -> tuple[int, ...]:
        """The shape of the datum that `measures` came from."""
        ...

    def coordinates(self, shape: tuple[int, ...]) -> Tensor:
        """Coordinates [N, D] at which `reconstruct` wants the values of a datum of this shape."""
        ...

    def reconstruct(self, values: Tensor, shape: tuple[int, ...]) -> np.ndarray: ...

    def original(self, datum: np.ndarray) -> np.ndarray:
        """The datum in the form in which `reconstruct` gives it back."""
        ...

    def forward_description(self) -> dict[str, Any]: ...


def mean_squared_error(predicted: Tensor, samples: Samples) -> Tensor:
    """Squared error averaged over samples and channels: [F, N, C] -> [F].

    Raises:
        ValueError: if the shapes differ (both are printed).
    """
    if predicted.shape != samples.values.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} against values {tuple(samples.values.shape)}")
    squared = (predicted - samples.values).square().mean(dim=-1)
    if samples.mask is None:
        return squared.mean(dim=-1)
    return (squared * samples.mask).sum(dim=-1) / samples.mask.sum(dim=-1)


def psnr_db(predicted: Tensor, samples: Samples, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each field, in decibels: [F, N, C] -> [F]. Higher is better.

    Averages the squared error over samples and channels, then takes the logarithm; the mean
    of psnr_db over data is therefore not the psnr_db of the mean error. An error of zero is reported
    as `PSNR_CEILING_DB`.

    Raises:
        ValueError: if the shapes differ (both are printed).
    """
    return (10 * torch.log10(peak**2 / mean_squared_error(predicted, samples))).clamp(max=PSNR_CEILING_DB)
