"""Stateless random numbers: what a datum draws depends on its own key and nothing else.

Every draw is a pure function of (seed of the datum, stream, step, position), computed with the
counter-based generator Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3" (SC 2011). No generator object exists, so the batch a field shares, the worker that fits
it and the attempt that succeeds cannot change its numbers, on any device.

Danger: torch has no unsigned 64-bit arithmetic. The words live in int64; products wrap, and every
right shift is followed by a mask, because int64 shifts are arithmetic.
"""

import hashlib
import math
from enum import IntEnum

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10  # the number of rounds whose statistical quality the paper certifies with margin


class Stream(IntEnum):
    """Independent sequences of one datum; a value is never reused for another purpose."""

    INIT = 0
    SAMPLING = 1
    PROBE = 2
    JITTER = 3
    NOISE = 4


def datum_seed(seed: int, datum_id: str) -> int:
    """The seed of one datum, an unsigned 64-bit number: a hash of the job's seed and the datum's id."""
    digest = hashlib.blake2b(f"{seed}\0{datum_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def as_tensor(seeds: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Unsigned 64-bit seeds as the int64 tensor [F] that the generator takes (same 64 bits)."""
    signed = [s - (1 << 64) if s >= (1 << 63) else s for s in seeds]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def philox(key: Tensor, counter: tuple[Tensor, Tensor | int, Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Four words of 32 bits (in int64) for each broadcast (key, counter): Philox4x32-10.

    Args:
        key: int64, 64 bits of key.
        counter: four words of 32 bits, broadcast against each other and the key.
    """
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    shape = torch.broadcast_shapes(key.shape, *(c.shape for c in counter if isinstance(c, Tensor)))
    c0, c1, c2, c3 = (
        ((c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.int64, device=key.device)) & _WORD).expand(shape)
        for c in counter
    )
    for round_index in range(_ROUNDS):
        if round_index:
            k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD).bitwise_xor_(c1).bitwise_xor_(k0),
            p1 & _WORD,
            ((p0 >> 32) & _WORD).bitwise_xor_(c3).bitwise_xor_(k1),
            p0 & _WORD,
        )
    return c0, c1, c2, c3


def words(seeds: Tensor, stream: Stream, step: Tensor | int, count: int) -> Tensor:
    """`count` words of 32 bits for each seed: [F] -> [F, count], int64 in [0, 2^32).

    Args:
        step: one number for all fields, or one per field [F].
    """
    lanes = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)
    per_field = step[:, None] if isinstance(step, Tensor) else step
    drawn = philox(seeds[:, None], (lanes[None, :], per_field, int(stream), 0))
    return torch.stack(drawn, dim=-1).reshape(len(seeds), -1)[:, :count]


def uniform(seeds: Tensor, stream: Stream, step: Tensor | int, count: int) -> Tensor:
    """Uniform float32 in [0, 1) on the grid of 2^-24: [F] -> [F, count]."""
    return (words(seeds, stream, step, count) >> 8).to(torch.float32) * 2.0**-24


def normal(seeds: Tensor, stream: Stream, step: Tensor | int, count: int) -> Tensor:
    """Standard normal float32: [F] -> [F, count], by Box & Muller (1958) from pairs of uniform numbers."""
    first, second = uniform(seeds, stream, step, count + count % 2).double().view(len(seeds), -1, 2).unbind(2)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :count].float()


def rademacher(seeds: Tensor, stream: Stream, step: Tensor | int, count: int) -> Tensor:
    """-1 or +1 with equal probability, float32: [F] -> [F, count]. One word yields 32 signs."""
    return signs(words(seeds, stream, step, (count + 31) // 32), count)


def signs(drawn: Tensor, count: int) -> Tensor:
    """The bits of words of 32 bits as -1 or +1, float32: int64 [F, count / 32 or more] -> [F, count]."""
    shifts = torch.arange(32, dtype=torch.int64, device=drawn.device)
    bits = (drawn[:, :, None] >> shifts) & 1
    return bits.reshape(len(drawn), -1)[:, :count].to(torch.float32).mul_(2).sub_(1)
