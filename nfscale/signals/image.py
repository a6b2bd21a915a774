"""Images: pixel centres to values in [0, 1], mean squared error, PSNR.

Samples are in Z-order (Morton), so that a run of 4^k neighbours in the order is a square block of
pixels: that is what makes a stratified draw cover the image (one pixel per block).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nfscale.signals.base import Pointwise, Samples, mean_squared_error, psnr_db, require_decodable

_SHIFT = 0.5
"""Fields represent value - 0.5. Their first residual is then at most half the range: with values in [0, 1]
the brightest tiles of photographs start with residuals so large that preconditioned steps throw them off."""

_SIZES_KEPT = 8  # whose coordinates and orders are remembered: few, since those of a large image take its size over

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, what image readers use for "L"


@dataclass(frozen=True)
class Image(Pointwise):
    """Images of `channels` channels, any height and width.

    Coordinates are (y, x) of the pixel centres, each axis spanning [-1, 1] from edge to edge: pixel i of
    n lies at (2 i + 1) / n - 1, so a field decodes at any resolution without a shift.
    """

    channels: int
    convert: Literal["grey", "rgb"] | None = None
    """Turn images of other channel counts into this one instead of refusing them."""
    resize: list[int] | None = None
    """[height, width] that every image is brought to (bilinear, antialiased) instead of keeping its own."""
    holdout: int | None = None
    """k >= 2: pixels whose row + column is a multiple of k are held back, and measured as `quality_heldout`."""

    def __post_init__(self) -> None:
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            raise ValueError(f"signal.resize is [height, width], got {self.resize}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout=k holds back one pixel of k and is at least 2, got {self.holdout}")

    dimensions = 2
    quality_name = "psnr_db"
    squared_error = True

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[np.ndarray]) -> dict[str, Any]:
        """`channels: auto` is what the first image has, after `convert`."""
        if keys["channels"] != "auto":
            return keys
        return keys | {"channels": _converted(_as_values(contents[0]), keys["convert"]).shape[2]}

    def samples(self, datum: np.ndarray) -> Samples:
        """[H, W] or [H, W, C], integers of full range or floats in [0, 1] -> samples in Z-order."""
        values = self.original(datum)
        height, width, channels = values.shape
        if channels != self.channels:
            raise ValueError(
                f"the image has {channels} channels, the fields of this run have {self.channels}; "
                "signal.convert=grey or rgb would convert it"
            )
        order = _z_order(height, width)
        flat = torch.from_numpy(values.reshape(-1, channels)[order] - np.float32(_SHIFT))
        centres = _pixel_centres(height, width)[torch.from_numpy(order)]
        if self.holdout is None:
            return Samples(centres, flat)
        held = torch.from_numpy((order // width + order % width) % self.holdout == 0)
        if bool(held.all()):
            raise ValueError(f"an image of {height} x {width} pixels, of which holdout={self.holdout} leaves none")
        return Samples(centres[~held], flat[~held], heldout=Samples(centres[held], flat[held]))

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        return psnr_db(predicted, samples)

    def measures(self, datum: np.ndarray) -> dict[str, float]:
        height, width = self.resize or datum.shape[:2]
        return {"height": float(height), "width": float(width)}

    def shape_of(self, measures: dict[str, float]) -> tuple[int, int]:
        """The (height, width) that `measures` recorded."""
        return int(measures["height"]), int(measures["width"])

    def shape_from(self, text: str, fitted: tuple[int, ...]) -> tuple[int, int]:
        """`256x256`: height x width."""
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"cannot read {text!r}; write height x width, such as 256x256")
        require_decodable(int(parts[0]) * int(parts[1]))
        return int(parts[0]), int(parts[1])

    def coordinates(self, shape: tuple[int, ...]) -> Tensor:
        height, width = shape
        return _pixel_centres(height, width)

    def reconstruct(self, values: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """[F, H * W, C] in row order -> [F, H, W, C], clamped to [0, 1]."""
        height, width = shape
        return (values.detach().cpu() + _SHIFT).clamp(0, 1).reshape(-1, height, width, self.channels).numpy()

    def original(self, datum: np.ndarray) -> np.ndarray:
        """The datum as its field represents it: [H, W, C] in [0, 1], for pictures beside reconstructions."""
        return _resized(_converted(_as_values(datum), self.convert), self.resize)

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "image",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(y, x) of pixel centres, (2 i + 1) / n - 1 on an axis of n pixels, in [-1, 1]",
            "coordinate_range": [-1.0, 1.0],
            "output": {"scale": 1.0, "shift": _SHIFT, "meaning": "value = scale * y + shift, in [0, 1] of full range"},
            "quality": "psnr_db is 10 log10(1 / mean squared error), on values that are not clamped",
        }


def _as_values(datum: np.ndarray) -> np.ndarray:
    """Any image array as float32 [H, W, C] in units of its full range."""
    if datum.ndim == 2:
        datum = datum[:, :, None]
    if datum.ndim != 3 or 0 in datum.shape:
        raise ValueError(f"an image is [height, width] or [height, width, channels], got shape {list(datum.shape)}")
    if datum.dtype == bool:
        return datum.astype(np.float32)
    if datum.dtype in (np.uint8, np.uint16):
        return datum.astype(np.float32) / np.float32(np.iinfo(datum.dtype).max)
    if not np.issubdtype(datum.dtype, np.floating):
        raise ValueError(f"images are uint8, uint16, bool, or floats in [0, 1]; got {datum.dtype}")
    values = datum.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the image holds NaN or infinite values")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"float images are in [0, 1], got values from {values.min():.4g} to {values.max():.4g}")
    return values


def _converted(values: np.ndarray, convert: str | None) -> np.ndarray:
    channels = values.shape[2]
    if convert is None or channels == {"grey": 1, "rgb": 3}[convert]:
        return values
    if channels in (2, 4):  # the last channel is opacity: composite on white, as a page shows it
        opacity = values[:, :, -1:]
        return _converted(values[:, :, :-1] * opacity + (1 - opacity), convert)
    if convert == "grey" and channels == 3:
        return (values @ _LUMA)[:, :, None]
    if convert == "rgb" and channels == 1:
        return values.repeat(3, axis=2)
    raise ValueError(f"no conversion from {channels} channels to {convert}")


def _resized(values: np.ndarray, shape: list[int] | None) -> np.ndarray:
    if shape is None or list(values.shape[:2]) == shape:
        return values
    planes = torch.from_numpy(values).permute(2, 0, 1)[None]
    resized = functional.interpolate(planes, size=tuple(shape), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).clamp(0, 1).numpy()


@lru_cache(maxsize=_SIZES_KEPT)
def _pixel_centres(height: int, width: int) -> Tensor:
    """[H * W, 2] in row order."""
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (height, width)]
    return torch.cartesian_prod(*axes).to(torch.float32)


@lru_cache(maxsize=_SIZES_KEPT)
def _z_order(height: int, width: int) -> np.ndarray:
    """Row-order positions [H * W] of the pixels, visited along the Morton curve."""
    y, x = (index.ravel().astype(np.uint64) for index in np.indices((height, width)))
    code = np.zeros_like(y)
    for bit in range(max(height, width).bit_length()):
        code |= ((x >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit)
        code |= ((y >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + 1)
    return np.argsort(code, kind="stable")
