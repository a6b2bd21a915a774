"""Images: pixel centres to values in [0, 1], mean squared error, PSNR.

Samples are in Z-order (Morton), so that a run of 4^k neighbours in the order is a square block of
pixels: that is what makes a stratified draw cover the image (one pixel per block).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nfscale.signals.base import (
    Samples,
    in_full_range,
    mean_squared_error,
    psnr_db,
    require_decodable,
    spectral_centroid,
)
from nfscale.signals.grids import cell_centres, z_order
from nfscale.signals.tiles import Gridded, Tile
from nfscale.signals.transforms import PLACES, TransformName, Values, inverse_order_of, order_of, values_of

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, what image readers use for "L"


@dataclass(frozen=True)
class Image(Gridded):
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
    transform: TransformName = "none"
    """Of values or places before the fit, undone after it, see `nfscale.signals.transforms`. Moved pixels have nothing
    between them: zigzag and permutation decode at the size of the fit alone."""
    value_mean: float | None = None
    """Of transform=standardization; null: of the first data."""
    value_deviation: float | None = None

    def __post_init__(self) -> None:
        if self.transform not in get_args(TransformName):
            raise ValueError(f"unknown transform {self.transform!r}; known: {', '.join(get_args(TransformName))}")
        if self.value_deviation is not None and self.value_deviation <= 0:
            raise ValueError(f"signal.value_deviation is above 0, got {self.value_deviation}")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            raise ValueError(f"signal.resize is [height, width], got {self.resize}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout=k holds back one pixel of k and is at least 2, got {self.holdout}")

    dimensions = 2
    grid_axes = ("height", "width")
    quality_name = "psnr_db"
    squared_error = True

    @property
    def fixed_shape(self) -> bool:
        """A datum decodes at the size of its fit alone."""
        return self.transform in PLACES

    @cached_property
    def _values(self) -> Values:
        return values_of(self.transform, self.value_mean, self.value_deviation)

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[np.ndarray]) -> dict[str, Any]:
        """`channels: auto` is what the first image has, after `convert`; a standardization's mean and deviation are
        those of the first images."""
        found: dict[str, Any] = {}
        if keys["channels"] == "auto":
            found["channels"] = converted(_as_values(contents[0]), keys["convert"]).shape[2]
        if keys.get("transform") == "standardization":
            values = np.concatenate([converted(_as_values(one), keys["convert"]).ravel() for one in contents])
            measured = {"value_mean": float(values.mean()), "value_deviation": float(values.std()) or 1.0}
            found |= {name: value for name, value in measured.items() if keys.get(name) is None}
        return keys | found

    def samples(self, datum: np.ndarray) -> Samples:
        """[H, W] or [H, W, C], integers of full range or floats in [0, 1] -> samples in Z-order."""
        if self.transform == "standardization" and (self.value_mean is None or self.value_deviation is None):
            raise ValueError("transform=standardization needs value_mean and value_deviation; a job measures them")
        values = self.original(datum)
        height, width, channels = values.shape
        if channels != self.channels:
            raise ValueError(
                f"the image has {channels} channels, the fields of this run have {self.channels}; "
                "signal.convert=grey or rgb would convert it"
            )
        order = z_order(height, width)
        flat = torch.from_numpy(self._represented(values).reshape(-1, channels)[order])
        centres = cell_centres(height, width)[torch.from_numpy(order)]
        if self.holdout is None:
            return Samples(centres, flat)
        held = torch.from_numpy((order // width + order % width) % self.holdout == 0)
        if bool(held.all()):
            raise ValueError(f"an image of {height} x {width} pixels, of which holdout={self.holdout} leaves none")
        return Samples(centres[~held], flat[~held], heldout=Samples(centres[held], flat[held]))

    def _represented(self, values: np.ndarray) -> np.ndarray:
        """What a field represents of an image [H, W, C] in [0, 1]: its values transformed, its pixels moved."""
        transformed = self._values.apply(values)
        if not self.fixed_shape:
            return transformed
        height, width, channels = values.shape
        return transformed.reshape(-1, channels)[order_of(self.transform, height, width)].reshape(values.shape)

    def spectral_centroid(self, datum: np.ndarray) -> float:
        """Of what a field represents of the image, along its rows."""
        return spectral_centroid(self._represented(self.original(datum)))

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Of values in [0, 1], whatever is represented of them."""
        if abs(self._values.scale) == 1 and self._values.power == 1:  # a shift and a sign change no error
            return psnr_db(predicted, samples)
        return psnr_db(self._values.inverse(predicted), replace(samples, values=self._values.inverse(samples.values)))

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
        return cell_centres(height, width)

    def refuse_tile(self, tile: Tile) -> None:
        if self.resize is not None:
            raise ValueError("signal.resize would bring each tile to that size; leave it out, or signal.tile")
        if self.fixed_shape:
            raise ValueError(f"signal.transform={self.transform} moves pixels, and tiles are to fade into each other")

    def grid_of(self, content: np.ndarray) -> tuple[int, ...]:
        if content.ndim not in (2, 3) or 0 in content.shape:
            raise ValueError(f"an image is [height, width] or [height, width, channels], got {list(content.shape)}")
        return content.shape[:2]

    def cut(self, content: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
        return np.array(content[box])  # and no longer mapped, if it was

    def reconstruct(self, values: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        """[F, H * W, C] in row order -> [F, H, W, C], clamped to [0, 1]."""
        height, width = shape
        pixels = self._values.inverse(values.detach().cpu()).clamp(0, 1)
        if self.fixed_shape:
            pixels = pixels[:, torch.from_numpy(inverse_order_of(self.transform, height, width))]
        return pixels.reshape(-1, height, width, self.channels).numpy()

    def original(self, datum: np.ndarray) -> np.ndarray:
        """The datum as its field represents it: [H, W, C] in [0, 1], for pictures beside reconstructions."""
        return _resized(converted(_as_values(datum), self.convert), self.resize)

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "image",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": "(y, x) of pixel centres, (2 i + 1) / n - 1 on an axis of n pixels, in [-1, 1]",
            "coordinate_range": [-1.0, 1.0],
            "output": self._output(),
            "quality": "psnr_db is 10 log10(1 / mean squared error), on values that are not clamped",
        }

    def _output(self) -> dict[str, Any]:
        """From what the field says to values."""
        if self._values.power != 1:
            return {"meaning": f"{self._values.in_words}, in [0, 1] of full range"}
        scale = 1 / self._values.scale
        said: dict[str, Any] = {
            "scale": scale,
            "shift": -self._values.shift * scale,
            "meaning": "value = scale * y + shift, in [0, 1] of full range",
        }
        if self.fixed_shape:
            said["places"] = (
                f"at place p in row order lies the pixel order[p], with order = {PLACES[self.transform][1]}"
            )
        return said


def _as_values(datum: np.ndarray) -> np.ndarray:
    """Any image array as float32 [H, W, C] in units of its full range."""
    if datum.ndim == 2:
        datum = datum[:, :, None]
    if datum.ndim != 3 or 0 in datum.shape:
        raise ValueError(f"an image is [height, width] or [height, width, channels], got shape {list(datum.shape)}")
    return in_full_range(datum, "image")


def converted(values: np.ndarray, convert: str | None) -> np.ndarray:
    """Values [H, W, C] in [0, 1] as grey or rgb; as they are where `convert` is None.

    Raises:
        ValueError: if there is no such conversion.
    """
    channels = values.shape[2]
    if convert is None or channels == {"grey": 1, "rgb": 3}[convert]:
        return values
    if channels in (2, 4):  # the last channel is opacity: composite on white, as a page shows it
        opacity = values[:, :, -1:]
        return converted(values[:, :, :-1] * opacity + (1 - opacity), convert)
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
