"""Flow matching: a velocity field that carries noise to data along straight lines (Lipman et al., ICLR 2023; Liu et
al., "Flow Straight and Fast", ICLR 2023), given the class, which is left out at times for guidance (Ho & Salimans,
2022).

x_t = (1 - t) noise + t data, and the network learns data - noise at (x_t, t, class).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfscale.learn.transforms import Tokens

_TIME_FEATURES = 32


class _Condition(nn.Module):
    """Time and class as a vector: [B], int64 [B] -> [B, W]; class number `classes` means any."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.of_class = nn.Embedding(classes + 1, width)
        self.of_time = nn.Sequential(nn.Linear(2 * _TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor, ranks: Tensor) -> Tensor:
        frequencies = torch.exp(torch.linspace(0, math.log(1000), _TIME_FEATURES, device=time.device))
        angles = time[:, None] * frequencies
        waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return functional.silu(self.of_time(waves) + self.of_class(ranks))


class VectorFlow(nn.Module):
    """Residual blocks over a vector, each scaled and shifted by the condition: for latents."""

    def __init__(self, size: int, classes: int, width: int = 384, depth: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.condition = _Condition(classes, width)
        self.enter, self.leave = nn.Linear(size, width), _zero(nn.Linear(width, size))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth))
        self.shifts = nn.ModuleList(_zero(nn.Linear(width, 2 * width)) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, time: Tensor, ranks: Tensor) -> Tensor:
        condition, hidden = self.condition(time, ranks), self.enter(x)
        for norm, shifts, block in zip(self.norms, self.shifts, self.blocks, strict=True):
            scale, shift = shifts(condition).chunk(2, dim=1)
            hidden = hidden + block(norm(hidden) * (1 + scale) + shift)
        return self.leave(hidden)


class TokenFlow(nn.Module):
    """A transformer over a token per neuron, blocks scaled and shifted by the condition: for standardised weights."""

    def __init__(self, tokens: Tokens, classes: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.heads = tokens, heads
        self.condition = _Condition(classes, width)
        self.enter, self.leave = nn.Linear(tokens.width, width), _zero(nn.Linear(width, tokens.width))
        self.place = nn.Parameter(0.02 * torch.randn(len(tokens), width))
        self.shifts = nn.ModuleList(_zero(nn.Linear(width, 4 * width)) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2 * depth + 1))
        self.joint = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mixed = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor, time: Tensor, ranks: Tensor) -> Tensor:
        condition = self.condition(time, ranks)
        hidden = self.enter(self.tokens(x)) + self.place
        for index, shifts in enumerate(self.shifts):
            scale, shift, scale_after, shift_after = shifts(condition).unsqueeze(1).chunk(4, dim=2)
            hidden = hidden + self._attended(self.norms[2 * index](hidden) * (1 + scale) + shift, index)
            seen = self.norms[2 * index + 1](hidden) * (1 + scale_after) + shift_after
            hidden = hidden + self.blocks[index](seen)
        return self.tokens.inverse(self.leave(self.norms[-1](hidden)))

    def _attended(self, hidden: Tensor, index: int) -> Tensor:
        batch, count, width = hidden.shape
        parts = self.joint[index](hidden).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.mixed[index](mixed.transpose(1, 2).reshape(batch, count, width))


def _zero(layer: nn.Linear) -> nn.Linear:
    """A layer that says nothing at the start."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def flow_loss(
    model: nn.Module, data: Tensor, ranks: Tensor, classes: int, generator: torch.Generator, any_class: float = 0.1
) -> Tensor:
    """Mean squared error of the velocity at random times: [B, K], int64 [B] -> a number.

    Args:
        any_class: share of rows whose class is left out.
    """
    noise = torch.randn(data.shape, generator=generator)
    time = torch.rand(len(data), generator=generator)
    left_out = torch.rand(len(data), generator=generator) < any_class
    at = (1 - time[:, None]) * noise + time[:, None] * data
    velocity = model(at, time, torch.where(left_out, classes, ranks))
    return (velocity - (data - noise)).square().mean()


@torch.no_grad()
def sample(
    model: nn.Module,
    size: int,
    ranks: Tensor,
    classes: int,
    generator: torch.Generator,
    steps: int = 50,
    guidance: float = 1.0,
) -> Tensor:
    """Noise carried to data by Heun's method: int64 [B] -> [B, size].

    Args:
        guidance: 1 samples the classes as they are; more moves samples away from what any class would give.
    """
    x = torch.randn((len(ranks), size), generator=generator)
    anyone = torch.full_like(ranks, classes)

    def velocity(at: Tensor, time: float) -> Tensor:
        when = torch.full((len(at),), time)
        found = model(at, when, ranks)
        return found if guidance == 1 else torch.lerp(model(at, when, anyone), found, guidance)

    for step in range(steps):
        here = velocity(x, step / steps)
        ahead = x + here / steps
        x = ahead if step == steps - 1 else x + (here + velocity(ahead, (step + 1) / steps)) / (2 * steps)
    return x
