"""Rotary positions in plain PyTorch (see `jrt.ops.rotary`).

Shapes: B batch, T tokens, H heads, D head size, R = half the rotary dimensions, rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits (B, T, 3 H D) into queries, keys and values (B, T, H, D), and rotates queries and keys."""
    qk, v = qkv.unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], dim=2)
    q, k = rotate(qk, cos, sin).chunk(2, dim=2)
    return q, k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, T, H, D): dimension i with dimension i + R, for i below R; the other dimensions stay as they
    are. cos and sin: (B, T, 1, R)."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)
