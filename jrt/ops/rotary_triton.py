"""The Triton kernel of `jrt.ops.rotary`: between one tensor (B, T, 3, H, D) and three (B, T, H, D), both ways.

Shapes: B batch, T tokens, H heads, D head size, R = half the rotary dimensions, N = B x T rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 2, 1024  # of a program, in each of the three parts


def split(joined: Tensor, cos: Tensor, sin: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fills queries, keys and values; the first two are rotated by the angles."""
    _launch(joined, parts, cos, sin, is_split=True)


def join(parts: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, joined: Tensor) -> None:
    """Fills `joined`, after rotating the first two parts by the negative angles."""
    _launch(joined, parts, cos, sin, is_split=False)


def _launch(joined: Tensor, parts: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, is_split: bool) -> None:
    heads, size = parts[0].shape[2:]
    rows, width = joined.shape[0] * joined.shape[1], heads * size
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    with torch.cuda.device_of(joined):
        _rotary_kernel[grid](
            joined, *parts, cos.contiguous(), sin.contiguous(), rows, WIDTH=width, SIZE=size, HALF=cos.shape[-1],
            IS_SPLIT=is_split, R=ROWS, W=COLUMNS, num_warps=4,
        )  # fmt: skip


@triton.jit
def _rotary_kernel(
    joined, q, k, v, cos, sin, rows, WIDTH: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    IS_SPLIT: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Dimension i of a head becomes x_i cos - x_{i + HALF} sin, and i + HALF becomes x_{i + HALF} cos + x_i sin."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = (tl.program_id(1) * W + tl.arange(0, W))[None, :]
    inside = (row < rows) & (column < WIDTH)
    dim = column % SIZE
    turns = inside & (dim < 2 * HALF)
    is_first = dim < HALF
    angle = row * HALF + tl.where(is_first, dim, dim - HALF)
    cosine = tl.load(cos + angle, mask=turns, other=1.0)
    sine = tl.load(sin + angle, mask=turns, other=0.0)
    sine = tl.where(is_first == IS_SPLIT, -sine, sine)  # of the other dimension of the pair
    other = tl.where(is_first, column + HALF, column - HALF)
    parts = (q, k, v)
    for i in tl.static_range(3):
        apart, together = parts[i] + row * WIDTH, joined + row * (3 * WIDTH) + i * WIDTH
        source, target = (together, apart) if IS_SPLIT else (apart, together)
        x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        if i < 2:
            pair = tl.load(source + other, mask=turns, other=0.0).to(tl.float32)
            x = x * cosine + pair * sine
        tl.store(target + column, x.to(target.dtype.element_ty), mask=inside)
