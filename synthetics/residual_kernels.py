"""Triton kernels of `synthetics.residual`.

Shapes: M models, N tokens of each, E width, P programs a model, L tokens of a tile.
"""
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # numbers in a tile
PROGRAMS = 1024  # programs of all models together in the backward; each sums the weight's gradient over its tiles


def forward(
    x: Tensor, y: Tensor | None, bias: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `synthetics.residual.add_and_norm`."""
    models, tokens, width = x.shape
    x, weight = x.contiguous(), weight.contiguous()  # weights are views of the optimizer's table
    has_bias = bias is not None
    bias = weight if bias is None else bias.contiguous()
    total = x.view_as(x) if y is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    sizes = tile(width)
    with torch.cuda.device_of(x):
        _add_norm_kernel[triton.cdiv(tokens, sizes["L"]), models](
            x, x if y is None else y.contiguous(), bias, weight, total, normed, eps, tokens,
            ADDS=y is not None, BIAS=has_bias, **sizes,
        )  # fmt: skip
    return total, normed


def backward(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float, adds: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns the gradients of x, y (None unless `adds`), bias and weight.

    The gradients of x and y are equal except for their dtype."""
    models, tokens, width = total.shape
    sizes = tile(width)
    programs = max(1, min(triton.cdiv(tokens, sizes["L"]), PROGRAMS // models))
    dx = torch.empty_like(total)
    dy = torch.empty_like(dnormed) if adds else None
    sums = total.new_empty(models, programs, 2, width)
    with torch.cuda.device_of(total):
        _add_norm_gradient_kernel[programs, models](
            dtotal.contiguous(), dnormed.contiguous(), total, weight.contiguous(), dx, dx if dy is None else dy, sums, eps,
            tokens, ADDS=adds, **sizes,
        )  # fmt: skip
    sums = sums.sum(1)  # (M, 2, E)
    return dx, dy, sums[:, 0], sums[:, 1]


def tile(width: int) -> dict[str, int]:
    """Returns the numbers of columns and of tokens in a program's tile."""
    columns = triton.next_power_of_2(width)
    return {"E": width, "PE": columns, "L": max(1, NUMBERS // columns)}


@triton.jit(do_not_specialize=["N"])
def _add_norm_kernel(
    x, y, bias, weight, total, normed, eps, N,
    ADDS: tl.constexpr, BIAS: tl.constexpr, E: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    model, n, e = tl.program_id(1), tl.program_id(0) * L + tl.arange(0, L), tl.arange(0, PE)
    inside = (n < N)[:, None] & (e < E)[None, :]
    at = (model.to(tl.int64) * N + n)[:, None] * E + e[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADDS:
        value += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + model * E + e, mask=e < E, other=0.0)[None, :]
        tl.store(total + at, value, mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 1) / E + eps)
    gain = tl.load(weight + model * E + e, mask=e < E, other=0.0)
    tl.store(normed + at, (value * scale[:, None] * gain[None, :]).to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _add_norm_gradient_kernel(
    dtotal, dnormed, total, weight, dx, dy, sums, eps, N,
    ADDS: tl.constexpr, E: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    model, e = tl.program_id(1), tl.arange(0, PE)
    gain = tl.load(weight + model * E + e, mask=e < E, other=0.0)
    dgain, dbias = tl.zeros((PE,), tl.float32), tl.zeros((PE,), tl.float32)
    for start in range(tl.program_id(0) * L, N, tl.num_programs(0) * L):
        n = start + tl.arange(0, L)
        inside = (n < N)[:, None] & (e < E)[None, :]
        at = (model.to(tl.int64) * N + n)[:, None] * E + e[None, :]
        value = tl.load(total + at, mask=inside, other=0.0)
        g = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / E + eps)[:, None]
        unit = value * scale
        dgain += tl.sum(g * unit, 0)
        g = g * gain[None, :]
        own = scale * (g - unit * (tl.sum(g * unit, 1) / E)[:, None])
        own += tl.load(dtotal + at, mask=inside, other=0.0)
        dbias += tl.sum(tl.where(inside, own, 0.0), 0)
        tl.store(dx + at, own, mask=inside)
        if ADDS:
            tl.store(dy + at, own.to(dy.dtype.element_ty), mask=inside)
    sums += (model * tl.num_programs(0) + tl.program_id(0)) * 2 * E
    tl.store(sums + e, dbias, mask=e < E)
    tl.store(sums + E + e, dgain, mask=e < E)
