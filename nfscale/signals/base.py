"""The contract of a signal, and the measures that several signals share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
"""A batch of fields as a function of coordinates: [F, n, D] -> [F, n, C]."""

MAX_DECODED_SAMPLES = 64 << 20
"""Of one datum: more would take gigabytes for coordinates alone."""

PSNR_CEILING_DB = 200.0
"""A perfect reconstruction has no finite PSNR; this is reported instead, far above what float32 reaches."""


@dataclass(frozen=True)
class Kind:
    """What data must have in common to share a batch."""

    count: int
    """Samples."""
    masked: bool
    check: "Kind | None" = None
    heldout: "Kind | None" = None
    is_drawn: bool = False
    """Samples come from a `source`."""


class Source(Protocol):
    """Samples that stay where they are, such as in a file that is mapped, until steps want them.

    What a step or a check sees of them is read then and forgotten; what it reads must not depend on what was read
    before. A sample that cannot be one, such as NaN in a file, makes the loss of its field NaN: nothing raises here.
    """

    def __len__(self) -> int:
        """Samples in all."""
        ...

    def draw(self, positions: Tensor) -> "Samples":
        """These of the samples, in the order asked for: int64 [n] on the CPU -> [n, ...]."""
        ...


@dataclass(frozen=True)
class Samples:
    """What a field is fitted to. One datum: [N, ...]; a batch of fields: [F, N, ...].

    The order of the samples is the signal's, and neighbours in the order are neighbours in space:
    a stratified draw takes one sample out of each run of neighbours.
    """

    coordinates: Tensor
    """float32 [N, D], in [-1, 1]. Of a signal with a `predict` of its own: [N, ...], whatever that starts from."""
    values: Tensor
    """float32 [N, C], or of the shape of the signal's own predictions."""
    mask: Tensor | None = None
    """float32 [N] weights of the samples in loss and quality, or None where all count alike."""
    check: "Samples | None" = None
    """What loss and quality are measured on, at the checks and for the record; None: the samples themselves."""
    heldout: "Samples | None" = None
    """Samples that no step sees, measured once, when the field leaves."""
    jitter: Tensor | None = None
    """float32 [N] uniform in [0, 1), anew at every training step of a signal that is `jittered`; else None."""
    source: Source | None = None
    """Of one datum: where steps draw its samples from; the tensors are then empty, and there is a `check`."""

    @property
    def count(self) -> int:
        """Of one datum, not of a batch."""
        return len(self.values) if self.source is None else len(self.source)

    @property
    def kind(self) -> Kind:
        """Of one datum, not of a batch."""
        return Kind(
            self.count,
            self.mask is not None,
            None if self.check is None else self.check.kind,
            None if self.heldout is None else self.heldout.kind,
            self.source is not None,
        )

    @property
    def bytes(self) -> int:
        """In memory, all parts."""
        parts = [getattr(self, member.name) for member in fields(self) if member.name != "source"]
        return sum(part.bytes if isinstance(part, Samples) else part.nbytes for part in parts if part is not None)

    @property
    def measured(self) -> "Samples":
        """The samples on which loss and quality are measured."""
        return self if self.check is None else self.check

    def map(self, function: Callable[..., Tensor], *others: "Samples") -> "Samples":
        """The function of every tensor, check and heldout included; of the same tensors of samples of one kind.

        The source is left out.
        """
        mapped = {}
        for member in fields(self):
            mine, *theirs = (getattr(samples, member.name) for samples in (self, *others))
            if member.name == "source":
                continue
            if isinstance(mine, Samples):
                mapped[member.name] = mine.map(function, *theirs)
            elif mine is not None:
                mapped[member.name] = function(mine, *theirs)
        return Samples(**mapped)


def samples_per_axis(signal: "Signal", samples: "Samples") -> float:
    """How many samples of a datum lie along an axis of [-1, 1], where they fill it evenly.

    The surface of a sphere has two axes; views count as samples of a volume.
    """
    axes, coordinates = getattr(signal, "axes", signal.dimensions), samples.coordinates
    count = float(samples.count)
    if samples.source is not None:
        coordinates = samples.measured.coordinates
    if samples.mask is not None:  # weights, of which a sample that is there twice has halves
        coordinates, count = coordinates[samples.mask > 0], float(samples.mask.sum())
    if axes == coordinates.shape[1]:
        spans = coordinates.amax(0) - coordinates.amin(0)
        count /= float((spans / 2).clamp(min=1e-3).prod())
    return count ** (1 / axes)


def spectral_centroid(values: np.ndarray) -> float:
    """The mean frequency along rows, weighted by amplitude, as a share of the Nyquist frequency: [..., n, C] -> [0, 1].

    Averaged over rows and channels; 0 of what is constantly 0 (Chandravamsi et al., 2025, whose code divides by C too).
    """
    amplitudes = np.abs(np.fft.rfft(values, axis=-2))
    frequencies = 2 * np.fft.rfftfreq(values.shape[-2])[:, None]
    total = amplitudes.sum(axis=-2)
    weighted = (amplitudes * frequencies).sum(axis=-2)
    return float(np.divide(weighted, total, out=np.zeros_like(weighted), where=total > 0).mean())


