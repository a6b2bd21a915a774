"""What the tests of the engine fit: small images, and fields of 205 weights for them.

Sizes are awkward on purpose (63 samples, 12 units, rows of 205 weights): a kernel that treats the end of a row
or another alignment differently shows itself.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nfscale.engine import Calibration, Fitted, Stop, calibrate, fit
from nfscale.engine.native import unavailable
from nfscale.fields import MLP
from nfscale.optim import ESGD, Adam, Schedule
from nfscale.signals import Image, Samples

SEED = 3
SIGNAL = Image(1)
FIELD = MLP(2, 1, width=12, depth=2, omega_0=10.0, omega_hidden=10.0, weight_scale=1.0)
STOP = Stop(max_steps=40, check_every=20)
SCHEDULE = Schedule("cosine", total_steps=40, warmup=5)
ADAM = Adam(0.01, SCHEDULE)
ESGD_SHARED = ESGD(0.5, SCHEDULE)
FACTORS = torch.linspace(0.5, 2, FIELD.layout.size)
"""Of params on their rates."""
ESGD_OWN = ESGD(0.05, SCHEDULE, curvature="per_field")

NEEDS_COMPILER = pytest.mark.skipif(unavailable() is not None, reason=f"no native step: {unavailable()}")
STEPS = ["plain", "torch", pytest.param("native", marks=NEEDS_COMPILER)]
"""To try a promise on every step."""


def smooth_image(number: int, height: int = 9, width: int = 7) -> np.ndarray:
    draw = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / 10
    return np.clip(0.5 + 0.4 * np.sin(3 * draw.random() * y + 4 * draw.random() * x + 6 * draw.random()), 0, 1)


def data_of(count: int, height: int = 9, width: int = 7) -> list[tuple[str, Samples]]:
    return [
        (f"{height}x{width}-{n}", SIGNAL.samples(smooth_image(n, height, width).astype(np.float32)))
        for n in range(count)
    ]


DATA = data_of(5)


class Rays(Image):
    """Of a sample (a segment from one point to another), the mean of the field along it."""

    points_per_sample = 5
    jittered = True

    def predict(self, apply, samples):
        count, points = samples.values.shape[1], self.points_per_sample
        within = 0.5 if samples.jitter is None else samples.jitter[..., None]
        along = ((torch.arange(points) + within) / points)[..., None]
        start, end = samples.coordinates[..., None, :2], samples.coordinates[..., None, 2:]
        values = apply((start + along * (end - start)).flatten(1, 2))
        return values.unflatten(1, (count, points)).mean(dim=2)


RAYS = Rays(1)


def rays_of(number: int, count: int, salt: int = 0) -> Samples:
    """Segments through a smooth function that the number decides."""
    draw = torch.Generator().manual_seed(1000 * salt + number)
    ends = torch.rand(count, 2, 2, generator=draw) * 2 - 1
    along = torch.linspace(0, 1, 50)[:, None]
    points = ends[:, :1] + along * (ends[:, 1:] - ends[:, :1])
    values = 0.4 * torch.sin(2 * points[..., :1] + number * points[..., 1:]).mean(dim=1)
    return Samples(ends.flatten(1), values)


def ray_data(count: int, checked: int | None = 13, held_back: int | None = 9) -> list[tuple[str, Samples]]:
    """21 rays each to be fitted, others to be checked and to be held back."""

    def part(number: int, size: int | None, salt: int) -> Samples | None:
        return None if size is None else rays_of(number, size, salt)

    return [
        (
            f"rays-{n}-{checked}-{held_back}",
            replace(rays_of(n, 21), check=part(n, checked, 1), heldout=part(n, held_back, 2)),
        )
        for n in range(count)
    ]


def stacked(data: list[tuple[str, Samples]]) -> Samples:
    return Samples(torch.stack([s.coordinates for _, s in data]), torch.stack([s.values for _, s in data]))


def calibration_of(optimizer: ESGD, samples: int | str, stop: Stop = STOP) -> Calibration:
    """From data that the tests do not fit."""
    data = [(f"other-{n}", SIGNAL.samples(smooth_image(100 + n))) for n in range(4)]
    return calibrate(FIELD, SIGNAL, data, optimizer=optimizer, stop=stop, seed=SEED, samples=samples, device="cpu")


def fitted(data, optimizer=ADAM, samples="full", stop=STOP, field=FIELD, signal=SIGNAL, **options) -> dict[str, Fitted]:
    """All fields by id, fitted on the CPU."""
    if "diagonal" in optimizer.needs and "calibration" not in options:
        options["calibration"] = calibration_of(optimizer, samples)
    options = {"seed": SEED, "device": "cpu", **options}
    results = list(fit(field, signal, data, optimizer=optimizer, samples=samples, stop=stop, **options))
    assert len({result.id for result in results}) == len(results)
    return {result.id: result for result in results}


def assert_same_bits(left: Fitted, right: Fitted) -> None:
    assert torch.equal(left.weights, right.weights), left.id
    assert replace(left, weights=right.weights) == right


def assert_as_alone(together: dict[str, Fitted], data, **how) -> None:
    """Every field of `together` is what it is when it is fitted alone."""
    assert set(together) == {datum_id for datum_id, _ in data}
    for datum in data:
        alone = fitted([datum], **how)
        assert_same_bits(together[datum[0]], alone[datum[0]])
