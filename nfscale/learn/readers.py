"""Models that read a field: its weights as a vector, as neurons, up to their order, or what it says at points.

Each takes standardised rows [B, P] and gives [B, K]. A new reader is a class and a line in `READERS`.

- `mlp`: all weights as one vector. Good where fields share theta0, at chance where they do not.
- `tokens`: a transformer over a token per neuron (incoming weights and bias).
- `equivariant`: layers that do not see the order of hidden neurons (Zhou et al., "Permutation Equivariant Neural
  Functionals", NeurIPS 2023, the NP variant): means over neurons take the place of products.
- `probe`: asks each field for its values at coordinates that are learned, and reads those: what a reader of weights has
  to beat (Kofinas et al., ICLR 2024; Herrmann et al., 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nfscale.errors import CallerError
from nfscale.fields import Field
from nfscale.layout import Layout
from nfscale.learn.transforms import Standardizer, Tokens


def mlp(inputs: int, width: int, outputs: int, depth: int = 2, dropout: float = 0.5) -> nn.Sequential:
    """Linear layers with GELU and dropout between them."""
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class VectorReader(nn.Module):
    """All weights as one vector, with Gaussian noise on them while training."""

    def __init__(self, layout: Layout, outputs: int, width: int = 512, noise: float = 0.3) -> None:
        super().__init__()
        self.noise, self.inner = noise, mlp(layout.size, width, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(rows + self.noise * torch.randn_like(rows) if self.training else rows)


class TokenReader(nn.Module):
    """A transformer over neurons, which it tells apart by their places."""

    def __init__(self, layout: Layout, outputs: int, width: int = 64, depth: int = 2, noise: float = 0.3) -> None:
        super().__init__()
        self.tokens, self.noise = Tokens(layout), noise
        self.enter = nn.Linear(self.tokens.width, width)
        self.place = nn.Parameter(0.02 * torch.randn(len(self.tokens), width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = mlp(width, 2 * width, outputs, depth=1, dropout=0.1)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows + self.noise * torch.randn_like(rows) if self.training else rows
        return self.leave(self.blocks(self.enter(self.tokens(rows)) + self.place).mean(dim=1))


class EquivariantReader(nn.Module):
    """Equivariant layers over all weight matrices and biases of an MLP, then means over their entries.

    Inputs and outputs of the field are not permuted: their axes are channels of the first and the last layer.
    """

    def __init__(self, layout: Layout, outputs: int, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        entries = {entry.name: entry for entry in layout.entries}
        self.layers = sum(name.endswith(".weight") for name in entries)
        named = [(f"layers.{i}.weight", f"layers.{i}.bias") for i in range(self.layers)]
        known = [pair for pair in named if pair[0] in entries and pair[1] in entries]
        if len(known) != len(named) or any(len(entries[weight].shape) != 2 for weight, _ in known) or not known:
            raise CallerError("the equivariant reader takes MLPs with one map per unit; use mlp, tokens or probe")
        self.layout, self.named = layout, named
        self.ins = entries[named[0][0]].shape[1]
        self.outs = entries[named[-1][0]].shape[0]
        channels = [self._channels(index) for index in range(self.layers)]
        self.mixers = nn.ModuleList()
        for level in range(depth):
            now = [(width, width)] * self.layers if level else channels
            self.mixers.append(_Mixer(now, width))
        self.leave = mlp(2 * self.layers * width, 128, outputs, depth=1, dropout=0.2)

    def _channels(self, index: int) -> tuple[int, int]:
        """Of the features of a layer's weights and biases, before the first mixer."""
        weight = self.ins if index == 0 else self.outs if index == self.layers - 1 else 1
        return weight, self.outs if index == self.layers - 1 else 1

    def forward(self, rows: Tensor) -> Tensor:
        params = self.layout.unravel(rows)
        weights, biases = [], []
        for index, (weight, bias) in enumerate(self.named):
            w, b = params[weight], params[bias]  # [B, out, in], [B, out]
            if index == 0:
                w = w.movedim(2, 1).unsqueeze(3)  # [B, ins, out, 1]
            elif index == self.layers - 1:
                w = w.unsqueeze(2)  # [B, outs, 1, in]
            else:
                w = w.unsqueeze(1)
            weights.append(w)
            biases.append(b.unsqueeze(2) if index == self.layers - 1 else b.unsqueeze(1))  # [B, c, out]
        for mixer in self.mixers:
            weights, biases = mixer(weights, biases)
        pooled = [w.mean((2, 3)) for w in weights] + [b.mean(2) for b in biases]
        return self.leave(torch.cat(pooled, dim=1))


