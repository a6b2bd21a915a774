"""What the benchmarks fit: named workloads, and the data, samples and initial weights that all methods share.

| A | 28 x 28 grey images, full batch        | E | one 256 x 256 grey image, full batch               |
| B | 32 x 32 RGB images, full batch         | F | 64 x 64 RGB tiles, 64 of their samples at a step   |
| C | 128 x 128 grey images, full batch      | G | 64 x 64 RGB tiles, 256 of their samples at a step  |
| D | 4,096 points in space, full batch      |   |                                                    |

Values are sums of waves, drawn by a seed: a step takes as long on them as on photographs.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from nfscale.engine.sampling import Sampler
from nfscale.errors import CallerError
from nfscale.fields import MLP
from nfscale.rng import as_tensor
from nfscale.signals import Image, Pointwise, Samples, mean_squared_error, psnr_db

_WAVES = 48


@dataclass(frozen=True)
class Workload:
    """Fields of one geometry and how many of their samples a step takes."""

    fields: int
    samples: int
    """Of each field."""
    width: int
    depth: int
    dimensions: int = 2
    channels: int = 1
    sampled: int | None = None
    """Stratified samples of a step; None: all."""

    @property
    def per_step(self) -> int:
        return self.samples if self.sampled is None else self.sampled

    @property
    def field(self) -> MLP:
        return MLP(self.dimensions, self.channels, width=self.width, depth=self.depth)

    @property
    def operations(self) -> int:
        """Floating point operations of the products of one step: forward, and twice that backward."""
        products = sum(fan_out * fan_in for fan_out, fan_in in self.field.shapes)
        return 3 * 2 * products * self.fields * self.per_step

    @property
    def activations(self) -> int:
        """Sines of one step, each of which also takes its cosine."""
        return self.fields * self.per_step * self.width * self.depth

    @property
    def weights(self) -> int:
        """Weights that one step updates."""
        return self.fields * self.field.layout.size


WORKLOADS = {
    "A": Workload(256, 28**2, width=32, depth=3),
    "B": Workload(64, 32**2, width=64, depth=3, channels=3),
    "C": Workload(16, 128**2, width=128, depth=3),
    "D": Workload(16, 4096, width=64, depth=4, dimensions=3),
    "E": Workload(1, 256**2, width=256, depth=3),
    "F": Workload(1024, 64**2, width=64, depth=4, channels=3, sampled=64),
    "G": Workload(256, 64**2, width=128, depth=4, channels=3, sampled=256),
}


def workloads_named(
    names: str, fields: int | None = None, known: Mapping[str, Workload] = WORKLOADS
) -> dict[str, Workload]:
    """The workloads of a list such as `A,B`, with at most so many fields each.

    Raises:
        CallerError: naming those that are known.
    """
    named = {name: known[name] for name in chosen_from(known, names, "workload")}
    if fields is None:
        return named
    if fields < 1:
        raise CallerError(f"--fields is at least 1, got {fields}")
    return {name: replace(workload, fields=min(fields, workload.fields)) for name, workload in named.items()}


def chosen_from(known: Collection[str], names: str, what: str) -> list[str]:
    """The names of a list with commas, each once.

    Raises:
        CallerError: if one is not known, or none is given.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise CallerError(f"unknown {what} {(unknown or [names])[0]!r}; known {what}s: {', '.join(known)}")
    return wanted


@dataclass(frozen=True)
class Points(Pointwise):
    """Values at points anywhere, by their mean squared error."""

    dimensions: int
    channels: int

    quality_name = "psnr_db"
    squared_error = True

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        return mean_squared_error(predicted, samples)

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        return psnr_db(predicted, samples)


@dataclass(frozen=True)
class Problem:
    """A range of the fields of a workload, with all that a method starts from."""

    workload: Workload
    samples: Samples
    """[F, N, ...]."""
    rows: Tensor
    """float32 [F, P]: initial weights, those of each field its own."""
    seeds: Tensor
    """int64 [F]."""
    learning_rate: float = 1e-4

    @property
    def field(self) -> Any:
        """An `MLP`."""
        return self.workload.field

    @property
    def signal(self) -> Any:
        """What the engine asks of a signal, and nothing that a job would."""
        return Points(self.workload.dimensions, self.workload.channels)

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.workload.samples, self.workload.per_step)

    def first_positions(self, steps: int) -> Tensor | None:
        """Samples of the first steps, as the engine draws them: int64 [F, steps, n]; None for all samples."""
        if self.sampler.is_full:
            return None
        return self.sampler.positions(self.seeds, torch.zeros_like(self.seeds), steps)

    def to(self, device: torch.device) -> "Problem":
        samples = self.samples.map(lambda tensor: tensor.to(device))
        return replace(self, samples=samples, rows=self.rows.to(device), seeds=self.seeds.to(device))


def problem_of(workload: Workload, first: int = 0, count: int | None = None) -> Problem:
    """The fields [first, first + count) of a workload, on the CPU: the same whichever range they are part of."""
    numbers = list(range(first, first + (workload.fields if count is None else count)))
    seeds = as_tensor(numbers)
    parts = [_datum(workload, number) for number in numbers]
    samples = parts[0].map(lambda *tensors: torch.stack(tensors), *parts[1:])
    rows = workload.field.layout.ravel(workload.field.init(seeds))
    return Problem(workload, samples, rows, seeds)


def _datum(workload: Workload, number: int) -> Samples:
    draw = torch.Generator().manual_seed(number)
    side = round(workload.samples**0.5)
    if workload.dimensions == 2 and side**2 == workload.samples:
        coordinates = _pixels(side)
    else:
        coordinates = torch.rand(workload.samples, workload.dimensions, generator=draw) * 2 - 1
    return Samples(coordinates, waves(coordinates, workload.channels, draw))


@cache
def _pixels(side: int) -> Tensor:
    """Pixel centres of a square image in the order of their samples: [side * side, 2]."""
    return Image(1).samples(torch.zeros(side, side).numpy()).coordinates


def waves(coordinates: Tensor, channels: int, draw: torch.Generator) -> Tensor:
    """Sums of plane waves whose amplitude falls with their frequency, in [-0.5, 0.5]: [N, D] -> [N, C].

    As in photographs, every octave up to half of what the samples can hold has as much energy.
    """
    samples, dimensions = coordinates.shape
    fastest = math.pi / 4 * samples ** (1 / dimensions)
    frequency = torch.exp(torch.rand(channels, _WAVES, generator=draw) * math.log(fastest))
    direction = torch.nn.functional.normalize(torch.randn(dimensions, channels, _WAVES, generator=draw), dim=0)
    phase = torch.rand(channels, _WAVES, generator=draw) * 2 * math.pi
    waving = torch.sin(coordinates @ (direction * frequency).flatten(1) + phase.flatten())
    values = (waving.unflatten(1, (channels, _WAVES)) / frequency).sum(dim=2)
    return values / (2 * values.abs().amax(dim=0))
