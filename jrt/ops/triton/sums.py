"""The sums that pieces of a sequence add to a state, and from them the state before (or the gradient after) each piece.

`piece_kernel` sums phi(x) u^T over one piece: of keys and values in the forward pass, of queries and gradients of the
outputs in the backward pass. `both_pieces_kernel` does so for the pieces of a prefix and of the text after it, in one
launch. `scan_kernel` replaces each piece's sum by the sum over all pieces before it (backward: after it).

Shapes: P pieces, C tokens of a chunk, d query/key size (DK padded), D value size (DV columns of a program), F features.
"""
# ruff: noqa: RUF005 - Triton's compiler knows no unpacking inside a tuple
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from jrt.ops.triton.features import zero_of
from jrt.ops.triton.places import find_piece, load_rows, own_columns
from jrt.ops.triton.state import add_chunk, fades, start_state, write_state


@triton.jit
def sum_piece(
    x, u, mask, masked, weight, sum_weight, rate, piece_S, piece_z, p, row, start, end, T, H, h,
    x_batch, x_token, x_head, u_batch, u_token, u_head, mask_batch,
    GRADIENT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, PAIR_TILES: tl.constexpr,
    PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of piece p, tokens start to end of a row, which decays by exp(rate) a token; masked: whether the mask is
    read, if HAS_MASK."""
    row = row + h * 0  # in 64 bits, as h is
    x += row * x_batch + h * x_head
    u += row * u_batch + h * u_head
    columns = own_columns(D, DV)
    dims = tl.arange(0, DK)
    step = tl.arange(0, C)
    tiles, sums = start_state(piece_S, piece_z, 0, columns, False, False, d, D, F, DV, PAIR_TILES, PAIR_ROWS, REST_ROWS)
    whole = 1.0
    chunks = tl.cdiv(end - start, C)
    for n in range(0, chunks):
        if GRADIENT:
            first = start + (chunks - 1 - n) * C
        else:
            first = start + n * C
        t = first + step
        zero = zero_of(first, x, d)
        inside = t < end
        keep = inside
        if HAS_MASK:
            keep = inside & (tl.load(mask + row * mask_batch + t, mask=inside & masked, other=1) != 0)
        x_c = load_rows(x, t, x_token, keep, dims, d)  # (C, DK)
        u_c = load_rows(u, t, u_token, keep, columns, D).to(WIDE)  # (C, DV)
        if GRADIENT:
            at = (row * T + t) * H + h
            by_value = tl.load(weight + at, mask=inside, other=0.0)
            by_one = tl.load(sum_weight + at, mask=inside, other=0.0)
        else:
            by_value = keep.to(tl.float32)
            by_one = by_value
        if HAS_DECAY:
            to_query, to_end, whole = fades(rate, tl.minimum(C, end - first), C)
            by_value = by_value * (to_query if GRADIENT else to_end)
        tiles, sums = add_chunk(
            tiles, sums, tl.trans(x_c), u_c, by_value, by_one, whole, zero, GRADIENT, HAS_DECAY or GRADIENT, HAS_DECAY,
            d, DK, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
        )  # fmt: skip
    write_state(
        piece_S, piece_z, tiles, sums, p * H + h, columns, tl.program_id(1) == 0,
        GRADIENT, d, D, F, PAIR_TILES, PAIR_ROWS, REST_ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "PIECES", "PIECE_TOKENS"])
def piece_kernel(
    x, u, mask, weight, sum_weight, log_decay, piece_S, piece_z,
    piece_sequence, piece_start, piece_end, cu_seqlens,
    T, H, PIECES, PIECE_TOKENS, x_batch, x_token, x_head, u_batch, u_token, u_head, mask_batch,
    GRADIENT: tl.constexpr, ALL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Without GRADIENT: x keys, u values. With it: x queries, u gradients of outputs, `weight` and `sum_weight` (B, T,
    H).

    Unless ALL, the piece on which no other piece depends is left out: the last, or with GRADIENT the first.
    """
    p = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    sequence, row, start, end, is_first, is_last = find_piece(
        p, T, PIECES, PIECE_TOKENS, piece_sequence, piece_start, piece_end, cu_seqlens, PACKED
    )
    if sequence < 0:
        return
    if not ALL:  # noqa: SIM102 - one is known when compiling, the other is not
        if is_first if GRADIENT else is_last:
            return
    rate = 0.0
    if HAS_DECAY:
        rate = tl.load(log_decay + h).to(tl.float32)
    sum_piece(
        x, u, mask, HAS_MASK, weight, sum_weight, rate, piece_S, piece_z, p, row, start, end, T, H, h,
        x_batch, x_token, x_head, u_batch, u_token, u_head, mask_batch,
        GRADIENT, HAS_MASK, HAS_DECAY, d, D, F, DK, DV, C, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["T", "PIECES", "PIECE_TOKENS", "TEXT_PIECES", "prefix_T", "PREFIX_PIECES", "PREFIX_PIECE_TOKENS"]
)
def both_pieces_kernel(
    k, v, mask, text_S, text_z, piece_sequence, piece_start, piece_end, cu_seqlens, T, PIECES, PIECE_TOKENS,
    k_batch, k_token, k_head, v_batch, v_token, v_head, mask_batch,
    prefix_k, prefix_v, prefix_mask, prefix_S, prefix_z, prefix_sequence, prefix_start, prefix_end, prefix_cu_seqlens,
    prefix_T, PREFIX_PIECES, PREFIX_PIECE_TOKENS,
    prefix_k_batch, prefix_k_token, prefix_k_head, prefix_v_batch, prefix_v_token, prefix_v_head, prefix_mask_batch,
    log_decay, H, TEXT_PIECES, HAS_MASK: tl.constexpr, HAS_PREFIX_MASK: tl.constexpr, HAS_DECAY: tl.constexpr,
    PACKED: tl.constexpr, d: tl.constexpr, D: tl.constexpr, F: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, PAIR_TILES: tl.constexpr, PAIR_ROWS: tl.constexpr, REST_ROWS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of a text's pieces, but the last of each sequence, and of all pieces of the prefix before it.

    The first TEXT_PIECES pieces are the text's. Each program chooses its addresses and strides, so that nothing is
    copied. A prefix does not fade. If only one part has a mask, that mask's address is passed for both.
    """
    number = tl.program_id(0) // H
    h = (tl.program_id(0) % H).to(tl.int64)
    of_prefix = number >= TEXT_PIECES
    p = number - tl.where(of_prefix, TEXT_PIECES, 0)
    if PACKED:
        piece_sequence = tl.where(of_prefix, prefix_sequence, piece_sequence)
        piece_start = tl.where(of_prefix, prefix_start, piece_start)
        piece_end = tl.where(of_prefix, prefix_end, piece_end)
        cu_seqlens = tl.where(of_prefix, prefix_cu_seqlens, cu_seqlens)
    T = tl.where(of_prefix, prefix_T, T)
    sequence, row, start, end, _, is_last = find_piece(
        p, T, tl.where(of_prefix, PREFIX_PIECES, PIECES), tl.where(of_prefix, PREFIX_PIECE_TOKENS, PIECE_TOKENS),
        piece_sequence, piece_start, piece_end, cu_seqlens, PACKED,
    )  # fmt: skip
    if sequence < 0:
        return
    if is_last & (number < TEXT_PIECES):
        return
    rate = 0.0
    if HAS_DECAY:
        rate = tl.where(of_prefix, 0.0, tl.load(log_decay + h).to(tl.float32))
    masked = True
    if HAS_MASK or HAS_PREFIX_MASK:
        masked = tl.where(of_prefix, HAS_PREFIX_MASK, HAS_MASK)
        mask = tl.where(of_prefix, prefix_mask, mask)
    sum_piece(
        tl.where(of_prefix, prefix_k, k), tl.where(of_prefix, prefix_v, v), mask, masked, None, None, rate,
        tl.where(of_prefix, prefix_S, text_S), tl.where(of_prefix, prefix_z, text_z), p, row, start, end, T, H, h,
        tl.where(of_prefix, prefix_k_batch, k_batch), tl.where(of_prefix, prefix_k_token, k_token),
        tl.where(of_prefix, prefix_k_head, k_head), tl.where(of_prefix, prefix_v_batch, v_batch),
        tl.where(of_prefix, prefix_v_token, v_token), tl.where(of_prefix, prefix_v_head, v_head),
        tl.where(of_prefix, prefix_mask_batch, mask_batch),
        False, HAS_MASK or HAS_PREFIX_MASK, HAS_DECAY, d, D, F, DK, DV, C, PAIR_TILES, PAIR_ROWS, REST_ROWS, WIDE,
        PRECISION,
    )  # fmt: skip


@triton.jit
def scan_part(
    x, start, total, prefix, state, i, inside, rate, begin, count, prefix_begin, prefix_count, T, H, h, PIECE_TOKENS,
    piece_start, piece_end, SIZE: tl.constexpr, HAS_START: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Numbers i of one sequence's states in x (P, H, SIZE). AHEAD pieces are read before any of them is written."""
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_START:
        carry = tl.load(start + state * SIZE + i, mask=inside, other=0.0)
    if HAS_PREFIX:
        for n in range(0, prefix_count, AHEAD):
            for j in tl.static_range(AHEAD):
                at = prefix + ((prefix_begin + n + j) * H + h) * SIZE + i
                carry += tl.load(at, mask=inside & (n + j < prefix_count), other=0.0)
        tl.store(start + state * SIZE + i, carry, mask=inside)
    for n in range(0, count, AHEAD):
        added = ()
        for j in tl.static_range(AHEAD):
            p = begin + (count - 1 - n - j if REVERSE else n + j)
            at = x + (p * H + h) * SIZE + i
            added = added + (tl.load(at, mask=inside & (n + j < count), other=0.0),)
        for j in tl.static_range(AHEAD):
            p = begin + (count - 1 - n - j if REVERSE else n + j)
            known = inside & (n + j < count)
            tl.store(x + (p * H + h) * SIZE + i, carry, mask=known)
            if HAS_DECAY:
                if PACKED:
                    length = tl.load(piece_end + p, mask=n + j < count) - tl.load(piece_start + p, mask=n + j < count)
                else:
                    length = tl.minimum(PIECE_TOKENS, T - (p - begin) * PIECE_TOKENS)
                carry = tl.where(known, carry * tl.exp(rate * length), carry)
            carry = carry + added[j]
    if HAS_TOTAL:
        tl.store(total + state * SIZE + i, carry, mask=inside)


@triton.jit(do_not_specialize=["T", "PIECES", "PIECE_TOKENS", "PREFIX_PIECES"])
def scan_kernel(
    piece_S, piece_z, start_S, start_z, total_S, total_z, prefix_S, prefix_z, log_decay,
    piece_start, piece_end, first_piece, first_prefix_piece,
    T, H, PIECES, PIECE_TOKENS, PREFIX_PIECES, D: tl.constexpr, F: tl.constexpr,
    HAS_START: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_DECAY: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Replaces, in place, each piece's own sum by the state before it; `total` gets the state after all pieces.

    With HAS_PREFIX, the state before the text is the total of the prefix's pieces, which `start` gets. The first
    programs of a sequence and head take S, the last ones z, which does not decay.
    """
    sequence = tl.program_id(1) // H
    h = (tl.program_id(1) % H).to(tl.int64)
    if PACKED:
        begin = tl.load(first_piece + sequence)
        count = tl.load(first_piece + sequence + 1) - begin
    else:
        begin = sequence * PIECES
        count = PIECES
    prefix_begin = sequence * PREFIX_PIECES
    prefix_count = PREFIX_PIECES
    if HAS_PREFIX and PACKED:
        prefix_begin = tl.load(first_prefix_piece + sequence)
        prefix_count = tl.load(first_prefix_piece + sequence + 1) - prefix_begin
    rate = 0.0
    if HAS_DECAY:
        rate = tl.load(log_decay + h).to(tl.float32)
    block = tl.program_id(0)
    matrix: tl.constexpr = (F * D + BLOCK - 1) // BLOCK  # programs of S
    if block < matrix:
        i = block * BLOCK + tl.arange(0, BLOCK)
        scan_part(
            piece_S, start_S, total_S, prefix_S, sequence * H + h, i, i < F * D, rate, begin, count, prefix_begin,
            prefix_count, T, H, h, PIECE_TOKENS, piece_start, piece_end, F * D, HAS_START, HAS_TOTAL, HAS_PREFIX,
            HAS_DECAY, REVERSE, PACKED, BLOCK, AHEAD,
        )  # fmt: skip
    else:
        i = (block - matrix) * BLOCK + tl.arange(0, BLOCK)
        scan_part(
            piece_z, start_z, total_z, prefix_z, sequence * H + h, i, i < F, rate, begin, count, prefix_begin,
            prefix_count, T, H, h, PIECE_TOKENS, piece_start, piece_end, F, HAS_START, HAS_TOTAL, HAS_PREFIX, False,
            REVERSE, PACKED, BLOCK, AHEAD,
        )  # fmt: skip
