"""One token of linear attention, for all heads, the state updated in place.

S = gamma S + phi(k) v^T, z = z + phi(k), o = gain (phi(q) S) / (phi(q) z); the features are built on chip. A program
takes one head and a block of value columns, and keeps a copy of z of its own, so that none reads what another writes.

Shapes: B batch, H heads, d query/key size, D value size, F features, C blocks of BD value columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import after_previous, early, release_next


def column_blocks(rows: int, heads: int, value_dim: int) -> int:
    """C: more blocks where there are few heads to share the work."""
    return triton.cdiv(value_dim, 16 if rows * heads < 128 else 64)


def linear_attention_step(
    qkv: Tensor, S: Tensor, z: Tensor, table: tuple[Tensor, Tensor, Tensor], d: int, gain: float, decay: Tensor | None, o: Tensor
) -> None:  # fmt: skip
    """Writes o (B, H D) for the token whose queries, keys and values stand in `qkv`, and moves S and z on.

    Args:
        qkv: (B, 2 H d + H D [+ H]): queries, keys, values and, where there is a decay projection, gains of the heads.
        S: (B, H, F, D) fp32; z: (B, H, C, F) fp32, C equal copies. Both are updated in place.
        table: row, column and weight (F,) of each feature, phi(x)[f] = weight x[row] x[column] with x[d] = 1; weight fp32.
        d: query and key size.
        gain: factor of queries and keys before the feature map.
        decay: (H,) gamma of S; None: 1.
        o: (B, H D).
    """
    batch, heads, features, value_dim = S.shape
    copies = z.shape[2]
    BD = triton.next_power_of_2(-(-value_dim // copies))
    has_gains = qkv.shape[1] > heads * (2 * d + value_dim)
    _linear_attention_kernel[(batch * heads, copies)](
        qkv, S, z, *table, S if decay is None else decay, o, heads, features, value_dim, qkv.shape[1], gain,
        d=d, C=copies, DECAY=decay is not None, GAINS=has_gains, BF=triton.next_power_of_2(features), BD=BD,
        num_warps=8, **early(S.device),
    )  # fmt: skip


@triton.jit
def _linear_attention_kernel(
    qkv, S, z, table_i, table_j, table_w, decay, o, H, F, D, width, gain,
    d: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, GAINS: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pair // H, pair % H
    f, e = tl.arange(0, BF), block * BD + tl.arange(0, BD)
    feature, column = f < F, e < D
    i = tl.load(table_i + f, mask=feature, other=d)
    j = tl.load(table_j + f, mask=feature, other=d)
    w = tl.load(table_w + f, mask=feature, other=0.0)
    tile = S + pair * F * D + f[:, None] * D + e[None, :]
    inside = feature[:, None] & column[None, :]
    release_next(PDL)
    after_previous(PDL)
    s = tl.load(tile, mask=inside, other=0.0)  # (BF, BD)
    sums = z + (pair * C + block) * F + f
    old_z = tl.load(sums, mask=feature, other=0.0)
    q, k = qkv + b * width + h * d, qkv + b * width + (H + h) * d
    dtype: tl.constexpr = qkv.dtype.element_ty
    phi_q = w * _factor(q, i, gain, d, dtype) * _factor(q, j, gain, d, dtype)
    phi_k = w * _factor(k, i, gain, d, dtype) * _factor(k, j, gain, d, dtype)
    values = qkv + b * width + 2 * H * d
    v = tl.load(values + h * D + e, mask=column, other=0.0).to(tl.float32)
    if DECAY:
        s *= tl.load(decay + h)
    s += phi_k[:, None] * v[None, :]
    new_z = old_z + phi_k
    tl.store(tile, s, mask=inside)
    tl.store(sums, new_z, mask=feature)
    y = tl.sum(phi_q[:, None] * s, 0) / tl.sum(phi_q * new_z, 0)
    y = y.to(dtype)
    if GAINS:
        y = (y.to(tl.float32) * tl.load(values + H * D + h).to(tl.float32)).to(dtype)
    tl.store(o + (b * H + h) * D + e, y, mask=column)


@triton.jit
def _factor(x, index, gain, d: tl.constexpr, DTYPE: tl.constexpr):
    """x[index], times the gain rounded as the mixer rounds it; 1 where the index is d."""
    value = tl.load(x + index, mask=index < d, other=0.0).to(tl.float32) * gain
    return tl.where(index < d, value.to(DTYPE).to(tl.float32), 1.0)
