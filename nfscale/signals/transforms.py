"""Transformations of an image before it is fitted, and their exact inverse when it is decoded.

Seo, Lee, Kim & Lee, "In Search of a Data Transformation That Accelerates Neural Field Training" (CVPR 2024), and the
code released with it. A transformation of values maps v in [0, 1] to what the field represents; one of places moves
pixels. Quality is measured after the inverse, as there. Their standardization takes each image's own mean and
deviation; here the run has one of each, so that a table of weights decodes without them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from torch import Tensor

_SHIFT = 0.5
"""Fields represent value - 0.5 unless a transformation of values says otherwise. Their first residual is then at most
half the range: with values in [0, 1] the brightest tiles of photographs start with residuals so large that
preconditioned steps throw them off."""

_SIZES_KEPT = 8  # whose orders are remembered: few, since those of a large image take its size over

TransformName = Literal[
    "none",
    "uncentred",
    "scaled_half",
    "scaled_double",
    "centred_double",
    "inversion",
    "gamma_half",
    "gamma_double",
    "standardization",
    "zigzag",
    "permutation",
]


@dataclass(frozen=True)
class Values:
    """What a field represents of values in [0, 1]: y = scale * v^power + shift."""

    scale: float = 1.0
    shift: float = 0.0
    power: float = 1.0

    def apply(self, values: np.ndarray) -> np.ndarray:
        raised = values if self.power == 1 else values ** np.float32(self.power)
        return raised * np.float32(self.scale) + np.float32(self.shift)

    def inverse(self, values: Tensor) -> Tensor:
        """v of y; of a power, no less than 0."""
        raised = (values - self.shift) / self.scale
        return raised if self.power == 1 else raised.clamp(min=0) ** (1 / self.power)

    @property
    def in_words(self) -> str:
        raised = f"((y - {self.shift:g}) / {self.scale:g})"
        return f"value = {raised}" + ("" if self.power == 1 else f" ** (1 / {self.power:g}), of no less than 0")


VALUES: dict[str, Values] = {
    "uncentred": Values(),
    "scaled_half": Values(scale=0.5),
    "scaled_double": Values(scale=2.0),
    "centred_double": Values(scale=2.0, shift=-1.0),
    "inversion": Values(scale=-1.0, shift=1.0),
    "gamma_half": Values(power=1 / 0.5),
    "gamma_double": Values(power=1 / 2.0),
}
"""By name. uncentred is the original of the paper, and what is "none" here its centring; gammas are named as there."""


def values_of(name: str, mean: float | None, deviation: float | None) -> Values:
    """The transformation of values that a name stands for."""
    if name == "standardization":
        return Values(scale=1 / (deviation or 1.0), shift=-(mean or 0.0) / (deviation or 1.0))
    return VALUES.get(name, Values(shift=-_SHIFT))


def _permutation(height: int, width: int) -> np.ndarray:
    return np.random.RandomState(0).permutation(height * width)  # whose numbers NumPy has promised never to change


def _zigzag(height: int, width: int) -> np.ndarray:
    y, x = (index.ravel() for index in np.indices((height, width)))
    diagonal = y + x
    return np.lexsort((np.where(diagonal % 2 == 0, x, y), diagonal))


PLACES: dict[str, tuple[Callable[[int, int], np.ndarray], str]] = {
    "permutation": (_permutation, "numpy.random.RandomState(0).permutation(height * width)"),
    "zigzag": (_zigzag, "the zigzag of JPEG: along antidiagonals, the first of them to the right"),
}
"""By name: for each place in row order, the row-order position of the pixel that is put there; and in words."""


@lru_cache(maxsize=_SIZES_KEPT)
def order_of(name: str, height: int, width: int) -> np.ndarray:
    """Which pixel is put where, see `PLACES`: [H * W]."""
    return PLACES[name][0](height, width)


@lru_cache(maxsize=_SIZES_KEPT)
def inverse_order_of(name: str, height: int, width: int) -> np.ndarray:
    """Where each pixel was put: [H * W]."""
    return np.argsort(order_of(name, height, width))
