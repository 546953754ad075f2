"""Sizes of the kernels' tiles, and how sequences are cut into pieces that run in parallel.

There is no autotuning: the sizes follow from d, D and the dtype by a table that was measured once.

Shapes: B batch, N sequences (B, or those packed into one row), T tokens, H heads, P pieces of all sequences together,
d query/key size, D value size, F features.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.feature_map import feature_count

PRODUCTS_FP32 = "tf32x3"  # an fp32 product as three TF32 products: 22 bits of each factor
# The next two are ratios of times measured on an H100, for `piece_count`.
TOGETHER = 1.35  # time of two programs on one multiprocessor over that of one alone
SUMMING = {"forward": 0.6, "backward": 0.26}  # time of summing the pieces over that of the pass after it
LEAST_CHUNKS = 4  # chunks of a piece: for a shorter one, its state costs more time than running in parallel saves
MOST_TILES = 5  # most tiles of a state, see `state_tiles`


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles."""

    C: int  # tokens of a chunk
    DV: int  # value columns of a program
    rows: int  # most rows of a tile of the state
    warps: int
    stages: int


class Pieces(NamedTuple):
    """How the sequences are cut into pieces. The four tensors are for packed sequences only."""

    number: int  # P
    a_sequence: int  # pieces of each sequence; 0 for packed sequences, which have different numbers
    tokens: int  # tokens of a piece; the last one of a sequence may be shorter
    sequence: Tensor | None  # (P,) int32, -1 where there is no such piece
    start: Tensor | None  # (P,) int32
    end: Tensor | None  # (P,) int32
    first: Tensor | None  # (N + 1,) int32, a sequence's first piece


def choose_tiles(kernel: str, d: int, D: int, dtype: torch.dtype) -> Tiles:
    """Sizes for "forward", "sums", "queries", "keys" or "prefix keys", measured on an H100.

    With these sizes the kernels fit into the 99 KB of shared memory of smaller GPUs (sm_86, sm_89). C is the same for
    the kernels that work on the same pieces, so that a piece is a whole number of chunks for each of them.
    """
    columns = max(16, triton.next_power_of_2(D))
    narrow = kernel in ("queries", "keys", "prefix keys")  # the gradients need more registers beside the state
    if d > 16:
        C = 32 if dtype == torch.bfloat16 else 16
        return Tiles(C=C, DV=min(columns, 32), rows=128, warps=8, stages=1)
    if dtype != torch.bfloat16:  # operands of four bytes
        if kernel == "prefix keys":
            return Tiles(C=64, DV=min(columns, 64), rows=32, warps=4, stages=1)
        return Tiles(C=16, DV=min(columns, 64), rows=128, warps=8, stages=1)
    stages = 1 if kernel in ("keys", "prefix keys") else 2
    return Tiles(C=64, DV=min(columns, 64), rows=32 if narrow else 64, warps=4, stages=stages)


def piece_count(programs: int, chunks: int, device: torch.device, direction: str) -> int:
    """The number of pieces into which each sequence is cut: the fastest by a simple model of the pass.

    In the model, up to two programs share a multiprocessor, and the states of pieces have to be summed before the pass.

    Args:
        programs: programs of all sequences if none is cut.
        chunks: chunks of a sequence.
        direction: "forward" or "backward".
    """
    multiprocessors = _multiprocessors(device)

    def cost(pieces: int) -> float:
        waves = triton.cdiv(programs * pieces, 2 * multiprocessors)
        step = TOGETHER if programs * pieces > multiprocessors else 1.0
        return waves * step * triton.cdiv(chunks, pieces) * (1.0 if pieces == 1 else 1.0 + SUMMING[direction])

    most = min(chunks // LEAST_CHUNKS, 2 * multiprocessors // programs)
    return min(range(1, max(1, most) + 1), key=cost)


def even_pieces(sequences: int, T: int, tokens: int) -> Pieces:
    """Sequences of T tokens each in pieces of `tokens`, of which the last may be shorter."""
    count = triton.cdiv(T, tokens)
    return Pieces(sequences * count, count, tokens, None, None, None, None)


def cut(k: Tensor, cu_seqlens: Tensor | None, tiles: Tiles, direction: str) -> Pieces:
    """Cuts the sequences of k (B, T, H, d) for a "forward" or "backward" pass."""
    B, T, H, _ = k.shape
    chunks = triton.cdiv(T, tiles.C)
    count = piece_count(B * H, chunks, k.device, direction)
    tokens = triton.cdiv(chunks, count) * tiles.C
    if cu_seqlens is None:
        return even_pieces(B, T, tokens)
    sequences = cu_seqlens.numel() - 1
    counts = (cu_seqlens.diff() + tokens - 1).div(tokens, rounding_mode="floor").clamp(min=1)  # (N,)
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)  # (N + 1,)
    piece = torch.arange(T // tokens + sequences, device=k.device, dtype=torch.int32)
    owner = torch.searchsorted(first[1:].contiguous(), piece, right=True).clamp(max=sequences - 1)
    start = cu_seqlens[owner] + (piece - first[owner]) * tokens
    end = torch.minimum(start + tokens, cu_seqlens[owner + 1])
    owner = torch.where(piece < first[-1], owner, -1)
    owner, start, end = (x.to(torch.int32) for x in (owner, start, end))
    return Pieces(piece.numel(), 0, tokens, owner, start, end, first)


def state_tiles(d: int, rows: int) -> dict[str, int]:
    """How the F rows of a state lie in tiles of at most `rows` rows, as constants of the kernels with matrix products.

    The loop over these tiles is unrolled. With nine or more of them the kernels need more uniform registers than there
    are, and the ptxas 12.8 of Triton 3.6 and 3.7 then hands the tensor cores of Hopper addresses that are wrong.
    """
    tiles = row_tiles(d, rows)
    count = tiles["PAIR_TILES"] + 1
    assert count <= MOST_TILES, (
        f"d = {d} makes {count} tiles of {rows} rows: expected at most {MOST_TILES}, so more rows"
    )
    return tiles


def constants(
    k: Tensor, v: Tensor, mask: Tensor | None, log_decay: Tensor | None, cu_seqlens: Tensor | None, tiles: Tiles
) -> dict[str, object]:
    """Arguments that a kernel with matrix products is compiled for."""
    d, D = k.shape[-1], v.shape[-1]
    return {
        "HAS_MASK": mask is not None,
        "HAS_DECAY": log_decay is not None,
        "PACKED": cu_seqlens is not None,
        "d": d,
        "D": D,
        "F": feature_count(d),
        "DK": max(16, triton.next_power_of_2(d)),
        "DV": tiles.DV,
        "C": tiles.C,
        **state_tiles(d, tiles.rows),
        "WIDE": tl.bfloat16 if k.dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "ieee" if k.dtype == torch.bfloat16 else PRODUCTS_FP32,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def row_tiles(d: int, largest: int) -> dict[str, int]:
    """How the rows of a state lie in tiles of at most `largest` rows."""
    pairs = max(16, triton.next_power_of_2(d * (d - 1) // 2 + 1))
    rows = min(pairs, largest)
    return {"PAIR_TILES": pairs // rows, "PAIR_ROWS": rows, "REST_ROWS": max(16, triton.next_power_of_2(2 * d))}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
