"""Triton kernels of `synthetics.taylor.taylor_attention`. Scores are never written to memory, forward or backward.

One program handles one head of one row and a tile of its queries. It loops over the tiles of keys, computes scores and
weights, and sums the results. The kernel for the gradients of keys and values has a tile of keys and loops over tiles
of queries. A prefix is a second loop, over all tokens, with its own keys and values.

All vectors of a token are in one row of `x`: q, k, v of all heads, and for a prefix k_enc and v_enc.

Shapes: R rows, T tokens, H heads, d query/key size, D value size, C = 2 H d + H D columns, and H d + H D more for a
prefix; L tokens of a tile.
"""
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # L
SMALLEST = 16  # smaller sizes are filled up with zeros, because the tensor cores need 16


def forward(x: Tensor, heads: int, keys: int, values: int) -> tuple[Tensor, Tensor]:
    """Returns o (R, T, H D) in the dtype of `x`, and the denominators (R, H, T) in fp32.

    Args:
        x: (R, T, C), contiguous.
        heads, keys, values: H, d and D.
    """
    rows, length, _ = x.shape
    o = x.new_empty(rows, length, heads * values)
    denominator = x.new_empty(rows, heads, length, dtype=torch.float32)
    grid = (rows * heads, triton.cdiv(length, TILE))
    with torch.cuda.device_of(x):
        _taylor_kernel[grid](x, o, denominator, length, **_sizes(x, heads, keys, values))
    return o, denominator


def backward(x: Tensor, o: Tensor, denominator: Tensor, do: Tensor, heads: int, keys: int, values: int) -> Tensor:
    """Returns the gradient of `x` (R, T, C), given that of `o`, `do` (R, T, H D).

    The other arguments are those of `forward` and its results."""
    rows, length, _ = x.shape
    dx, ddenominator = torch.empty_like(x), torch.empty_like(denominator)
    sizes = _sizes(x, heads, keys, values)
    tiles, do = triton.cdiv(length, TILE), do.contiguous()
    with torch.cuda.device_of(x):
        _query_gradient_kernel[rows * heads, tiles](x, o, denominator, do, ddenominator, dx, length, **sizes)
        grid = (rows * heads, tiles, sizes["READS"])
        _key_gradient_kernel[grid](x, denominator, do, ddenominator, dx, length, **sizes)
    return dx


def _sizes(x: Tensor, heads: int, keys: int, values: int) -> dict[str, int]:
    own = heads * (2 * keys + values)
    return {
        "C": x.shape[2],
        "H": heads,
        "DK": keys,
        "DV": values,
        "READS": 1 if x.shape[2] == own else 2,  # the text; the text and the prefix
        "PK": max(SMALLEST, triton.next_power_of_2(keys)),
        "PV": max(SMALLEST, triton.next_power_of_2(values)),
        "L": TILE,
    }


