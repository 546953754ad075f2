"""Outputs of one piece of a sequence, chunk by chunk, from the state before the piece.

Inside a chunk, the scores 1 + s + s^2 / 2 are computed from s = q.k / sqrt(d). Earlier tokens are read through the
state, which stays in registers for the whole piece. The numerator is divided by the denominator once, at the end of a
chunk.

Shapes: C tokens of a chunk, d query/key size (DK padded), D value size (DV columns of a program), R rows of a state
tile.
"""

import triton
import triton.language as tl

from jrt.ops.triton.features import features, weighted, zero_of
from jrt.ops.triton.places import find_piece, load_rows, own_columns, store_rows
from jrt.ops.triton.state import add_chunk, fades, start_state, write_state


@triton.jit(do_not_specialize=["T", "PIECES", "PIECE_TOKENS"])
def forward_kernel(
    q, k, v, mask, log_decay, start_S, start_z, o, final_S, final_z,
    piece_sequence, piece_start, piece_end, cu_seqlens,
    T, H, PIECES, PIECE_TOKENS,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, mask_batch,
    HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_START: tl.constexpr, NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    sequence, row, start, end, _, last = find_piece(
        p, T, PIECES, PIECE_TOKENS, piece_sequence, piece_start, piece_end, cu_seqlens, PACKED
    )
    if sequence < 0:
        return
    row = row + h * 0  # 64 bits
    q += row * q_batch + h * q_head
    k += row * k_batch + h * k_head
    v += row * v_batch + h * v_head
    o += (row * T * H + h) * D
    columns = own_columns(D, DV)
    dims = tl.arange(0, DK)
    step = tl.arange(0, C)
    tiles, sums = start_state(
        start_S, start_z, p * H + h, columns, HAS_START, False, d, D, F, DV, PAIR_TILES, PAIR_ROWS, REST_ROWS,
    )  # fmt: skip
    whole = 1.0
    if HAS_DECAY:
        rate = tl.load(log_decay + h).to(tl.float32)
        age = tl.maximum(step[:, None] - step[None, :], 0)
    for first in range(start, end, C):
        t = first + step
        zero = zero_of(first, k, d)
        inside = t < end
        keep = inside
        if HAS_MASK:
            keep = inside & (tl.load(mask + row * mask_batch + t, mask=inside, other=0) != 0)
        q_c = load_rows(q, t, q_token, inside, dims, d)  # (C, DK)
        k_c = load_rows(k, t, k_token, keep, dims, d)
        v_c = load_rows(v, t, v_token, keep, columns, D).to(WIDE)  # (C, DV)
        kT = tl.trans(k_c)

        s = tl.dot(q_c, kT, input_precision=PRECISION) * (1.0 / d**0.5)  # (C, C)
        scores = 1.0 + s + 0.5 * s * s
        scores = tl.where((step[:, None] >= step[None, :]) & keep[None, :], scores, 0.0)
        denominator = tl.sum(scores, 1)
        if HAS_DECAY:
            to_query, to_end, whole = fades(rate, tl.minimum(C, end - first), C)
            scores = scores * tl.exp(rate * age)
        within = tl.dot(scores.to(WIDE), v_c, input_precision=PRECISION)  # (C, DV)

        before = tl.zeros((C, DV), tl.float32)
        if not HAS_DECAY:
            before = within
        for n in tl.static_range(PAIR_TILES + 1):
            phi = features(q_c, n, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, PRECISION)  # (C, R)
            phi = weighted(phi, tl.arange(0, phi.shape[1])[None, :], n, d, PAIR_TILES, PAIR_ROWS)
            denominator += tl.sum(phi * sums[n][None, :], 1)
            before = tl.dot(phi.to(WIDE), tiles[n].to(WIDE), before, input_precision=PRECISION)
        if HAS_DECAY:
            before = within + before * to_query[:, None]
            v_c = (v_c * to_end[:, None]).to(WIDE)
        if NORMALIZE:
            before = before / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
        store_rows(o, before, t, H * D, inside, columns, D)
        tiles, sums = add_chunk(
            tiles, sums, kT, v_c, keep, keep.to(tl.float32), whole, zero, False, False, HAS_DECAY, d, DK,
            PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
        )  # fmt: skip
    if last:
        write_state(
            final_S, final_z, tiles, sums, sequence * H + h, columns, tl.program_id(1) == 0,
            False, d, D, F, PAIR_TILES, PAIR_ROWS, REST_ROWS,
        )  # fmt: skip
