"""Sounds: time in seconds to amplitudes, mean squared error, signal-to-noise ratio.

Time is not stretched to the length of a sound: a second is `2 / span` in coordinates whatever the datum, so a tone
has one frequency in the weights of all fields. Recordings of words have nearly as many lengths as there are
recordings, and data share a batch by their counts of samples. So samples are dealt into one of eight counts per
octave: up to an eighth of them stand twice, each time with half the weight, which changes no mean. With two counts per
octave words came to 6 dB less where half of the samples stood twice, since fewer different ones enter a step; with
eight no difference was seen.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nfscale.signals.base import Samples, mean_squared_error, require_decodable, spectral_centroid
from nfscale.signals.tiles import Gridded, Points, Tile, mean_square_error, ratio_db

MAX_SPANNED = 1 << 20
"""Samples within `span`: with more, neighbours are less than 16 roundings of a float32 coordinate apart."""

MAX_RATE = 10_000_000
"""Hz. A header that claims more lies, and to resample it would take gigabytes."""

SNR_CEILING_DB = 200.0
"""A perfect reconstruction has no finite SNR; this is reported instead."""

_SILENT_POWER = 2.0**-30 / 12
"""Of the rounding to 16 bits: silence counts as that loud, for an SNR that is a number."""

_LEVEL = 0.2
"""Root mean square of what fields represent. Four words at 0.1 and 0.5 came to 36 and 34 dB in 600 steps, at 0.005 to
12 dB: what a field says before its first step is far louder then, and steps are as long as for the louder sounds."""

_LOUDEST = 16.0  # times full scale: float recordings and decoded mp3 go over it a little, integers as floats a lot

_SINC_ZEROS = 32  # on each side of the kernel that resamples: the band falls off within 6 % of its width
_SINC_BETA = 9.0  # of its Kaiser window: 90 dB down outside the band
_KERNEL_VALUES = 1 << 22  # computed at a time


@dataclass(frozen=True, eq=False)
class Sound:
    """Amplitudes by time and channel."""

    values: np.ndarray
    """float32 [N, C]; full scale is [-1, 1]."""
    rate: int
    """Samples per second."""

    @property
    def seconds(self) -> float:
        return len(self.values) / self.rate


@dataclass(frozen=True)
class Audio(Gridded):
    """Sounds of `channels` channels, any length up to `span`, any rate."""

    channels: int
    span: float = 2.0
    """Seconds that the coordinates from -1 to 1 cover. A field's omega_0 goes with it: the first layer of a SINE field
    reaches weight_scale * omega_0 / (pi * span) Hz."""
    convert: Literal["mono"] | None = None
    """The mean of the channels, where their counts differ, instead of refusing."""
    resample: int | None = None
    """Bring all sounds to this rate, band-limited; by default each keeps its own."""
    holdout: int | None = None
    """Keep every n-th sample back. What is left has to say what lies between: with 2 it ends at half the band."""
    gain: float | Literal["auto"] = "auto"
    """Fields represent gain * amplitude. auto: the power of two that brings the median of the first sounds nearest to
    `_LEVEL`, once for a run, so that loud and quiet stay as they are; without any, 1."""

    dimensions = 1
    grid_axes = ("samples",)
    whole_cells = False
    squared_error = True
    quality_name = "snr_db"

    def __post_init__(self) -> None:
        for name in ("span", "gain", "resample"):
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise ValueError(f"signal.{name} is above 0, got {value}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout is at least 2, got {self.holdout}")

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Sound]) -> dict[str, Any]:
        """`channels: auto` is what the first sound has, after `convert`; `gain: auto` follows their levels."""
        sounds = [_checked(sound) for sound in contents]
        decided = dict(keys)
        if keys["channels"] == "auto":
            decided["channels"] = 1 if keys["convert"] else sounds[0].values.shape[1]
        if keys["gain"] == "auto":
            level = float(np.median([np.sqrt(np.mean(np.square(sound.values))) for sound in sounds]))
            decided["gain"] = 2.0 ** round(math.log2(_LEVEL / level)) if level > _SILENT_POWER**0.5 else 1.0
        return decided

    @property
    def factor(self) -> float:
        """The gain as a number."""
        return 1.0 if self.gain == "auto" else self.gain

    def samples(self, sound: Sound) -> Samples:
        """In the order of time."""
        values, rate = self._converted(sound)
        count, channels = values.shape
        if channels != self.channels:
            raise ValueError(
                f"the sound has {channels} channels, the fields of this run have {self.channels}; "
                "signal.convert=mono would mix them"
            )
        longest = round(self.span * rate)
        if count > longest:
            raise ValueError(
                f"the sound lasts {count / rate:.3f} seconds, the coordinates of this run span {self.span:g}; "
                "use a larger signal.span (and field.omega_0 with it), or cut the sound"
            )
        if longest > MAX_SPANNED:
            raise ValueError(
                f"at {rate} Hz the signal.span of {self.span:g} seconds has {longest:,} samples, at most "
                f"{MAX_SPANNED:,} are told apart; use a smaller signal.span or signal.resample"
            )
        coordinates = self.coordinates((count, rate))
        flat = torch.from_numpy(values * np.float32(self.factor))
        if self.holdout is None:
            return _dealt(coordinates, flat)
        kept_back = torch.arange(count) % self.holdout == self.holdout - 1
        if not kept_back.any():
            raise ValueError(f"of {count} samples, signal.holdout={self.holdout} keeps none back")
        heldout = _dealt(coordinates[kept_back], flat[kept_back])
        fitted = _dealt(coordinates[~kept_back], flat[~kept_back])
        return Samples(fitted.coordinates, fitted.values, fitted.mask, heldout=heldout)

    def spectral_centroid(self, sound: Sound) -> float:
        """Of what a field represents of the sound."""
        return spectral_centroid(self._converted(sound)[0])

    def _converted(self, sound: Sound) -> tuple[np.ndarray, int]:
        """What a field represents of a sound: float32 [N, C] and its rate."""
        sound = _checked(sound)
        values = sound.values
        if self.convert == "mono" and values.shape[1] > 1:
            values = values.mean(axis=1, keepdims=True, dtype=np.float32)
        if self.resample is None or self.resample == sound.rate:
            return values, sound.rate
        count = resampled_count(len(values), sound.rate, self.resample)
        if count > MAX_SPANNED or len(values) > 16 * MAX_SPANNED:
            raise ValueError(f"the sound lasts {sound.seconds:.0f} seconds, which is too long")
        return resampled(values, sound.rate, self.resample), self.resample

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Power of the sound over power of the error, in decibels: [F, N, C] -> [F]. Higher is better."""
        assert samples.mask is not None, "sounds always have one"
        power = (samples.values.square().mean(dim=-1) * samples.mask).sum(dim=-1) / samples.mask.sum(dim=-1)
        power = power.clamp(min=_SILENT_POWER * self.factor**2)
        return (10 * torch.log10(power / mean_squared_error(predicted, samples))).clamp(max=SNR_CEILING_DB)

    def measures(self, sound: Sound) -> dict[str, float]:
        rate = self.resample or sound.rate
        return {"samples": float(resampled_count(len(sound.values), sound.rate, rate)), "rate": float(rate)}

    def shape_of(self, measures: dict[str, float]) -> tuple[int, int]:
        """The (samples, rate) that `measures` recorded."""
        return int(measures["samples"]), int(measures["rate"])

    def shape_from(self, text: str, fitted: tuple[int, ...]) -> tuple[int, ...]:
        """`16000`: the rate in Hz; the sound lasts as long as it did.

        A lower rate cannot hold the whole band, so the field is evaluated several times as often, and what is above
        the band is taken away: (samples, rate, evaluations for each sample).
        """
        digits = text.lower().removesuffix("hz").strip()
        if not digits.isdecimal() or not 0 < int(digits) <= MAX_RATE:
            raise ValueError(f"cannot read {text!r}; write a rate in Hz up to {MAX_RATE:,}, such as 16000")
        rate = int(digits)
        samples, every = resampled_count(fitted[0], fitted[1], rate), -(-fitted[1] // rate)
        require_decodable(samples * every)
        return (samples, rate) if every == 1 else (samples, rate, every)

    def coordinates(self, shape: tuple[int, ...]) -> Tensor:
        samples, rate, *more = shape
        every = more[0] if more else 1
        return _times(samples * every, rate * every, self.span)

    def refuse_tile(self, tile: Tile) -> None:
        if self.resample is not None:
            raise ValueError("signal.resample would apply to each tile, whose ends it hears; leave it out")
        if tile.size[0] > self.span:
            raise ValueError(
                f"a tile lasts {tile.size[0]:g} seconds and the coordinates span {self.span:g}; signal.span is to be "
                "as long at least"
            )

    def grid_of(self, content: Sound) -> tuple[int, ...]:
        if not isinstance(content, Sound) or not len(content.values):
            raise ValueError(f"a sound has values and a rate, got {type(content).__name__}")
        return (len(content.values),)

    def cells_per_unit(self, content: Sound) -> float:
        """Tiles are measured in seconds."""
        return float(content.rate)

    def cut(self, content: Sound, box: tuple[slice, ...]) -> Sound:
        return Sound(np.array(content.values[box]), content.rate)

    def points(self, shape: tuple[Any, ...], fitted: tuple[Any, ...]) -> tuple[Points, ...]:
        """Sample i is at the beginning of cell i."""
        samples, rate, *more = shape
        every = more[0] if more else 1
        return (Points(samples * every, 0.0, fitted[1] / (rate * every)),)

    def block_coordinates(self, places: Sequence[Tensor], block: tuple[Any, ...]) -> Tensor:
        return (2 * (places[0] / block[1]) / self.span - 1).clamp(-1, 1).to(torch.float32)[:, None]

    def whole_quality(self, original: Sound, rebuilt: Sound) -> float:
        power = max(float(np.square(original.values, dtype=np.float64).mean()), _SILENT_POWER)
        return ratio_db(power, mean_square_error(original.values, rebuilt.values))

    def reconstruct(self, values: Tensor, shape: tuple[int, ...]) -> list[Sound]:
        """[F, N, C] in the order of time -> F sounds."""
        _, rate, *more = shape
        amplitudes = values.detach().cpu().numpy() / np.float32(self.factor)
        if more and more[0] > 1:
            amplitudes = [resampled(one, rate * more[0], rate) for one in amplitudes]
        return [Sound(one, rate) for one in amplitudes]

    def original(self, sound: Sound) -> Sound:
        """The sound as its field represents it."""
        return Sound(*self._converted(sound))

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "audio",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "2 t / span - 1 with the time t in seconds and keys.span; sample i is at t = i / rate",
            "coordinate_range": [-1.0, 1.0],
            "output": {"scale": 1 / self.factor, "shift": 0.0, "meaning": "amplitude = scale * y + shift"},
            "quality": (
                "snr_db is 10 log10(mean square of the amplitudes / mean squared error), over samples and channels; "
                "silence counts as 2^-30 / 12"
            ),
        }


