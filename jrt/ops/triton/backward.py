"""Gradients of linear attention for one piece of a sequence: dq forward in time, dk and dv backward in time.

With den the denominator of a token, w = 1 / den and c = -(do . o) / den, the gradient of the numerator is w do and that
of the denominator is c. Both kernels go over a piece chunk by chunk, as the forward kernel does. `queries_kernel` keeps
the state S, z in registers and computes den again. `keys_kernel` keeps the gradient of the state: R, the sum of phi(q)
(w do)^T over later queries, and r, the sum of c phi(q). `both_keys_kernel` does this for a text and for the prefix
before it in one launch, from the gradients of the states after all pieces.

    P = 1 + s + s^2 / 2,  dP = w (do v^T) + c,  ds = dP (1 + s) / sqrt(d)         inside a chunk
    dphi(q) = w do S^T + c z,  dphi(k) = v R^T + r,  dv = P^T w do + phi(k) R     between chunks

Shapes: C tokens of a chunk, d query/key size (DK padded), D value size (DV columns of a program), R rows of a tile.
"""

import triton
import triton.language as tl

from jrt.ops.triton.features import factors, features_gradient, products, weighted, zero_of
from jrt.ops.triton.places import find_piece, load_rows, own_columns, store_rows
from jrt.ops.triton.state import add_chunk, fades, start_state, write_state


