"""Linear attention of one token, for all heads; the state is updated in place.

S = gamma S + phi(k) v^T, z = z + phi(k), o = gain (phi(q) S) / (phi(q) z). Features are computed in registers. A
program has one head and a block of value columns. It also has its own copy of z, so that no program reads what another
one writes.

Shapes: B batch, H heads, d query/key size, D value size, F features, C blocks of BD value columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import after_previous, early, release_next

MANY = 1024  # so many programs saturate the memory, even if each loads only a small block of features at a time


def column_blocks(rows: int, heads: int, value_dim: int) -> int:
    """C, the number of blocks; larger if there are few heads, so that the GPU has enough programs."""
    return triton.cdiv(value_dim, 16 if rows * heads < 128 else 64)


def linear_attention_step(
    qkv: Tensor, S: Tensor, z: Tensor, table: tuple[Tensor, Tensor, Tensor], d: int, gain: float,
    decay: Tensor | None, o: Tensor,
) -> None:  # fmt: skip
    """Writes o (B, H D) for the token with the queries, keys and values in `qkv`, and updates S and z.

    Args:
        qkv: (B, 2 H d + H D [+ H]): queries, keys, values and, with a decay projection, the output gains of the heads.
        S: (B, H, F, D) fp32; z: (B, H, C, F) fp32, C equal copies. Both are updated in place.
        table: row, column and weight (F,) of each feature, phi(x)[f] = weight x[row] x[column] with x[d] = 1; weight
            fp32.
        d: query and key size.
        gain: factor of queries and keys before the feature map.
        decay: (H,) gamma of S; None: 1.
        o: (B, H D).
    """
    batch, heads, features, value_dim = S.shape
    copies = z.shape[2]
    BD = triton.next_power_of_2(-(-value_dim // copies))
    few = batch * heads * copies < MANY  # a program then loads its whole state at once
    BF, warps = (triton.next_power_of_2(features), 8) if few else (32, 1)
    has_gains = qkv.shape[1] > heads * (2 * d + value_dim)
    _linear_attention_kernel[(batch * heads, copies)](
        qkv, S, z, *table, S if decay is None else decay, o, heads, features, value_dim, qkv.shape[1], gain,
        d=d, C=copies, DECAY=decay is not None, GAINS=has_gains, BF=BF, BD=BD,
        num_warps=warps, **early(S.device),
    )  # fmt: skip


@triton.jit
def _linear_attention_kernel(
    qkv, S, z, table_i, table_j, table_w, decay, o, H, F, D, width, gain,
    d: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, GAINS: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pair // H, pair % H
    e = block * BD + tl.arange(0, BD)
    column = e < D
    tile = S + pair * F * D + e[None, :]
    sums = z + (pair * C + block) * F
    f = tl.arange(0, BF)
    s = tl.load(tile + f[:, None] * D, mask=(f < F)[:, None] & column[None, :], other=0.0)  # (BF, BD)
    old_z = tl.load(sums + f, mask=f < F, other=0.0)
    release_next(PDL)
    after_previous(PDL)
    q, k = qkv + b * width + h * d, qkv + b * width + (H + h) * d
    dtype: tl.constexpr = qkv.dtype.element_ty
    values = qkv + b * width + 2 * H * d
    v = tl.load(values + h * D + e, mask=column, other=0.0).to(tl.float32)
    gamma = 1.0
    if DECAY:
        gamma = tl.load(decay + h)
    y = tl.zeros((BD,), tl.float32)
    total = 0.0
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        later = f + BF
        next_s = tl.load(tile + later[:, None] * D, mask=(later < F)[:, None] & column[None, :], other=0.0)
        next_z = tl.load(sums + later, mask=later < F, other=0.0)
        i = tl.load(table_i + f, mask=f < F, other=d)
        j = tl.load(table_j + f, mask=f < F, other=d)
        w = tl.load(table_w + f, mask=f < F, other=0.0)
        phi_q = w * _factor(q, i, gain, d, dtype) * _factor(q, j, gain, d, dtype)
        phi_k = w * _factor(k, i, gain, d, dtype) * _factor(k, j, gain, d, dtype)
        s = s * gamma + phi_k[:, None] * v[None, :]
        new_z = old_z + phi_k
        tl.store(tile + f[:, None] * D, s, mask=(f < F)[:, None] & column[None, :])
        tl.store(sums + f, new_z, mask=f < F)
        y += tl.sum(phi_q[:, None] * s, 0)
        total += tl.sum(phi_q * new_z, 0)
        s, old_z = next_s, next_z
    y = (y / total).to(dtype)
    if GAINS:
        y = (y.to(tl.float32) * tl.load(values + H * D + h).to(tl.float32)).to(dtype)
    tl.store(o + (b * H + h) * D + e, y, mask=column)


@triton.jit
def _factor(x, index, gain, d: tl.constexpr, DTYPE: tl.constexpr):
    """x[index] * gain, rounded to DTYPE as in the mixer; 1 where the index is d."""
    value = tl.load(x + index, mask=index < d, other=0.0).to(tl.float32) * gain
    return tl.where(index < d, value.to(DTYPE).to(tl.float32), 1.0)