def _checked(sound: Sound) -> Sound:
    """The sound, if it is one.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(sound, Sound):
        raise ValueError(f"a sound has values and a rate, got {type(sound).__name__}")
    values = np.asarray(sound.values)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"a sound is [samples, channels], got shape {list(values.shape)}")
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"a sound is floats with full scale [-1, 1], got {values.dtype}")
    if not (1 <= sound.rate <= MAX_RATE and sound.rate == int(sound.rate)):
        raise ValueError(f"the rate of a sound is a whole number of Hz up to {MAX_RATE:,}, got {sound.rate}")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the sound holds NaN or infinite values")
    if (loudest := float(np.abs(values).max())) > _LOUDEST:
        raise ValueError(f"the sound has values up to {loudest:.4g}; full scale is 1, and more than 16 is no overshoot")
    return Sound(values, int(sound.rate))


def _times(count: int, rate: int, span: float) -> Tensor:
    """Coordinates of the first `count` samples: float32 [count, 1]."""
    times = torch.arange(count, dtype=torch.float64) / rate
    return (2 * times / span - 1).clamp(max=1).to(torch.float32)[:, None]


# --- counts that data share


def bucket(count: int) -> int:
    """The least of 1, 2, ... 15, 16, 18, 20, ... 30, 32, 36, 40, ... that is not below."""
    unit = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // unit) * unit


def _dealt(coordinates: Tensor, values: Tensor) -> Samples:
    """As many samples as the bucket has, each of them once or more, with weights that make up for it."""
    count = len(values)
    total = bucket(count)
    which = torch.arange(total) * count // total
    weights = 1 / torch.bincount(which)[which].to(torch.float32)
    return Samples(coordinates[which], values[which], weights)


# --- other rates


def resampled_count(count: int, rate: int, wanted: int) -> int:
    """Samples of a sound at another rate, so that it lasts as long."""
    return max(1, round(count * wanted / rate))


def resampled(values: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A band-limited sound at another rate: [N, C] -> float32 [M, C].

    Each value is a sum over its neighbours with a windowed sinc that passes what both rates can hold; beyond its
    ends a sound is silent.
    """
    count = resampled_count(len(values), rate, wanted)
    band = min(1.0, wanted / rate)
    reach = math.ceil(_SINC_ZEROS / band)
    padded = np.pad(values.astype(np.float64), ((reach, reach + 1), (0, 0)))
    out = np.empty((count, values.shape[1]), np.float32)
    period = wanted // math.gcd(rate, wanted)  # after which the kernels are the same again
    most = max(1, _KERNEL_VALUES // (2 * reach + 1))
    kernels = _sinc_kernels(np.arange(period) * rate / wanted, band, reach) if period <= min(most, count) else None
    for start in range(0, count, most):
        places = np.arange(start, min(start + most, count))
        exact = places * rate / wanted
        kernel = _sinc_kernels(exact, band, reach) if kernels is None else kernels[places % period]
        nearest = np.minimum(np.floor(exact).astype(np.int64), len(values))
        neighbours = padded[nearest[:, None] + np.arange(2 * reach + 1)]
        out[places] = np.einsum("mk,mkc->mc", kernel, neighbours)
    return out


def _sinc_kernels(exact: np.ndarray, band: float, reach: int) -> np.ndarray:
    """Weights of the samples from `reach` before to `reach` after floor(exact): [M, 2 reach + 1]."""
    distance = np.arange(-reach, reach + 1) - (exact - np.floor(exact))[:, None]
    inside = np.clip(1 - (distance / reach) ** 2, 0, 1)
    window = torch.i0(torch.from_numpy(_SINC_BETA * np.sqrt(inside))).numpy() / np.i0(_SINC_BETA)
    return band * np.sinc(band * distance) * window
