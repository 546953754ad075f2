"""Triton kernels of `synthetics.convolution`. The gradients of biases and taps are sums over tokens.

Shapes: M models, B rows of each, R = M x B, T tokens, E channels, K taps, P programs a model, L tokens of a tile.
"""
# mypy: disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 1024  # numbers in a tile
PROGRAMS = 4096  # programs of all models in the backward; each sums gradients of biases and taps over its tiles


def forward(u: Tensor, bias: Tensor, taps: Tensor, filter_bias: Tensor) -> Tensor:
    """As `synthetics.convolution.gated_convolution`."""
    (rows, length, _), (models, width, _) = u.shape, taps.shape
    y = u.new_empty(rows, length, width)
    sizes = _sizes(taps)
    with torch.cuda.device_of(u):
        _gated_convolution_kernel[rows, triton.cdiv(length, sizes["L"])](
            u.contiguous(), *_weights(bias, taps, filter_bias), y, length, rows // models, **sizes
        )
    return y


def backward(
    dy: Tensor, u: Tensor, bias: Tensor, taps: Tensor, filter_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of u, bias, taps and filter_bias from that of the result, dy (R, T, E)."""
    (rows, length, _), (models, width, count) = u.shape, taps.shape
    sizes = _sizes(taps)
    per_model = rows // models
    programs = max(1, min(per_model * triton.cdiv(length, sizes["L"]), PROGRAMS // models))
    u = u.contiguous()
    bias, taps, filter_bias = _weights(bias, taps, filter_bias)
    du, dc = torch.empty_like(u), torch.empty_like(dy, memory_format=torch.contiguous_format)
    sums = bias.new_empty(models, programs, count + 3, width)  # of each tap, then filter_bias, bias of input and gate
    with torch.cuda.device_of(u):
        _gate_gradient_kernel[programs, models](
            dy.contiguous(), u, bias, taps, filter_bias, dc, du, sums, length, per_model,
            S=triton.next_power_of_2(count + 3), **sizes, num_warps=1,
        )  # fmt: skip
        _input_gradient_kernel[rows, triton.cdiv(length, sizes["L"])](dc, taps, du, length, per_model, **sizes)
    sums = sums.sum(1)  # (M, K + 3, E)
    return du, sums[:, count + 1 :].flatten(1), sums[:, :count].mT, sums[:, count]


def _weights(*each: Tensor) -> tuple[Tensor, ...]:
    """Weights as the kernels read them: those of the models one after the other. In training they are views of the
    optimizer's table, with the other weights of a model in between."""
    return tuple(weight.contiguous() for weight in each)


def _sizes(taps: Tensor) -> dict[str, int]:
    _, width, count = taps.shape
    columns = triton.next_power_of_2(width)
    return {"E": width, "K": count, "PE": columns, "L": max(1, NUMBERS // columns)}


@triton.jit
def _load(u, bias, t, e, T, E: tl.constexpr):
    """Loads the inputs (L, PE) of these tokens plus their bias, in fp32. Places outside the text are 0."""
    inside = ((t >= 0) & (t < T))[:, None] & (e < E)[None, :]
    value = tl.load(u + t[:, None] * (2 * E) + e[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, value + bias[None, :], 0.0)


@triton.jit
def _convolved(u, bias, taps, filter_bias, t, e, T, E: tl.constexpr, K: tl.constexpr):
    """Returns the convolution at these tokens, (L, PE). taps are those of one model, (E, K)."""
    c = tl.load(filter_bias + e, mask=e < E, other=0.0)[None, :]
    for tap in tl.static_range(K):
        weight = tl.load(taps + e * K + tap, mask=e < E, other=0.0)
        c += weight[None, :] * _load(u, bias, t + (tap - K + 1), e, T, E)
    return c


@triton.jit(do_not_specialize=["T", "B"])
def _gated_convolution_kernel(
    u, bias, taps, filter_bias, y, T, B,
    E: tl.constexpr, K: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    row, t, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * L + tl.arange(0, L), tl.arange(0, PE)
    model = row // B
    u += row * T * 2 * E
    own_bias = tl.load(bias + model * 2 * E + e, mask=e < E, other=0.0)
    gate_bias = tl.load(bias + model * 2 * E + E + e, mask=e < E, other=0.0)
    c = _convolved(u, own_bias, taps + model * E * K, filter_bias + model * E, t, e, T, E, K)
    value = c * tl.sigmoid(c) * _load(u + E, gate_bias, t, e, T, E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    tl.store(y + row * T * E + t[:, None] * E + e[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "B"])
def _gate_gradient_kernel(
    dy, u, bias, taps, filter_bias, dc, du, sums, T, B,
    S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolution's results (into dc), of the gate (second half of du), and of biases and taps.

    A program has one warp, because it sums over the tokens of a tile six times and more warps would wait for each
    other.
    """
    model, e, s = tl.program_id(1).to(tl.int64), tl.arange(0, PE), tl.arange(0, S)
    own_bias = tl.load(bias + model * 2 * E + e, mask=e < E, other=0.0)
    gate_bias = tl.load(bias + model * 2 * E + E + e, mask=e < E, other=0.0)
    taps += model * E * K
    filter_bias += model * E
    total = tl.zeros((S, PE), tl.float32)
    tiles = tl.cdiv(T, L)
    for tile in range(tl.program_id(0), B * tiles, tl.num_programs(0)):
        row = model * B + tile // tiles
        t = (tile % tiles) * L + tl.arange(0, L)
        own = u + row * T * 2 * E
        inside = (t < T)[:, None] & (e < E)[None, :]
        c = _convolved(own, own_bias, taps, filter_bias, t, e, T, E, K)
        at = row * T * E + t[:, None] * E + e[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(c)
        dgate = g * c * sigmoid
        g = g * _load(own + E, gate_bias, t, e, T, E) * sigmoid * (1 + c * (1 - sigmoid))  # gradient of c
        tl.store(dc + at, g.to(dc.dtype.element_ty), mask=inside)
        gate_at = row * T * 2 * E + t[:, None] * (2 * E) + E + e[None, :]
        tl.store(du + gate_at, dgate.to(du.dtype.element_ty), mask=inside)
        reached = tl.zeros((L, PE), tl.float32)  # the taps that meet a token of the text, and its bias
        for tap in tl.static_range(K):
            before = t + (tap - K + 1)
            each = tl.sum(g * _load(own, own_bias, before, e, T, E), 0)
            total += tl.where(s == tap, 1.0, 0.0)[:, None] * each[None, :]
            weight = tl.load(taps + e * K + tap, mask=e < E, other=0.0)
            reached += tl.where(before >= 0, 1.0, 0.0)[:, None] * weight[None, :]
        total += tl.where(s == K, 1.0, 0.0)[:, None] * tl.sum(g, 0)[None, :]
        total += tl.where(s == K + 1, 1.0, 0.0)[:, None] * tl.sum(g * reached, 0)[None, :]
        total += tl.where(s == K + 2, 1.0, 0.0)[:, None] * tl.sum(dgate, 0)[None, :]
    at = (model * tl.num_programs(0) + tl.program_id(0)) * (K + 3) * E + s[:, None] * E + e[None, :]
    tl.store(sums + at, total, mask=(s < K + 3)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T", "B"])
def _input_gradient_kernel(
    dc, taps, du, T, B,
    E: tl.constexpr, K: tl.constexpr, PE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs (first half of du).

    An input is used by the result of its own token and of the next K - 1."""
    row, t, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * L + tl.arange(0, L), tl.arange(0, PE)
    taps += row // B * E * K
    dvalue = tl.zeros((L, PE), tl.float32)
    for ahead in tl.static_range(K):
        there = (t + ahead < T)[:, None] & (e < E)[None, :]
        g = tl.load(dc + row * T * E + (t[:, None] + ahead) * E + e[None, :], mask=there, other=0.0).to(tl.float32)
        dvalue += tl.load(taps + e * K + (K - 1 - ahead), mask=e < E, other=0.0)[None, :] * g
    at = row * T * 2 * E + t[:, None] * (2 * E) + e[None, :]
    tl.store(du + at, dvalue.to(du.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])
