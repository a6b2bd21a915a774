"""Batched products between hidden layers, in the precision that a step is asked for.

- float32: of operands as they are.
- tf32: torch's float32 products with operands cut to 11 bits on an NVIDIA GPU. The switch for it is the process's;
  it is set for our own products alone, one by one, and put back.
- float16: of operands rounded to 11 bits and a narrower range, summed in float32. What is between -1 and 1, as sines
  are, has no more digits in tf32. Errors are small beside it, so they are multiplied by a power of two.

First layers are no business of these: phases of many turns need all their bits. (11 bits there cost 1 to 14 dB.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "float16"]

_LARGEST_BITS = 8
"""Slopes reach 2^8 where an error is as large as the values: at 60 dB they are still normal float16, and errors 255
times the values are finite. As in the fused step."""


class Products:
    """In float32, or whatever the operands are in."""

    dtype: torch.dtype | None = None
    """Of operands that are rounded; None: they are not."""

    def operand(self, tensor: Tensor) -> Tensor:
        """What a product takes of a tensor."""
        return tensor

    def add(self, into: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """beta into + alpha left right, in the place of `into`: [b, m, n], [b, m, k], [b, k, n]."""
        return into.baddbmm_(left, right, beta=beta, alpha=alpha)

    def affine(
        self, plus: Tensor, left: Tensor, right: Tensor, out: Tensor, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """beta plus + alpha left right, where `plus` broadcasts."""
        return torch.baddbmm(plus, left, right, beta=beta, alpha=alpha, out=out)


class _Tf32(Products):
    def add(self, into: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        with _in_tf32():
            return super().add(into, left, right, beta, alpha)

    def affine(
        self, plus: Tensor, left: Tensor, right: Tensor, out: Tensor, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        with _in_tf32():
            return super().affine(plus, left, right, out, beta, alpha)


class _Float16(Products):
    dtype = torch.float16

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.float16)

    def add(self, into: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        if not _sums_wide(into.device):
            return into.baddbmm_(left.to(into.dtype), right.to(into.dtype), beta=beta, alpha=alpha)
        return torch.baddbmm(into, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=into)

    def affine(
        self, plus: Tensor, left: Tensor, right: Tensor, out: Tensor, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        return self.add(out.copy_(plus), left, right, beta, alpha)


_KINDS: dict[Precision, type[Products]] = {"float32": Products, "tf32": _Tf32, "float16": _Float16}


def products_of(precision: Precision) -> Products:
    return _KINDS[precision]()


@contextmanager
def _in_tf32() -> Iterator[None]:
    switch: Any = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if hasattr(switch, "fp32_precision") else ("allow_tf32", True)  # torch < 2.9
    before = getattr(switch, name)
    setattr(switch, name, on)
    try:
        yield
    finally:
        setattr(switch, name, before)


@lru_cache
def _sums_wide(device: torch.device) -> bool:
    """Whether torch has products of float16 operands with float32 results here; else operands are widened again."""
    if device.type != "cuda":
        return False
    ones = torch.ones((2, 16, 16), dtype=torch.float16, device=device)
    sums = torch.ones((2, 16, 16), device=device)
    try:
        torch.baddbmm(sums, ones, ones, out_dtype=torch.float32, beta=2, alpha=2.0**-20, out=sums)
    except (RuntimeError, TypeError):
        return False
    return bool((sums == 2 + 2.0**-16).all())


def boosts(values: Tensor, largest_share: Tensor | float) -> Tensor:
    """Powers of two that slopes of each field are multiplied by before they are rounded: [k, N, C] -> [k, 1].

    Args:
        largest_share: of a sample in the loss, for all or [k].
    """
    slopes = values.abs().amax(dim=(1, 2)).clamp(min=1.0) * (2 / values.shape[2]) * largest_share
    exponent = torch.frexp(slopes.clamp(2.0**-60, 2.0**60)).exponent
    return torch.ldexp(torch.ones_like(slopes), _LARGEST_BITS - exponent)[:, None]
