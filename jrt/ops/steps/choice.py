"""The most likely token of each row.

Shapes: B batch rows, V vocabulary rows, C blocks of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import after_previous, early, release_next

BLOCK = 4096  # logits of a program


def blocks(vocabulary: int) -> int:
    """C, the number of blocks."""
    return triton.cdiv(vocabulary, BLOCK)


def likeliest(logits: Tensor, largest: Tensor, places: Tensor, tokens: Tensor) -> None:
    """Writes to `tokens` the index of each row's largest logit; of equal ones the first. NaN counts as infinity.

    Args:
        logits: (B, V).
        largest, places: (B, C) fp32 and int32 scratch.
        tokens: (B,) int64.
    """
    batch, vocabulary = logits.shape
    count = largest.shape[1]
    options = early(logits.device)
    _block_kernel[(count, batch)](logits, largest, places, vocabulary, BV=BLOCK, num_warps=8, **options)
    _row_kernel[(batch,)](largest, places, tokens, count, BC=triton.next_power_of_2(count), num_warps=1, **options)


@triton.jit
def _block_kernel(logits, largest, places, V, BV: tl.constexpr, PDL: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = block * BV + tl.arange(0, BV)
    release_next(PDL)
    after_previous(PDL)
    value = tl.load(logits + row * V + n, mask=n < V, other=-float("inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))  # noqa: PLR0124 - NaN is unequal to itself
    top = tl.max(value, 0)
    at = row * tl.num_programs(0) + block
    tl.store(largest + at, top)
    tl.store(places + at, tl.min(tl.where(value == top, n, V), 0))


@triton.jit
def _row_kernel(largest, places, tokens, C, BC: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    release_next(PDL)
    after_previous(PDL)
    value = tl.load(largest + row * C + c, mask=c < C, other=-float("inf"))
    place = tl.load(places + row * C + c, mask=c < C, other=2147483647)
    tl.store(tokens + row, tl.min(tl.where(value == tl.max(value, 0), place, 2147483647), 0).to(tl.int64))