class _Mixer(nn.Module):
    """One equivariant layer: [B, c, out, in] and [B, c, out] of every layer -> the same with `width` channels."""

    def __init__(self, channels: list[tuple[int, int]], width: int) -> None:
        super().__init__()
        count = len(channels)
        means = sum(w + b for w, b in channels)
        self.weights, self.biases = nn.ModuleList(), nn.ModuleList()
        for index, (w, b) in enumerate(channels):
            before = sum(channels[index - 1]) if index else 0
            after = channels[index + 1][0] if index + 1 < count else 0
            self.weights.append(nn.Linear(3 * w + b + before + after + means, width))
            self.biases.append(nn.Linear(w + b + after + means, width))

    def forward(self, weights: list[Tensor], biases: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        means = torch.cat([w.mean((2, 3)) for w in weights] + [b.mean(2) for b in biases], dim=1)
        new_weights, new_biases = [], []
        for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
            batch, _, outs, ins = w.shape
            by_out = [w.mean(3), b]  # about the neuron that a weight leads to
            by_in = [w.mean(2)]  # about the neuron that it comes from
            if index + 1 < len(weights):
                by_out.append(weights[index + 1].mean(2))
            if index:
                by_in += [weights[index - 1].mean(3), biases[index - 1]]
            at_out, at_in = torch.cat(by_out, dim=1), torch.cat(by_in, dim=1)
            parts = [
                w,
                at_out.unsqueeze(3).expand(-1, -1, -1, ins),
                at_in.unsqueeze(2).expand(-1, -1, outs, -1),
                means[:, :, None, None].expand(-1, -1, outs, ins),
            ]
            mixed = self.weights[index](torch.cat(parts, dim=1).movedim(1, 3)).movedim(3, 1)
            new_weights.append(nn.functional.gelu(mixed))
            seen = torch.cat([at_out, means[:, :, None].expand(batch, -1, outs)], dim=1)
            new_biases.append(nn.functional.gelu(self.biases[index](seen.movedim(1, 2)).movedim(2, 1)))
        return new_weights, new_biases


class ProbeReader(nn.Module):
    """The values of each field at `points` learned coordinates, read by an MLP.

    While training, the points of a field move together by a random vector of deviation `shift`: a field answers between
    pixels too.
    """

    def __init__(
        self,
        field: Any,
        standardizer: Standardizer,
        start: Tensor | None,
        outputs: int,
        points: int = 128,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.field, self.standardizer, self.start, self.shift = field, standardizer, start, shift
        self.coordinates = nn.Parameter(_spread(points, field.dimensions))
        self.inner = mlp(points * field.channels, 512, outputs)
        self.norm = nn.BatchNorm1d(points * field.channels)

    def forward(self, rows: Tensor) -> Tensor:
        weights = self.standardizer.inverse(rows)
        if self.start is not None:
            weights = weights + self.start.to(rows.device)
        points = self.coordinates[None]
        if self.training:
            points = points + self.shift * torch.randn(len(rows), 1, points.shape[2], device=points.device)
        values = self.field.apply(self.field.layout.unravel(weights), points)
        return self.inner(self.norm(values.flatten(1)))


def _spread(points: int, dimensions: int) -> Tensor:
    """Points that cover [-1, 1]^D evenly: float32 [points, D] (a rank-1 lattice by the generalised golden ratio)."""
    ratio = 2.0
    for _ in range(32):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = torch.tensor([ratio ** -(axis + 1) for axis in range(dimensions)], dtype=torch.float64)
    places = (0.5 + torch.arange(1, points + 1, dtype=torch.float64)[:, None] * steps) % 1
    return (1.9 * places - 0.95).float()


_SHIFT = 0.03
"""Of a domain from -1 to 1: 94.0 to 95.6 % on five splits of digits of 28 pixels (`python -m
pipelines.mnist_generate`). Never more than half a sample, which is little for sounds."""


@dataclass(frozen=True)
class Fields:
    """What a reader may know of the fields that it reads."""

    field: Field
    standardizer: Standardizer
    """Of their weights less theta0."""
    theta0: Tensor | None
    spacing: float
    """Between two samples of a datum, in a domain from -1 to 1."""


READERS: dict[str, Callable[[Fields, int], nn.Module]] = {
    "mlp": lambda read, outputs: VectorReader(read.field.layout, outputs),
    "tokens": lambda read, outputs: TokenReader(read.field.layout, outputs),
    "equivariant": lambda read, outputs: EquivariantReader(read.field.layout, outputs),
    "probe": lambda read, outputs: ProbeReader(
        read.field, read.standardizer, read.theta0, outputs, shift=min(_SHIFT, read.spacing / 2)
    ),
}
"""By name: the fields and the number of classes -> a model of standardised rows."""