@triton.jit
def _head(x, T, C: tl.constexpr, H: tl.constexpr):
    """Returns the start of the program's row in `x`, and its head."""
    row = (tl.program_id(0) // H).to(tl.int64)
    return x + row * T * C, tl.program_id(0) % H


@triton.jit
def _load(x, tokens, first, T, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Loads D columns from `first` on of these tokens, (L, P), with zeros outside."""
    column = tl.arange(0, P)
    inside = (tokens < T)[:, None] & (column < D)[None, :]
    return tl.load(x + tokens[:, None] * C + first + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, value, tokens, first, T, C: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    column = tl.arange(0, P)
    inside = (tokens < T)[:, None] & (column < D)[None, :]
    tl.store(x + tokens[:, None] * C + first + column[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _key_column(read, h, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """The first column of a head's keys, those of the text (read 0) or of the prefix (read 1)."""
    return tl.where(read == 0, H * DK, H * (2 * DK + DV)) + h * DK


@triton.jit
def _value_column(read, h, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    return tl.where(read == 0, 2 * H * DK, H * (3 * DK + DV)) + h * DV


@triton.jit(do_not_specialize=["T"])
def _taylor_kernel(
    x, o, denominator, T,
    C: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, READS: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    x, h = _head(x, T, C, H)
    o, _ = _head(o, T, H * DV, H)
    i = tl.program_id(1) * L + tl.arange(0, L)
    q = _load(x, i, h * DK, T, C, DK, PK)
    numerator, total = tl.zeros((L, PV), tl.float32), tl.zeros((L,), tl.float32)
    for read in tl.static_range(READS):
        end = tl.minimum(T, (tl.program_id(1) + 1) * L) if read == 0 else T
        for start in range(0, end, L):
            j = start + tl.arange(0, L)
            k = _load(x, j, _key_column(read, h, H, DK, DV), T, C, DK, PK)
            v = _load(x, j, _value_column(read, h, H, DK, DV), T, C, DV, PV)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            seen = j[None, :] <= i[:, None] if read == 0 else (j < T)[None, :] & (i >= 0)[:, None]
            w = tl.where(seen, 1 + s + 0.5 * s * s, 0.0)
            total += tl.sum(w, 1)
            numerator = tl.dot(w.to(v.dtype), v, numerator, input_precision="ieee")
    _store(o, numerator / total[:, None], i, h * DV, T, H * DV, DV, PV)
    tl.store(denominator + tl.program_id(0).to(tl.int64) * T + i, total, mask=i < T)


@triton.jit(do_not_specialize=["T"])
def _query_gradient_kernel(
    x, o, denominator, do, ddenominator, dx, T,
    C: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, READS: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the queries, and those of the denominators, which `_key_gradient_kernel` needs."""
    x, h = _head(x, T, C, H)
    dx, _ = _head(dx, T, C, H)
    o, _ = _head(o, T, H * DV, H)
    do, _ = _head(do, T, H * DV, H)
    at = tl.program_id(0).to(tl.int64) * T
    i = tl.program_id(1) * L + tl.arange(0, L)
    q = _load(x, i, h * DK, T, C, DK, PK)
    total = tl.load(denominator + at + i, mask=i < T, other=1.0)
    g = _load(do, i, h * DV, T, H * DV, DV, PV).to(tl.float32) / total[:, None]  # of the numerator
    dtotal = -tl.sum(g * _load(o, i, h * DV, T, H * DV, DV, PV).to(tl.float32), 1)
    tl.store(ddenominator + at + i, dtotal, mask=i < T)
    g = g.to(q.dtype)
    dq = tl.zeros((L, PK), tl.float32)
    for read in tl.static_range(READS):
        end = tl.minimum(T, (tl.program_id(1) + 1) * L) if read == 0 else T
        for start in range(0, end, L):
            j = start + tl.arange(0, L)
            k = _load(x, j, _key_column(read, h, H, DK, DV), T, C, DK, PK)
            v = _load(x, j, _value_column(read, h, H, DK, DV), T, C, DV, PV)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            dw = tl.dot(g, tl.trans(v), input_precision="ieee") + dtotal[:, None]
            seen = j[None, :] <= i[:, None] if read == 0 else (j < T)[None, :] & (i >= 0)[:, None]
            ds = tl.where(seen, dw * (1 + s), 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store(dx, dq, i, h * DK, T, C, DK, PK)


@triton.jit(do_not_specialize=["T"])
def _key_gradient_kernel(
    x, denominator, do, ddenominator, dx, T,
    C: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, READS: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of keys and values, of the text (third program index 0) or of the prefix (1)."""
    x, h = _head(x, T, C, H)
    dx, _ = _head(dx, T, C, H)
    do, _ = _head(do, T, H * DV, H)
    at = tl.program_id(0).to(tl.int64) * T
    read = tl.program_id(2)
    j = tl.program_id(1) * L + tl.arange(0, L)
    key, value = _key_column(read, h, H, DK, DV), _value_column(read, h, H, DK, DV)
    k, v = _load(x, j, key, T, C, DK, PK), _load(x, j, value, T, C, DV, PV)
    dk, dv = tl.zeros((L, PK), tl.float32), tl.zeros((L, PV), tl.float32)
    for start in range(tl.where(read == 0, tl.program_id(1) * L, 0), T, L):
        i = start + tl.arange(0, L)
        q = _load(x, i, h * DK, T, C, DK, PK)
        total = tl.load(denominator + at + i, mask=i < T, other=1.0)
        dtotal = tl.load(ddenominator + at + i, mask=i < T, other=0.0)
        g = (_load(do, i, h * DV, T, H * DV, DV, PV).to(tl.float32) / total[:, None]).to(q.dtype)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (keys, queries)
        dw = tl.dot(v, tl.trans(g), input_precision="ieee") + dtotal[None, :]
        seen = ((j[:, None] <= i[None, :]) | (read == 1)) & (i < T)[None, :]
        w = tl.where(seen, 1 + s + 0.5 * s * s, 0.0)
        ds = tl.where(seen, dw * (1 + s), 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        dv = tl.dot(w.to(q.dtype), g, dv, input_precision="ieee")
    _store(dx, dk, j, key, T, C, DK, PK)
    _store(dx, dv, j, value, T, C, DV, PV)