class Signal(Protocol):
    """The contract of every entry of `SIGNALS`."""

    dimensions: int
    channels: int
    quality_name: str
    """Names what `quality` measures, with its unit: `psnr_db`. Higher is better."""
    points_per_sample: int
    """How many points of the field the prediction of one sample takes: what memory is reckoned by."""
    jittered: bool
    """Training steps get `samples.jitter`."""
    squared_error: bool
    """`predict` is that of `Pointwise`, `loss` is `mean_squared_error`: a step need not ask the signal for them."""

    @property
    def fixed_shape(self) -> bool:
        """A datum decodes at the shape of its fit alone: there is nothing between its samples."""
        ...

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """The keys of a job's signal with every `auto` decided, once per run.

        Args:
            keys: what the class is made with, `channels` among it.
            contents: the first few data that can be read; the first decides what all must agree in.

        Raises:
            ValueError: if they do not fit the signal.
        """
        ...

    def samples(self, content: Any) -> Samples:
        """Samples of one datum.

        Raises:
            ValueError: if the datum does not fit the signal, in a sentence that becomes the row's reason.
        """
        ...

    def predict(self, apply: Apply, samples: Samples) -> Tensor:
        """What the fields say the values of a batch of samples are: [F, N, ...], like `samples.values`.

        The prediction of a sample depends on that sample alone, so that samples are taken a few at a time
        where all of them need too much memory; and it can be differentiated twice, for optimisers that
        take curvature.
        """
        ...

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Of each field, a mean over its samples: [F, N, ...] -> [F]."""
        ...

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Of each field, higher is better: [F, N, ...] -> [F]. Always sees all samples of a field at once."""
        ...

    def measures(self, content: Any) -> dict[str, float]:
        """What the table's `metrics` says of the datum itself, such as its height and width."""
        ...

    def shape_of(self, measures: dict[str, float]) -> tuple[int, ...]:
        """The shape of the datum that `measures` came from: whatever `coordinates` needs to know."""
        ...

    def shape_from(self, text: str, fitted: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a user asks for, such as `256x256`.

        Args:
            fitted: the shape of the datum itself, of which the text may leave parts as they are.

        Raises:
            ValueError: saying what is expected.
        """
        ...

    def coordinates(self, shape: tuple[int, ...]) -> Tensor:
        """What `predict` is to start from, so that `reconstruct` gets the values of a datum of this shape: [N, ...]."""
        ...

    def reconstruct(self, values: Tensor, shape: tuple[int, ...]) -> Sequence[Any]:
        """Predictions [F, N, ...] at `coordinates(shape)` -> F contents."""
        ...

    def original(self, content: Any) -> Any:
        """The content in the form in which `reconstruct` gives it back."""
        ...

    def forward_description(self) -> dict[str, Any]:
        """For readers without nfscale: `kind`, `keys`, `quality_name`, coordinates and output affine in words."""
        ...


def require_decodable(samples: int) -> None:
    """Refuse a shape of more samples than are decoded at once.

    Raises:
        ValueError: saying so.
    """
    if samples > MAX_DECODED_SAMPLES:
        raise ValueError(
            f"{samples:,} samples are asked for; at most {MAX_DECODED_SAMPLES:,} are decoded: ask for a smaller shape"
        )


def in_full_range(array: np.ndarray, what: str) -> np.ndarray:
    """Integers in units of their full range, floats as they are: float32 in [0, 1].

    Args:
        what: a noun for the message: `image`.

    Raises:
        ValueError: if the numbers are none of a picture.
    """
    values = scaled_to_range(array, what)
    if array.dtype.kind != "f":
        return values
    if not np.isfinite(values).all():
        raise ValueError(f"the {what} holds NaN or infinite values")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"float {what}s are in [0, 1], got values from {values.min():.4g} to {values.max():.4g}")
    return values


def scaled_to_range(array: np.ndarray, what: str) -> np.ndarray:
    """As `in_full_range`, whatever the floats are.

    Raises:
        ValueError: if the numbers are of no type of a picture's.
    """
    kind = array.dtype.newbyteorder("=")
    if kind not in (np.bool_, np.uint8, np.uint16) and kind.kind != "f":
        raise ValueError(f"{what}s are uint8, uint16, bool, or floats in [0, 1]; got {array.dtype}")
    with np.errstate(all="ignore"):
        values = array.astype(np.float32)
    return values / np.float32(np.iinfo(kind).max) if kind.kind == "u" else values


def number_in(text: str) -> float:
    """The number that a text is; 0 of one that is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


class Pointwise:
    """The base of signals whose samples are values of the field at points."""

    points_per_sample = 1
    jittered = False
    squared_error = False
    fixed_shape = False

    def __init_subclass__(cls, **options: Any) -> None:
        """A class with a `predict` or `loss` of its own says `squared_error` anew: what it inherits may be wrong."""
        super().__init_subclass__(**options)
        if "squared_error" not in vars(cls) and {"predict", "loss"} & vars(cls).keys():
            cls.squared_error = False

    def predict(self, apply: Apply, samples: Samples) -> Tensor:
        return apply(samples.coordinates)


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
