"""The residual stream of a step: the embedding, the additions to it, and the RMSNorm before each product.

The stream x is fp32. With one row, each kernel that writes x also writes partial sums of x^2; the next product adds
these up and applies the norm to its input. With more rows, a product writes S partial sums of its output, each over a
part of its inputs. A separate kernel then adds them to x, applies the norm, and writes the result in the dtype of the
weights.

Shapes: B batch rows, W width, P partial sums of squares a row, S partial sums of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import MOST_SPLITS, after_previous, early, release_next

BLOCK = 256  # columns that one program of `embed` writes


@dataclass(frozen=True)
class Stream:
    """The buffers of the residual stream."""

    x: Tensor  # (B, W) fp32
    squares: Tensor  # (B, W) fp32, partial sums of x^2 in the first columns of each row
    partial: Tensor  # (MOST_SPLITS, B, W) fp32, with one row (1, B, W), partial sums of the last product
    normed: Tensor  # (B, W) in the dtype of the weights, the result of `add_and_norm`

    @classmethod
    def empty(cls, rows: int, width: int, like: Tensor) -> Stream:
        """A stream of zeros; like: a weight, for dtype and device."""
        x = torch.zeros(rows, width, device=like.device)
        splits = 1 if rows == 1 else MOST_SPLITS
        return cls(x, torch.zeros_like(x), x.new_zeros(splits, rows, width), like.new_zeros(rows, width))


class Left(NamedTuple):
    """What the launch before a norm left to it in the stream's buffers."""

    parts: int  # with one row, the number of partial sums of x^2
    splits: int = 0  # with more rows, the number of partial sums that have yet to be added to x
    bias: Tensor | None = None  # (W,) to be added with them


class Norm(NamedTuple):
    """An RMSNorm of the residual stream."""

    weight: Tensor  # (W,)
    eps: float
    left: Left


def embedded(width: int) -> Left:
    """What `embed` leaves to the next norm."""
    return Left(triton.cdiv(width, BLOCK))


def embed(ids: Tensor, table: Tensor, stream: Stream) -> None:
    """Starts the residual stream with the rows `ids` (B,) of `table` (V, W)."""
    batch, width = stream.x.shape
    _embed_kernel[(embedded(width).parts, batch)](
        ids, table, stream.x, stream.squares, width, stream.squares.shape[1], BN=BLOCK, num_warps=4,
        **early(ids.device),
    )  # fmt: skip


def add_and_norm(stream: Stream, norm: Norm) -> Tensor:
    """Adds the partial sums and the bias to x; returns norm(x) (B, W) in the dtype of the weights. The next call
    overwrites it."""
    batch, width = stream.x.shape
    BW = triton.next_power_of_2(width)
    left = norm.left
    _norm_kernel[(batch,)](
        stream.x, stream.partial, stream.x if left.bias is None else left.bias, norm.weight, stream.normed,
        batch, width, norm.eps, S=left.splits, BIAS=left.splits > 0 and left.bias is not None, BW=BW,
        num_warps=min(16, max(4, BW // 256)), **early(stream.x.device),
    )  # fmt: skip
    return stream.normed


@triton.jit
def inverse_norm(squares, P, K, eps, PP: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of one row from its first P partial sums of squares; PP >= P, a power of two."""
    part = tl.arange(0, PP)
    return tl.rsqrt(tl.sum(tl.load(squares + part, mask=part < P, other=0.0), 0) / K + eps)


@triton.jit
def _norm_kernel(
    x, partial, bias, norm, out, B, W, eps, S: tl.constexpr, BIAS: tl.constexpr, BW: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BW)
    inside = k < W
    weight = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    added = tl.zeros((BW,), tl.float32)
    if BIAS:
        added += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    release_next(PDL)
    after_previous(PDL)
    y = tl.load(x + row * W + k, mask=inside, other=0.0)
    if S > 0:
        for split in tl.static_range(S):
            added += tl.load(partial + (split * B + row) * W + k, mask=inside, other=0.0)
        y += added.to(out.dtype.element_ty).to(tl.float32)
        tl.store(x + row * W + k, y, mask=inside)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / W + eps) * weight
    tl.store(out + row * W + k, y, mask=inside)


@triton.jit
def _embed_kernel(ids, table, x, squares, W, stride, BN: tl.constexpr, PDL: tl.constexpr):
    release_next(PDL)
    after_previous(PDL)
    row, block = tl.program_id(1), tl.program_id(0)
    n = block * BN + tl.arange(0, BN)
    y = tl.load(table + tl.load(ids + row) * W + n, mask=n < W, other=0.0).to(tl.float32)
    tl.store(x + row * W + n, y, mask=n < W)
    tl.store(squares + row * stride + block, tl.sum(y * y, 0))
