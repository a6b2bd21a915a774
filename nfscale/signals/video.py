"""Films: points in time and on the picture to values in [0, 1], mean squared error, PSNR.

Samples are in Z-order over frames, rows and columns, so that a run of 8^k neighbours in the order is a block of 2^k
frames of 2^k x 2^k pixels: a stratified draw takes one pixel out of each block. Frames stay what they were decoded or
memory-mapped as until a field is fitted to them; mapped films of more than `MAX_PIXELS` stay in their file even then:
steps read the pixels that they draw, and quality is measured on some, see `nfscale.signals.mapped`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nfscale.signals.base import (
    Samples,
    in_full_range,
    mean_squared_error,
    number_in,
    psnr_db,
    require_decodable,
    scaled_to_range,
)
from nfscale.signals.grids import cell_centres, z_order
from nfscale.signals.image import converted
from nfscale.signals.mapped import MAX_MAPPED, MappedCells, checked_count, drawn_samples, mapping_of
from nfscale.signals.tiles import Gridded, Tile, psnr_of_arrays

MAX_PIXELS = 16 << 20
"""Over all frames that are held as samples: coordinates and values of more would take half a gigabyte."""

MAX_RATE = 1000.0
"""Frames per second; a header that claims more lies."""

_RESIZED_FROM = 4  # times `MAX_PIXELS` at most are resized, which takes them to float32 first
_SHIFT = 0.5  # fields represent value - 0.5, as those of images do


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, evenly spaced in time."""

    values: np.ndarray
    """[T, H, W, C], integers of full range or floats in [0, 1]."""
    rate: float | None = None
    """Frames per second; None where nothing states it."""


