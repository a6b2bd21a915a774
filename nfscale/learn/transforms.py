"""What models are given instead of raw weights: standardised differences from theta0, and tokens.

Statistics come from the training rows alone and are stored in the run folder, so that whoever samples or classifies
later stands on the same scale. Everything here is differentiable, works on any device, and has an exact inverse.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nfscale.errors import CallerError
from nfscale.layout import Layout
from nfscale.learn.data import Rows, WeightsStream
from nfscale.store.run_folder import RunFolder
from nfscale.store.table import WeightsTable

Per = Literal["scalar", "layer"]
"""A deviation for each weight, or one for all weights of a tensor of the layout."""

_SMALLEST = 1e-12  # deviation: a weight that never moves stays 0


@dataclass(frozen=True)
class Standardizer:
    """(weights - theta0 - mean) / deviation and back: [B, P] <-> [B, P]."""

    mean: Tensor
    """float32 [P]"""
    deviation: Tensor
    """float32 [P], positive"""

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.mean.to(rows.device)) / self.deviation.to(rows.device)

    def inverse(self, rows: Tensor) -> Tensor:
        """Standardised rows -> weights - theta0."""
        return rows * self.deviation.to(rows.device) + self.mean.to(rows.device)

    @classmethod
    def of(cls, rows: Tensor, layout: Layout, per: Per = "scalar") -> "Standardizer":
        """The mean and deviation of rows [B, P], which should be of the training split.

        Raises:
            CallerError: if there are fewer than two rows.
        """
        if len(rows) < 2:
            raise CallerError(f"statistics of {len(rows)} rows say nothing; at least 2 training rows are needed")
        mean, square = rows.double().mean(0), rows.double().square().mean(0)
        return cls._of_moments(mean, square, layout, per)

    @classmethod
    def of_table(cls, table: WeightsTable, rows: Rows, per: Per = "scalar") -> "Standardizer":
        """The same of the rows of a table that may be larger than memory, read once.

        Raises:
            CallerError: if there are fewer than two rows.
        """
        total, square, count = torch.zeros(table.layout.size).double(), torch.zeros(table.layout.size).double(), 0
        for weights, _ in WeightsStream(table, 1024, rows=rows, seed=None):
            total += weights.double().sum(0)
            square += weights.double().square().sum(0)
            count += len(weights)
        if count < 2:
            raise CallerError(f"statistics of {count} rows say nothing; at least 2 training rows are needed")
        return cls._of_moments(total / count, square / count, table.layout, per)

    @classmethod
    def _of_moments(cls, mean: Tensor, square: Tensor, layout: Layout, per: Per) -> "Standardizer":
        variance = (square - mean.square()).clamp(min=0)
        if per == "layer":
            for entry in layout.entries:
                part = variance[entry.offset : entry.offset + entry.size]
                part.fill_(part.mean())
        return cls(mean.float(), variance.sqrt().clamp(min=_SMALLEST).float())

    def save(self, folder: RunFolder, name: str) -> None:
        """Into a file of the run folder, as npz."""
        buffer = io.BytesIO()
        np.savez(buffer, mean=self.mean.numpy(), deviation=self.deviation.numpy())
        folder.files.replace(name, buffer.getvalue())

    @classmethod
    def load(cls, folder: RunFolder, name: str) -> "Standardizer":
        """What `save` stored.

        Raises:
            CallerError: if there is no such file.
        """
        try:
            stored = np.load(io.BytesIO(folder.files.read(name)), allow_pickle=False)
        except FileNotFoundError as error:
            raise CallerError(f"{folder.files.place(name)} is missing; train on this run first") from error
        return cls(torch.from_numpy(stored["mean"]), torch.from_numpy(stored["deviation"]))


@dataclass(frozen=True)
class Tokens:
    """Rows of weights as a sequence of tokens with a place each, and back.

    A token per neuron holds its incoming weights and its bias; tensors without neurons (tables of features) give a
    token for each of their rows. A token per layer holds all weights and biases of a layer. Shorter tokens are filled
    up with zeros, which the way back drops.
    """

    layout: Layout
    per: Literal["neuron", "layer"] = "neuron"

    @cached_property
    def _groups(self) -> list[np.ndarray]:
        """Positions in the row of weights, a matrix [tokens, width] for each layer."""
        biases = {e.name.removesuffix("bias"): e for e in self.layout.entries if e.name.endswith("bias")}
        groups: list[np.ndarray] = []
        used: set[str] = set()
        for entry in self.layout.entries:
            if entry.name in used or (entry.name.endswith("bias") and f"{entry.name[:-4]}weight" in self._names):
                continue
            places = entry.offset + np.arange(entry.size)
            bias = biases.get(entry.name.removesuffix("weight")) if entry.name.endswith("weight") else None
            if bias is None:
                groups.append(places.reshape(-1, entry.shape[-1]))
                continue
            matrix = places.reshape(entry.shape)
            of_bias = (bias.offset + np.arange(bias.size)).reshape(bias.shape)
            if matrix.shape[:-1] != of_bias.shape:  # maps that share a bias: each in tokens of its own
                groups += [matrix.reshape(-1, entry.shape[-1]), of_bias.reshape(-1, 1)]
                continue
            joined = np.concatenate([matrix, of_bias[..., None]], axis=-1)
            groups.append(joined.reshape(-1, joined.shape[-1]))
        return [group.reshape(1, -1) for group in groups] if self.per == "layer" else groups

    @cached_property
    def _names(self) -> set[str]:
        return {entry.name for entry in self.layout.entries}

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return max(group.shape[1] for group in self._groups)

    @cached_property
    def places(self) -> Tensor:
        """int64 [T, 2]: the layer of each token and which of that layer it is."""
        parts = [[(layer, rank) for rank in range(len(group))] for layer, group in enumerate(self._groups)]
        return torch.tensor([place for part in parts for place in part])

    @cached_property
    def _positions(self) -> Tensor:
        """int64 [T, width]: where each number comes from; P where there is none."""
        filled = [
            np.pad(group, ((0, 0), (0, self.width - group.shape[1])), constant_values=self.layout.size)
            for group in self._groups
        ]
        return torch.from_numpy(np.concatenate(filled))

    def __len__(self) -> int:
        """T, tokens of a field."""
        return len(self._positions)

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, P] -> [B, T, width]."""
        padded = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)
        return padded[:, self._positions.to(rows.device)]

    def inverse(self, tokens: Tensor) -> Tensor:
        """[B, T, width] -> [B, P]; what filled the tokens up is dropped."""
        return tokens.flatten(1)[:, self._back.to(tokens.device)]

    @cached_property
    def _back(self) -> Tensor:
        flat = self._positions.flatten()
        back = torch.empty(self.layout.size, dtype=torch.int64)
        known = flat < self.layout.size
        back[flat[known]] = torch.arange(len(flat))[known]
        return back

    @cached_property
    def mask(self) -> Tensor:
        """float32 [T, width]: 1 where a number is a weight, 0 where it only fills up."""
        return (self._positions < self.layout.size).float()


# --- augmentations: functions of rows [B, P] and a generator


def noise(rows: Tensor, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian noise of this deviation on rows that are standardised."""
    drawn = torch.randn(rows.shape, generator=generator, device=rows.device)
    return rows + scale * drawn


def dropped(rows: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """This share of each row's weights put to zero, which of standardised rows is their mean."""
    kept = torch.rand(rows.shape, generator=generator, device=rows.device) >= share
    return rows * kept
