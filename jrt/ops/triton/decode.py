"""Linear attention of one token: the state is updated and the query reads it, in one pass over the state.

Shapes: d query/key size, D value size (DV columns of a program), F features, R rows read at a time.
"""

import triton
import triton.language as tl

from jrt.ops.triton.features import products, row_pairs, row_places
from jrt.ops.triton.places import own_columns


@triton.jit
def decode_kernel(
    q, k, v, mask, log_decay, old_S, old_z, o, new_S, new_z, H,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, mask_batch,
    HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_START: tl.constexpr, NORMALIZE: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    columns = own_columns(D, DV)
    state = b * H + h
    keep = True
    if HAS_MASK:
        keep = tl.load(mask + b * mask_batch) != 0
    value = tl.load(v + b * v_batch + h * v_head + columns, mask=(columns < D) & keep, other=0.0).to(tl.float32)
    fade = 1.0
    if HAS_DECAY:
        fade = tl.exp(tl.load(log_decay + h).to(tl.float32))
    total = tl.zeros((DV,), tl.float32)
    denominator = 0.0
    for t in tl.static_range(PAIR_TILES + 1):
        i, j = row_pairs(t, 0, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
        place, weight, real = row_places(t, d, PAIR_TILES, PAIR_ROWS, REST_ROWS)
        inside = real[:, None] & (columns < D)[None, :]
        k_i = tl.load(k + i, mask=i >= 0, other=0.0).to(tl.float32)
        k_j = tl.load(k + j, mask=i >= 0, other=0.0).to(tl.float32)
        r = tl.arange(0, i.shape[0])
        phi_k = products(k_i, k_j, r, t, d, PAIR_TILES, PAIR_ROWS) * weight
        if HAS_MASK:
            phi_k = tl.where(keep, phi_k, 0.0)
        tile = phi_k[:, None] * value[None, :]
        sums = phi_k
        if HAS_START:
            at = old_S + state * F * D + place[:, None] * D + columns[None, :]
            tile += tl.load(at, mask=inside, other=0.0) * fade
            sums += tl.load(old_z + state * F + place, mask=real, other=0.0)
        tl.store(new_S + state * F * D + place[:, None] * D + columns[None, :], tile, mask=inside)
        tl.store(new_z + state * F + place, sums, mask=real & (tl.program_id(1) == 0))
        q_i = tl.load(q + i, mask=i >= 0, other=0.0).to(tl.float32)
        q_j = tl.load(q + j, mask=i >= 0, other=0.0).to(tl.float32)
        phi_q = products(q_i, q_j, r, t, d, PAIR_TILES, PAIR_ROWS) * weight
        total += tl.sum(phi_q[:, None] * tile, 0)
        denominator += tl.sum(phi_q * sums, 0)
    if NORMALIZE:
        total = total / tl.where(denominator == 0.0, 1.0, denominator)
    tl.store(o + state * D + columns, total.to(o.dtype.element_ty), mask=columns < D)