@triton.jit(do_not_specialize=["T", "PIECES", "PIECE_TOKENS"])
def queries_kernel(
    q, k, v, mask, log_decay, o, do, start_S, start_z, dq, weight, sum_weight,
    piece_sequence, piece_start, piece_end, cu_seqlens,
    T, H, PIECES, PIECE_TOKENS,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    do_batch, do_token, do_head, mask_batch, dq_tile,
    HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_START: tl.constexpr, NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (column tiles, B, T, H, d), and w and c (B, T, H) for `keys_kernel`."""
    p = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    sequence, row, start, end, _, _ = find_piece(
        p, T, PIECES, PIECE_TOKENS, piece_sequence, piece_start, piece_end, cu_seqlens, PACKED
    )
    if sequence < 0:
        return
    row = row + h * 0  # in 64 bits, as h is
    q += row * q_batch + h * q_head
    k += row * k_batch + h * k_head
    v += row * v_batch + h * v_head
    o += (row * T * H + h) * D
    do += row * do_batch + h * do_head
    dq += tl.program_id(1).to(tl.int64) * dq_tile + (row * T * H + h) * d
    once = tl.where(tl.program_id(1) == 0, 1.0, 0.0)  # the terms with c are added by one tile of columns only
    columns = own_columns(D, DV)
    dims = tl.arange(0, DK)
    step = tl.arange(0, C)
    tiles, sums = start_state(
        start_S, start_z, p * H + h, columns, HAS_START, False, d, D, F, DV, PAIR_TILES, PAIR_ROWS, REST_ROWS,
    )  # fmt: skip
    whole = 1.0
    if HAS_DECAY:
        rate = tl.load(log_decay + h).to(tl.float32)
        faded = tl.exp(rate * tl.maximum(step[:, None] - step[None, :], 0))  # (C, C)
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
        do_c = load_rows(do, t, do_token, inside, columns, D)
        kT = tl.trans(k_c)
        if HAS_DECAY:
            to_query, to_end, whole = fades(rate, tl.minimum(C, end - first), C)

        # do . o over all columns, w and c without the division by the denominator
        delta = tl.zeros((C,), tl.float32)
        if NORMALIZE:
            if DV >= D:
                o_c = load_rows(o, t, H * D, inside, columns, D)
                delta = tl.sum(do_c.to(tl.float32) * o_c.to(tl.float32), 1)
            else:
                for other in range(0, D, DV):
                    some = other + tl.arange(0, DV)
                    o_c = load_rows(o, t, H * D, inside, some, D).to(tl.float32)
                    delta += tl.sum(o_c * load_rows(do, t, do_token, inside, some, D).to(tl.float32), 1)
        do_c = do_c.to(WIDE)
        own_delta = delta * once

        s = tl.dot(q_c, kT, input_precision=PRECISION) * (1.0 / d**0.5)  # (C, C)
        causal = (step[:, None] >= step[None, :]) & keep[None, :]
        denominator = tl.sum(tl.where(causal, 1.0 + s + 0.5 * s * s, 0.0), 1)
        dP = tl.dot(do_c, tl.trans(v_c), input_precision=PRECISION)
        if HAS_DECAY:
            dP = dP * faded
        ds = tl.where(causal, (dP - own_delta[:, None]) * (1.0 + s), 0.0) * (1.0 / d**0.5)
        dq_c = tl.dot(ds.to(WIDE), k_c.to(WIDE), input_precision=PRECISION)  # (C, DK)

        for n in tl.static_range(PAIR_TILES + 1):
            a, b = factors(q_c, n, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, PRECISION)  # (C, R)
            r = tl.arange(0, a.shape[1])[None, :]
            phi = weighted(products(a, b, r, n, d, PAIR_TILES, PAIR_ROWS), r, n, d, PAIR_TILES, PAIR_ROWS)
            denominator += tl.sum(phi * sums[n][None, :], 1)
            dphi = tl.dot(do_c, tl.trans(tiles[n].to(WIDE)), input_precision=PRECISION)
            if HAS_DECAY:
                dphi = dphi * to_query[:, None]
            dphi = weighted(dphi - own_delta[:, None] * sums[n][None, :], r, n, d, PAIR_TILES, PAIR_ROWS)
            dq_c = features_gradient(
                dphi, a, b, dq_c, n, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION
            )
        w = tl.zeros((C,), tl.float32) + 1.0
        if NORMALIZE:
            w = 1.0 / tl.where(denominator == 0.0, 1.0, denominator)
        store_rows(dq, dq_c * w[:, None], t, H * d, inside, dims, d)
        at = (row * T + t) * H + h
        tl.store(weight + at, w, mask=inside & (tl.program_id(1) == 0))
        tl.store(sum_weight + at, -delta * w, mask=inside & (tl.program_id(1) == 0))
        if HAS_DECAY:
            v_c = (v_c * to_end[:, None]).to(WIDE)
        again = zero_of(first + C, k, d)  # else the matrices of `picker` would stay in shared memory from above to here
        tiles, sums = add_chunk(
            tiles, sums, kT, v_c, keep, keep.to(tl.float32), whole, again, False, False, HAS_DECAY, d, DK,
            PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit
def piece_gradients(
    q, k, v, mask, log_decay, do, weight, sum_weight, end_S, end_z, which, dk, dv, row, start, end, T, H, h,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    do_batch, do_token, do_head, mask_batch, dk_tile,
    HAS_QUERIES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, PAIR_TILES: tl.constexpr,
    PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one piece, tokens start to end of a row; returns the gradient of the state before it.

    which: the number of the gradient of the state after the piece, in end_S and end_z. Without queries (for a prefix)
    all tokens use it as it is.
    """
    row = row + h * 0  # in 64 bits, as h is
    if HAS_QUERIES:
        q += row * q_batch + h * q_head
        do += row * do_batch + h * do_head
    k += row * k_batch + h * k_head
    v += row * v_batch + h * v_head
    dk += tl.program_id(1).to(tl.int64) * dk_tile + (row * T * H + h) * d
    dv += (row * T * H + h) * D
    once = tl.where(tl.program_id(1) == 0, 1.0, 0.0)  # the terms with c and r are added by one tile of columns only
    columns = own_columns(D, DV)
    dims = tl.arange(0, DK)
    step = tl.arange(0, C)
    tiles, sums = start_state(
        end_S, end_z, which * H + h, columns, True, True, d, D, F, DV, PAIR_TILES, PAIR_ROWS, REST_ROWS
    )
    whole = 1.0
    if HAS_DECAY:
        rate = tl.load(log_decay + h).to(tl.float32)
        faded = tl.exp(rate * tl.maximum(step[None, :] - step[:, None], 0))  # (C keys, C queries)
    chunks = tl.cdiv(end - start, C)
    for n in range(0, chunks):
        first = start + (chunks - 1 - n) * C
        t = first + step
        zero = zero_of(first, k, d)
        inside = t < end
        keep = inside
        if HAS_MASK:
            keep = inside & (tl.load(mask + row * mask_batch + t, mask=inside, other=0) != 0)
        k_c = load_rows(k, t, k_token, keep, dims, d)  # (C, DK)
        v_c = load_rows(v, t, v_token, keep, columns, D).to(WIDE)  # (C, DV)
        if HAS_DECAY:
            to_query, to_end, whole = fades(rate, tl.minimum(C, end - first), C)

        # gradients through queries of the same chunk
        dk_c = tl.zeros((C, DK), tl.float32)
        dv_c = tl.zeros((C, DV), tl.float32)
        if HAS_QUERIES:
            q_c = load_rows(q, t, q_token, inside, dims, d)
            do_c = load_rows(do, t, do_token, inside, columns, D).to(WIDE)
            qT = tl.trans(q_c)
            at = (row * T + t) * H + h
            w = tl.load(weight + at, mask=inside, other=0.0)
            c = tl.load(sum_weight + at, mask=inside, other=0.0)
            s = tl.dot(k_c, qT, input_precision=PRECISION) * (1.0 / d**0.5)  # (C keys, C queries)
            causal = step[:, None] <= step[None, :]
            scores = tl.where(causal, (1.0 + s + 0.5 * s * s) * w[None, :], 0.0)
            if HAS_DECAY:
                scores = scores * faded
            dv_c = tl.dot(scores.to(WIDE), do_c, dv_c, input_precision=PRECISION)
            dP = tl.dot(v_c, tl.trans(do_c), input_precision=PRECISION) * w[None, :]
            if HAS_DECAY:
                dP = dP * faded
            ds = tl.where(causal, (dP + c[None, :] * once) * (1.0 + s), 0.0) * (1.0 / d**0.5)
            dk_c = tl.dot(ds.to(WIDE), q_c.to(WIDE), dk_c, input_precision=PRECISION)

        # gradients through later queries, or, for a prefix, through all
        for i in tl.static_range(PAIR_TILES + 1):
            a, b = factors(k_c, i, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, PRECISION)  # (C, R)
            r = tl.arange(0, a.shape[1])[None, :]
            phi = products(a, b, r, i, d, PAIR_TILES, PAIR_ROWS)
            narrow = tiles[i].to(WIDE)
            if not HAS_QUERIES and WIDE == tl.float32:  # noqa: SIM300 - WIDE is a constant of the kernel
                narrow += (first >> 31).to(tl.float32)  # zero; a tile that never changes would be kept in shared memory
            if HAS_DECAY:
                phi = phi * to_end[:, None]
            dv_c = tl.dot(phi.to(WIDE), narrow, dv_c, input_precision=PRECISION)
            dphi = tl.dot(v_c, tl.trans(narrow), input_precision=PRECISION)
            if HAS_DECAY:
                dphi = dphi * to_end[:, None]
            dphi = dphi + sums[i][None, :] * once
            dk_c = features_gradient(
                dphi, a, b, dk_c, i, zero, d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION
            )

        if HAS_QUERIES:
            by_value = w
            if HAS_DECAY:
                by_value = w * to_query
            again = zero_of(first + C, k, d)  # as in `queries_kernel`
            tiles, sums = add_chunk(
                tiles, sums, qT, do_c, by_value, c, whole, again, True, True, HAS_DECAY, d, DK,
                PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
            )  # fmt: skip
        store_rows(dk, tl.where(keep[:, None], dk_c, 0.0), t, H * d, inside, dims, d)
        store_rows(dv, tl.where(keep[:, None], dv_c, 0.0), t, H * D, inside, columns, D)
    return tiles, sums


@triton.jit(do_not_specialize=["T", "PIECES", "PIECE_TOKENS"])
def keys_kernel(
    q, k, v, mask, log_decay, do, weight, sum_weight, end_S, end_z, dk, dv, initial_S, initial_z,
    piece_sequence, piece_start, piece_end, cu_seqlens,
    T, H, PIECES, PIECE_TOKENS,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    do_batch, do_token, do_head, mask_batch, dk_tile,
    HAS_QUERIES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, PACKED: tl.constexpr,
    BY_PIECE: tl.constexpr, d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (column tiles, B, T, H, d), dv (B, T, H, D), and the gradient of the initial state.

    Without queries (for a prefix) all tokens use the gradient of the final state, of which there is one for each
    sequence.
    """
    p = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    sequence, row, start, end, is_first, _ = find_piece(
        p, T, PIECES, PIECE_TOKENS, piece_sequence, piece_start, piece_end, cu_seqlens, PACKED
    )
    if sequence < 0:
        return
    tiles, sums = piece_gradients(
        q, k, v, mask, log_decay, do, weight, sum_weight, end_S, end_z, p if BY_PIECE else sequence, dk, dv,
        row, start, end, T, H, h, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
        do_batch, do_token, do_head, mask_batch, dk_tile,
        HAS_QUERIES, HAS_MASK, HAS_DECAY, d, D, F, DK, DV, C, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
    )  # fmt: skip
    if HAS_QUERIES:  # noqa: SIM102 - without queries there is no initial state to compile a store to
        if is_first:
            write_state(
                initial_S, initial_z, tiles, sums, sequence * H + h, own_columns(D, DV), tl.program_id(1) == 0,
                True, d, D, F, PAIR_TILES, PAIR_ROWS, REST_ROWS,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["T", "PIECES", "PIECE_TOKENS", "TEXT_PIECES", "prefix_T", "PREFIX_PIECES", "PREFIX_PIECE_TOKENS"]
)
def both_keys_kernel(
    q, k, v, mask, log_decay, do, weight, sum_weight, end_S, end_z, dk, dv,
    piece_sequence, piece_start, piece_end, cu_seqlens, T, PIECES, PIECE_TOKENS,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    mask_batch, dk_tile,
    prefix_k, prefix_v, prefix_mask, prefix_end_S, prefix_end_z, prefix_dk, prefix_dv,
    prefix_sequence, prefix_start, prefix_end, prefix_cu_seqlens, prefix_T, PREFIX_PIECES, PREFIX_PIECE_TOKENS,
    prefix_k_batch, prefix_k_token, prefix_k_head, prefix_v_batch, prefix_v_token, prefix_v_head, prefix_mask_batch,
    prefix_dk_tile, H, TEXT_PIECES,
    HAS_MASK: tl.constexpr, HAS_PREFIX_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, PACKED: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`keys_kernel` for a text and for the prefix before it. The first TEXT_PIECES pieces are the text's.

    end_S and end_z: the gradient of the state after each piece of the text; prefix_end_S and prefix_end_z: that of the
    state between prefix and text.
    """
    number = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    if number < TEXT_PIECES:
        sequence, row, start, end, _, _ = find_piece(
            number, T, PIECES, PIECE_TOKENS, piece_sequence, piece_start, piece_end, cu_seqlens, PACKED
        )
        if sequence >= 0:
            piece_gradients(
                q, k, v, mask, log_decay, do, weight, sum_weight, end_S, end_z, number, dk, dv,
                row, start, end, T, H, h, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
                do_batch, do_token, do_head, mask_batch, dk_tile,
                True, HAS_MASK, HAS_DECAY, d, D, F, DK, DV, C, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
            )  # fmt: skip
    else:
        sequence, row, start, end, _, _ = find_piece(
            number - TEXT_PIECES, prefix_T, PREFIX_PIECES, PREFIX_PIECE_TOKENS, prefix_sequence, prefix_start,
            prefix_end, prefix_cu_seqlens, PACKED,
        )  # fmt: skip
        if sequence >= 0:
            piece_gradients(
                None, prefix_k, prefix_v, prefix_mask, None, None, None, None, prefix_end_S, prefix_end_z, sequence,
                prefix_dk, prefix_dv, row, start, end, prefix_T, H, h, 0, 0, 0, prefix_k_batch, prefix_k_token,
                prefix_k_head, prefix_v_batch, prefix_v_token, prefix_v_head, 0, 0, 0, prefix_mask_batch,
                prefix_dk_tile, False, HAS_PREFIX_MASK, False, d, D, F, DK, DV, C, PAIR_TILES, PAIR_ROWS, REST_ROWS,
                WIDE, PRECISION,
            )  # fmt: skip
