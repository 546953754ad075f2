"""Softmax attention of one token over cached keys, in a window or over all tokens, with rotary positions.

The cache is a ring buffer of R columns: the token at column t (padding counts) is stored at t mod R. For a window of W
earlier keys, R = W + 1. For full attention, R is at least the length of the text. Keys of padding are not seen.

A program computes one head of one row over one of C parts of the ring. The program of part 0 also rotates the new key,
attends to it, and writes it to the ring; no other program reads that column. With C > 1, a second kernel combines the
parts.

Shapes: B batch, H heads, D head size, R columns of the ring, C parts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import after_previous, early, release_next

PART = 256  # a part has at least so many columns
PROGRAMS = 264  # with so many programs, more parts make nothing faster
WHOLE = 256  # a ring of at most so many columns is loaded in one block, so that a window costs one memory latency
MANY = 1024  # so many programs saturate the memory, even if each loads only a small block at a time


def parts(rows: int, heads: int, ring: int) -> int:
    """C, the number of parts that the ring is cut into."""
    return max(1, min(-(-ring // PART), PROGRAMS // (rows * heads), 64))


def attention_step(
    qkv: Tensor, keys: Tensor, values: Tensor, column: Tensor, pads: Tensor,
    rotary: tuple[Tensor, Tensor, int] | None, scale: float, partial: Tensor, o: Tensor,
) -> None:  # fmt: skip
    """Writes o (B, H D) for the token with the queries, keys and values in `qkv`, and its key and value to the ring.

    Args:
        qkv: (B, 3 H D).
        keys, values: (B, H, R, D), updated in place.
        column: (1,) int64 columns before this token.
        pads: (B,) int64 columns before each row's first own token.
        rotary: cos and sin (L, D) fp32 of L positions as in `jrt.decoding.tables.Rotary`, and half the number of
            rotated dimensions; None: no rotation.
        scale: factor of the scores.
        partial: (B, H, C, D + 2) fp32 scratch.
        o: (B, H D).
    """
    batch, heads, ring, D = keys.shape
    C = partial.shape[2]
    BD = triton.next_power_of_2(D)
    cos, sin, half = (qkv, qkv, 0) if rotary is None else rotary
    block = triton.next_power_of_2(max(1, ring - 1)) if ring <= WHOLE else 8192 // BD
    warps = min(16, max(4, block * BD // 2048))
    if batch * heads * C >= MANY:
        block, warps = 1024 // BD, 1
    options = early(qkv.device)
    _attention_kernel[(batch * heads, C)](
        qkv, keys, values, column, pads, cos, sin, partial, o, heads, ring, scale, half,
        D=D, C=C, BD=BD, BR=block, ROTARY=rotary is not None, num_warps=warps, **options,
    )  # fmt: skip
    if C > 1:
        _combine_kernel[(batch * heads,)](
            partial, o, D=D, C=C, BC=triton.next_power_of_2(C), BD=BD, num_warps=4, **options
        )


@triton.jit
def _rotated(x, cos, sin, position, e, inside, half, D: tl.constexpr, ROTARY: tl.constexpr, DTYPE: tl.constexpr):
    """A head's vector x (BD,) in fp32, rotated and rounded to the dtype of the cache."""
    y = tl.load(x + e, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        partner = tl.where(e < half, e + half, tl.where(e < 2 * half, e - half, e))
        other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + position * D + e, mask=inside, other=0.0)
        s = tl.load(sin + position * D + e, mask=inside, other=0.0)
        y = y * c + other * s
    return y.to(DTYPE).to(tl.float32)


@triton.jit
def _block(keys, values, start, end, R, e, inside, D: tl.constexpr, BR: tl.constexpr):
    """Keys and values (BR, BD) of the tokens from column `start` on, and which of them (BR,) come before `end`."""
    i = tl.arange(0, BR)
    r = start % R + i
    r = tl.where(r >= R, r - R, r)  # a cheaper modulo: r < 2 R, because fewer than R tokens are seen
    seen = start + i < end
    at = r[:, None] * D + e[None, :]
    read = seen[:, None] & inside[None, :]
    return tl.load(keys + at, mask=read, other=0.0), tl.load(values + at, mask=read, other=0.0), seen


@triton.jit
def _attention_kernel(
    qkv, keys, values, column, pads, cos, sin, partial, o, H, R, scale, half,
    D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, ROTARY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pair // H, pair % H
    e = tl.arange(0, BD)
    inside = e < D
    now = tl.load(column).to(tl.int32)
    first = tl.load(pads + b).to(tl.int32)
    oldest = tl.maximum(now - R + 1, first)  # column of the first token that is seen
    share = tl.cdiv(tl.cdiv(now - oldest, C), BR) * BR
    start = oldest + part * share
    end = tl.minimum(start + share, now)
    ring = pair * R * D
    k, v, seen = _block(keys + ring, values + ring, start, end, R, e, inside, D, BR)
    release_next(PDL)
    after_previous(PDL)
    dtype: tl.constexpr = keys.dtype.element_ty
    x = qkv + b * (3 * H * D) + h * D
    q = _rotated(x, cos, sin, now - first, e, inside, half, D, ROTARY, dtype) * scale
    own_k = _rotated(x + H * D, cos, sin, now - first, e, inside, half, D, ROTARY, dtype)
    own_v = tl.load(x + 2 * H * D + e, mask=inside, other=0.0)
    is_first = part == 0  # takes the new token itself
    place = ring + (now % R) * D + e
    tl.store(keys + place, own_k, mask=inside & is_first)
    tl.store(values + place, own_v, mask=inside & is_first)
    top = tl.where(is_first, tl.sum(q * own_k, 0), -float("inf"))
    total = tl.where(is_first, 1.0, 0.0)
    y = tl.where(is_first, own_v.to(tl.float32), 0.0)
    for t0 in range(start, end, BR):
        next_k, next_v, next_seen = _block(keys + ring, values + ring, t0 + BR, end, R, e, inside, D, BR)
        s = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp(s - safe)
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, 0)
        y = y * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        top = higher
        k, v, seen = next_k, next_v, next_seen
    if C == 1:
        tl.store(o + pair * D + e, y / total, mask=inside)
    else:
        scratch = partial + (pair * C + part) * (D + 2)
        tl.store(scratch + e, y, mask=inside)
        tl.store(scratch + D, top)
        tl.store(scratch + D + 1, total)


@triton.jit
def _combine_kernel(
    partial, o, D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    c, e = tl.arange(0, BC), tl.arange(0, BD)
    release_next(PDL)
    after_previous(PDL)
    place = partial + (pair * C + c) * (D + 2)
    top = tl.load(place + D, mask=c < C, other=-float("inf"))
    total = tl.load(place + D + 1, mask=c < C, other=0.0)
    weight = tl.exp(top - tl.max(top, 0))
    y = tl.load(place[:, None] + e[None, :], mask=(c < C)[:, None] & (e < D)[None, :], other=0.0)
    y = tl.sum(y * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(o + pair * D + e, y, mask=e < D)
