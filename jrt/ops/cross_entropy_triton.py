"""The Triton kernel of `jrt.ops.cross_entropy`: logits become their gradient, in place.

Shapes: N places, V vocabulary rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, WARPS = 8192, 16  # columns of the logits that a program reads at a time


def replace_by_gradient(logits: Tensor, labels: Tensor, weights: Tensor | None, ignored: int, losses: Tensor) -> None:
    """Overwrites logits (N, V), contiguous, by the gradient of sum(losses), and fills losses (N,).

    labels: (N,), `ignored` for places whose loss is 0; weights: (N,) factors of the losses, or None for 1.
    """
    places, rows = logits.shape
    factors = losses if weights is None else weights.contiguous()
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(places,)](
            logits, labels.contiguous(), factors, losses, rows, ignored, WEIGHTED=weights is not None, W=COLUMNS,
            num_warps=WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignored"])
def _cross_entropy_kernel(logits, labels, factors, losses, V, ignored, WEIGHTED: tl.constexpr, W: tl.constexpr):
    """One program a place. Each lane keeps the maximum and the sum of its own columns; both are joined at the end. The
    second pass goes backward, because the cache still holds the last columns."""
    place = tl.program_id(0).to(tl.int64)
    logits += place * V
    label = tl.load(labels + place)
    counts = label != ignored
    columns = tl.arange(0, W)
    # Read before the sums below, at which all warps wait for each other: the second pass overwrites it.
    chosen = tl.load(logits + label, mask=counts, other=0.0).to(tl.float32)
    highest = tl.full((W,), -1e30, tl.float32)
    total = tl.zeros((W,), tl.float32)
    for start in range(0, V, W):
        x = tl.load(logits + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    factor = tl.load(factors + place) if WEIGHTED else 1.0
    for i in range(tl.cdiv(V, W)):
        start = (tl.cdiv(V, W) - 1 - i) * W
        inside = start + columns < V
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - log_sum) - tl.where(start + columns == label, 1.0, 0.0)) * factor
        gradient = tl.where(counts, gradient, 0.0)
        tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(losses + place, tl.where(counts, (log_sum - chosen) * factor, 0.0))