@dataclass(frozen=True)
class Video(Gridded):
    """Films of `channels` channels, any number and size of frames, any rate.

    Coordinates are (t, y, x), each axis spanning [-1, 1] from edge to edge: frame i of n lies at (2 i + 1) / n - 1, as
    pixels of a frame do, so a field decodes at any rate and size without a shift.
    """

    channels: int
    rate: float = 25.0
    """Frames per second of what states none: folders of frames, arrays."""
    convert: Literal["grey", "rgb"] | None = None
    """Turn films of other channel counts into this one instead of refusing them."""
    resize: list[int] | None = None
    """[height, width] that every frame is brought to (bilinear, antialiased) instead of keeping its own."""
    frames: int | None = None
    """Only the first this many frames of longer films."""
    holdout: int | None = None
    """k >= 2: the last of every k frames is held back, and measured as `quality_heldout`."""

    dimensions = 3
    grid_axes = ("frames", "height", "width")
    quality_name = "psnr_db"
    squared_error = True

    def __post_init__(self) -> None:
        if not 0 < self.rate <= MAX_RATE:
            raise ValueError(f"signal.rate is above 0 and at most {MAX_RATE:g} frames per second, got {self.rate}")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            raise ValueError(f"signal.resize is [height, width], got {self.resize}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"signal.frames is at least 1, got {self.frames}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout=k holds back one frame of k and is at least 2, got {self.holdout}")

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """`channels: auto` is what the first film has, after `convert`."""
        if keys["channels"] != "auto":
            return keys
        first = _checked(contents[0])
        return keys | {"channels": converted(_in_range(first.values[0]), keys["convert"]).shape[2]}

    def samples(self, content: Any) -> Samples:
        """A clip, or its frames [T, H, W] or [T, H, W, C] -> samples in Z-order."""
        if self._stays(given := _checked(content).values[: self.frames]):
            return self._drawn(given)
        clip = self.original(content)
        count, height, width, channels = clip.values.shape
        self._require_channels(channels)
        order = z_order(count, height, width)
        values = torch.from_numpy(clip.values.reshape(-1, channels)[order] - np.float32(_SHIFT))
        centres = cell_centres(count, height, width)[torch.from_numpy(order)]
        if self.holdout is None:
            return Samples(centres, values)
        held = torch.from_numpy(self._held(count)[order // (height * width)])
        return Samples(centres[~held], values[~held], heldout=Samples(centres[held], values[held]))

    def _require_channels(self, channels: int) -> None:
        if channels != self.channels:
            raise ValueError(
                f"the film has {channels} channels, the fields of this run have {self.channels}; "
                "signal.convert=grey or rgb would convert it"
            )

    def _held(self, count: int) -> np.ndarray:
        """Which frames are held back: bool [T]."""
        assert self.holdout is not None
        if count < self.holdout:
            raise ValueError(f"of {count} frames, signal.holdout={self.holdout} holds none back")
        return np.arange(count) % self.holdout == self.holdout - 1

    def _stays(self, frames: np.ndarray) -> bool:
        """Whether frames [T, H, W, C] stay in the file that they are mapped from, and pixels are read as drawn."""
        pixels = frames[..., 0].size
        return self.resize is None and MAX_PIXELS < pixels <= MAX_MAPPED and mapping_of(frames) is not None

    def _drawn(self, frames: np.ndarray) -> Samples:
        """Samples of a film that stays in its file."""

        def as_fitted(pixels: np.ndarray) -> np.ndarray:
            return converted(scaled_to_range(pixels, "film")[:, None], self.convert)[:, 0] - np.float32(_SHIFT)

        kept = [np.ones(size, bool) for size in frames.shape[:3]]
        cells = MappedCells(frames, kept, (1.0, 1.0, 1.0), as_fitted)
        samples = drawn_samples(cells, None if self.holdout is None else self._held(len(frames)))
        for part in (samples.check, samples.heldout):
            if part is not None:
                self._require_channels(part.values.shape[1])
                _in_range(part.values.numpy() + np.float32(_SHIFT))
        return samples

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Over all frames together."""
        return psnr_db(predicted, samples)

    def measures(self, content: Any) -> dict[str, float]:
        """Frames, height and width of what is fitted, and frames per second.

        Of a film that stays in its file, `checked_pixels`: how many pixels its quality is measured on.
        """
        clip = _checked(content)
        height, width = self.resize or clip.values.shape[1:3]
        frames = min(len(clip.values), self.frames or len(clip.values))
        found = {
            "frames": float(frames),
            "height": float(height),
            "width": float(width),
            "rate": float(clip.rate or self.rate),
        }
        given = clip.values[: self.frames]
        if self._stays(given):
            found["checked_pixels"] = float(checked_count(given[..., 0].size))
        return found

    def shape_of(self, measures: dict[str, float]) -> tuple[Any, ...]:
        """(frames, height, width, frames per second)."""
        frames, height, width = (int(measures[name]) for name in ("frames", "height", "width"))
        return frames, height, width, round(float(measures["rate"]), 3)  # the table has float32

    def shape_from(self, text: str, fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        """`32x128x128`: frames x height x width; `50fps`: another rate at the size of the fit.

        Either way the film lasts as long as it did.
        """
        frames, height, width, rate = fitted
        seconds = frames / rate
        parts = text.lower().split("x")
        if len(parts) == 3 and all(part.isdecimal() and int(part) > 0 for part in parts):
            frames, height, width = map(int, parts)
            rate = frames / seconds
        elif len(parts) == 1 and parts[0].endswith("fps") and 0 < (asked := number_in(parts[0][:-3])) <= MAX_RATE:
            frames, rate = max(1, round(seconds * asked)), asked
        else:
            raise ValueError(
                f"cannot read {text!r}; write frames x height x width, such as 32x128x128, or a rate of up to "
                f"{MAX_RATE:g}, such as 50fps"
            )
        require_decodable(frames * height * width)
        return frames, height, width, round(rate, 3)

    def coordinates(self, shape: tuple[Any, ...]) -> Tensor:
        require_decodable(math.prod(shape[:3]))
        return cell_centres(*shape[:3])

    def refuse_tile(self, tile: Tile) -> None:
        for name in ("resize", "frames"):
            if getattr(self, name) is not None:
                raise ValueError(f"signal.{name} would apply to each tile; leave it out, or signal.tile")

    def grid_of(self, content: Any) -> tuple[int, ...]:
        return _checked(content).values.shape[:3]

    def cut(self, content: Any, box: tuple[slice, ...]) -> Clip:
        clip = _checked(content)
        return Clip(np.array(clip.values[box]), clip.rate)

    def whole_quality(self, original: Clip, rebuilt: Clip) -> float:
        return psnr_of_arrays(original.values, rebuilt.values)

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> list[Clip]:
        """[F, T * H * W, C] in row order -> F clips, clamped to [0, 1]. Without a rate in the shape: `rate`."""
        frames, height, width, *rate = shape
        pixels = (values.detach().cpu() + _SHIFT).clamp(0, 1).reshape(-1, frames, height, width, self.channels)
        return [Clip(one, rate[0] if rate else self.rate) for one in pixels.numpy()]

    def original(self, content: Any) -> Clip:
        """The film as its field represents it: float32 [T, H, W, C] in [0, 1]."""
        clip = _checked(content)
        frames = clip.values[: self.frames]
        count, height, width = frames.shape[:3]
        target = self.resize or [height, width]
        if count * max(target[0] * target[1], height * width // _RESIZED_FROM) > MAX_PIXELS:
            raise ValueError(
                f"too large: {count} frames of {height} x {width} pixels, at most {MAX_PIXELS:,} pixels are one "
                "field's; signal.frames=n takes the first n, signal.resize=[height, width] makes them smaller; films "
                f"in .npy and .npz files on a disk may have {MAX_MAPPED:,}, without a resize"
            )
        tall = converted(_in_range(frames.reshape(count * height, width, -1)), self.convert)
        values = tall.reshape(count, height, width, -1)
        if target != [height, width]:
            planes = torch.from_numpy(values).permute(0, 3, 1, 2)
            resized = functional.interpolate(planes, size=tuple(target), mode="bilinear", antialias=True)
            values = resized.permute(0, 2, 3, 1).clamp(0, 1).contiguous().numpy()
        return Clip(values, clip.rate or self.rate)

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "video",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(t, y, x) of frames and pixel centres, (2 i + 1) / n - 1 on an axis of n, in [-1, 1]",
            "coordinate_range": [-1.0, 1.0],
            "output": {"scale": 1.0, "shift": _SHIFT, "meaning": "value = scale * y + shift, in [0, 1] of full range"},
            "quality": "psnr_db is 10 log10(1 / mean squared error) over all frames, on values that are not clamped",
        }


def _checked(content: Any) -> Clip:
    """Frames [T, H, W, C] with their rate.

    Raises:
        ValueError: if they are none.
    """
    clip = content if isinstance(content, Clip) else Clip(np.asarray(content))
    values = clip.values[..., None] if clip.values.ndim == 3 else clip.values
    if values.ndim != 4 or 0 in values.shape:
        raise ValueError(
            f"a film is [frames, height, width] or [frames, height, width, channels], got {list(clip.values.shape)}"
        )
    if clip.rate is not None and not 0 < clip.rate <= MAX_RATE:
        raise ValueError(f"the film claims {clip.rate:g} frames per second; at most {MAX_RATE:g} are taken")
    return Clip(values, clip.rate)


def _in_range(values: np.ndarray) -> np.ndarray:
    return in_full_range(values, "film")
