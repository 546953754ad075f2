"""Triton kernels of `synthetics.taylor.weighted_sums`. One program handles one row and reads its tokens once.

Shapes: R rows, J queries, T tokens, E width, L tokens of a tile.
"""
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32  # L
QUERIES = 16  # most queries of a row; fewer are filled up with zeros, because the tensor cores need 16 columns


def forward(queries: Tensor, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """As `weighted_sums`, for at most QUERIES queries. queries and x must be contiguous."""
    rows, count, _ = queries.shape
    sums, totals = torch.empty_like(queries), queries.new_empty(rows, count, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weighted_sums_kernel[(rows,)](queries, x, last.contiguous(), sums, totals, x.shape[1], **_sizes(queries))
    return sums, totals


def backward(queries: Tensor, x: Tensor, last: Tensor, dsums: Tensor, dtotals: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of queries and x from those of the two results of `forward`."""
    dqueries, dx = torch.empty_like(queries), torch.empty_like(x)
    tensors = (queries, x, last.contiguous(), dsums.contiguous(), dtotals.contiguous())
    with torch.cuda.device_of(x):
        _weighted_sums_gradient_kernel[(len(x),)](*tensors, dqueries, dx, x.shape[1], **_sizes(queries))
    return dqueries, dx


def _sizes(queries: Tensor) -> dict[str, int]:
    _, count, width = queries.shape
    assert count <= QUERIES
    return {"J": count, "PJ": QUERIES, "E": width, "PE": max(16, triton.next_power_of_2(width)), "L": TILE}


@triton.jit
def _load(x, row, places, end, E: tl.constexpr, PE: tl.constexpr):
    """Loads these places of a row of (end, E) as (places, PE), with zeros outside."""
    e = tl.arange(0, PE)
    inside = (places < end)[:, None] & (e < E)[None, :]
    return tl.load(x + row * end * E + places[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, value, row, places, end, E: tl.constexpr, PE: tl.constexpr):
    e = tl.arange(0, PE)
    inside = (places < end)[:, None] & (e < E)[None, :]
    tl.store(x + row * end * E + places[:, None] * E + e[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _weighted_sums_kernel(
    queries, x, last, sums, totals, T,
    J: tl.constexpr, PJ: tl.constexpr, E: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, PJ)
    q = _load(queries, row, j, J, E, PE)
    end = tl.load(last + row * J + j, mask=j < J, other=-1)
    sum_, total = tl.zeros((PJ, PE), tl.float32), tl.zeros((PJ,), tl.float32)
    for start in range(0, T, L):
        t = start + tl.arange(0, L)
        each = _load(x, row, t, T, E, PE)
        s = tl.dot(q, tl.trans(each), input_precision="ieee")  # (PJ, L)
        w = tl.where(t[None, :] <= end[:, None], 1 + s + 0.5 * s * s, 0.0)
        total += tl.sum(w, 1)
        sum_ = tl.dot(w.to(each.dtype), each, sum_, input_precision="ieee")
    _store(sums, sum_, row, j, J, E, PE)
    tl.store(totals + row * J + j, total, mask=j < J)


@triton.jit(do_not_specialize=["T"])
def _weighted_sums_gradient_kernel(
    queries, x, last, dsums, dtotals, dqueries, dx, T,
    J: tl.constexpr, PJ: tl.constexpr, E: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, PJ)
    q, g = _load(queries, row, j, J, E, PE), _load(dsums, row, j, J, E, PE)
    end = tl.load(last + row * J + j, mask=j < J, other=-1)
    dtotal = tl.load(dtotals + row * J + j, mask=j < J, other=0.0)
    dq = tl.zeros((PJ, PE), tl.float32)
    for start in range(0, T, L):
        t = start + tl.arange(0, L)
        each = _load(x, row, t, T, E, PE)
        s = tl.dot(q, tl.trans(each), input_precision="ieee")  # (PJ, L)
        dw = tl.dot(g, tl.trans(each), input_precision="ieee") + dtotal[:, None]
        seen = t[None, :] <= end[:, None]
        w = tl.where(seen, 1 + s + 0.5 * s * s, 0.0).to(each.dtype)
        ds = tl.where(seen, dw * (1 + s), 0.0).to(each.dtype)
        dq = tl.dot(ds, each, dq, input_precision="ieee")
        d_each = tl.dot(tl.trans(ds), q, input_precision="ieee")
        d_each = tl.dot(tl.trans(w), g, d_each, input_precision="ieee")
        _store(dx, d_each, row, t, T, E, PE)
    _store(dqueries, dq, row, j, J, E, PE)
