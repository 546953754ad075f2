"""Addresses: which piece of a sequence a program has, and where it loads and stores rows of tokens.

A sequence is cut into pieces that run in parallel. For sequences of equal lengths, a piece follows from the program's
number. For packed sequences there are three tables: `piece_sequence` (-1 for a piece that does not exist),
`piece_start`, `piece_end`.

Shapes: C tokens of a chunk, DK and DV columns of a tile, R rows of a tile, F features, D value size.
"""

import triton
import triton.language as tl


@triton.jit
def find_piece(p, T, PIECES, PIECE_TOKENS, piece_sequence, piece_start, piece_end, cu_seqlens, PACKED: tl.constexpr):
    """Of piece p: its sequence and batch row, its first token, the token after its last, and whether it is the first
    and whether it is the last piece of its sequence."""
    if PACKED:
        sequence = tl.load(piece_sequence + p)
        row = 0
        start = tl.load(piece_start + p)
        end = tl.load(piece_end + p)
        known = tl.maximum(sequence, 0)
        first = start == tl.load(cu_seqlens + known).to(tl.int32)
        last = end == tl.load(cu_seqlens + known + 1).to(tl.int32)
    else:
        sequence = p // PIECES
        row = sequence
        n = p % PIECES
        start = n * PIECE_TOKENS
        end = tl.minimum(T, start + PIECE_TOKENS)
        first = n == 0
        last = n == PIECES - 1
    return sequence, row, start, end, first, last


@triton.jit
def own_columns(D: tl.constexpr, DV: tl.constexpr):
    """The columns of v that this program computes (DV,)."""
    columns = tl.arange(0, DV)
    if DV < D:
        columns += tl.program_id(1) * DV
    return columns


@triton.jit
def load_rows(x, t, stride, inside, columns, width: tl.constexpr):
    """(C, columns) of x at tokens t, zero where `inside` is False."""
    at = x + t.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_rows(x, value, t, stride, inside, columns, width: tl.constexpr):
    at = x + t.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])
