"""Products of a few vectors with one weight matrix, with the norm before them and the activation after them.

Each program computes BN columns of the output for BM rows of the batch and sums over all of K itself, so that no two
programs add into one place: results repeat bit for bit. With one row the whole tile of weights is fetched at once, and
the norm is part of the product (ROWS = 1); with more, a kernel of its own norms, and tiles along K go to the matrix units.

The residual stream x is fp32. Whoever writes x also writes the sums of squares of its BN columns; the next product adds
these up and has its RMSNorm without another pass over x.

Shapes: B batch rows, K inputs, N outputs, P partial sums of squares a row, T taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import Tiles, after_previous, early, release_next, tiles

NORM_BLOCK = 256  # columns of the residual stream that one program of `embed` writes


class Stream(NamedTuple):
    """The residual stream and what its next norm needs."""

    x: Tensor  # (B, W) fp32
    squares: Tensor  # (B, most) fp32 partial sums of x^2; `parts` of a row are in use
    parts: list[int]  # [P], set by whoever wrote x last
    normed: Tensor  # (B, W) in the dtype of the weights: scratch for many rows


class Norm(NamedTuple):
    """An RMSNorm of the residual stream."""

    weight: Tensor  # (W,)
    eps: float


class Taps(NamedTuple):
    """A causal convolution over the last T inputs of each channel."""

    weight: Tensor  # (E, T), the newest input's last
    bias: Tensor | None  # (E,)
    state: Tensor  # (B, T - 1, E), updated in place


def embed(ids: Tensor, table: Tensor, stream: Stream) -> None:
    """Starts the residual stream with the rows `ids` (B,) of `table` (V, W)."""
    batch, width = stream.x.shape
    stream.parts[0] = triton.cdiv(width, NORM_BLOCK)
    _embed_kernel[(stream.parts[0], batch)](
        ids, table, stream.x, stream.squares, width, stream.squares.shape[1], BN=NORM_BLOCK, num_warps=4,
        **early(ids.device),
    )  # fmt: skip


def project(stream: Stream, norm: Norm, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> None:
    """out (B, N) = norm(x) times each of up to four weights (N_i, W), side by side. A bias goes with one weight only."""
    x, left = _normed(stream, norm)
    _launch_project(x, stream, left, weights, bias, out)


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (B, N) = x (B, K) times weight (N, K)."""
    _launch_project(x, None, None, [weight], None, out)


def _normed(stream: Stream, norm: Norm) -> tuple[Tensor, Norm | None]:
    """What a product reads, and the norm that is left for it to do."""
    batch, width = stream.x.shape
    if batch == 1:
        return stream.x, norm  # with more rows, a norm in every program costs more than one of its own
    _norm_kernel[(batch,)](
        stream.x, norm.weight, stream.squares, stream.normed, width, *_squares(stream), norm.eps,
        PP=_lanes(stream), BW=triton.next_power_of_2(width), num_warps=4, **early(stream.x.device),
    )  # fmt: skip
    return stream.normed, None


def _launch_project(
    x: Tensor, stream: Stream | None, norm: Norm | None, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor
) -> None:
    batch, inputs = x.shape
    counts = [weight.shape[0] for weight in weights] + [0] * (4 - len(weights))
    sizes = tiles(batch, sum(counts), inputs, 1, weights[0].element_size())
    grid = (sum(triton.cdiv(count, sizes.BN) for count in counts), triton.cdiv(batch, sizes.BM))
    pointers = [*weights, *[weights[0]] * (4 - len(weights))]
    _project_kernel[grid](
        x, x if norm is None else norm.weight, x if stream is None else stream.squares, *pointers,
        x if bias is None else bias, out, batch, inputs, *counts,
        *_squares(stream), 0.0 if norm is None else norm.eps,
        NORM=norm is not None, BIAS=bias is not None, PP=_lanes(stream), **_options(sizes, x.device),
    )  # fmt: skip


def swiglu(stream: Stream, norm: Norm, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (B, E) = a silu(b), a and b the two halves of norm(x) times weight (2 E, W)."""
    _launch_gated(0, stream, norm, weight, bias, None, out, None)


def convolution(stream: Stream, norm: Norm, weight: Tensor, bias: Tensor | None, taps: Taps, out: Tensor) -> None:
    """out (B, E) = silu(convolution(a)) b, a and b the two halves of norm(x) times weight (2 E, W)."""
    _launch_gated(1, stream, norm, weight, bias, taps, out, None)


def mamba_inputs(stream: Stream, norm: Norm, weight: Tensor, taps: Taps, out: Tensor, gate: Tensor) -> None:
    """out = silu(convolution(a)) and gate = silu(b), (B, E) each, of the halves a and b of norm(x) times weight (2 E, W)."""
    _launch_gated(2, stream, norm, weight, None, taps, out, gate)


def _launch_gated(
    mode: int, stream: Stream, norm: Norm, weight: Tensor, bias: Tensor | None, taps: Taps | None, out: Tensor,
    gate: Tensor | None,
) -> None:  # fmt: skip
    batch, channels = out.shape
    sizes = tiles(batch, channels, weight.shape[1], 2, weight.element_size())
    grid = (triton.cdiv(channels, sizes.BN), triton.cdiv(batch, sizes.BM))
    tap_bias = None if taps is None else taps.bias
    x, left = _normed(stream, norm)
    _gated_kernel[grid](
        x, norm.weight, stream.squares, weight, weight if bias is None else bias, out,
        out if gate is None else gate, out if taps is None else taps.state, weight if taps is None else taps.weight,
        weight if tap_bias is None else tap_bias, batch, weight.shape[1], channels, *_squares(stream), norm.eps,
        MODE=mode, T=1 if taps is None else taps.weight.shape[1], NORM=left is not None, BIAS=bias is not None,
        TAP_BIAS=tap_bias is not None, PP=_lanes(stream), **_options(sizes, out.device),
    )  # fmt: skip


def add_product(h: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream) -> None:
    """x += h (B, K) times weight (W, K), rounded to the dtype of the weights before it is added."""
    batch, width = stream.x.shape
    sizes = tiles(batch, width, weight.shape[1], 1, weight.element_size())
    stream.parts[0] = triton.cdiv(width, sizes.BN)
    _residual_kernel[(stream.parts[0], triton.cdiv(batch, sizes.BM))](
        h, weight, weight if bias is None else bias, stream.x, stream.squares, batch, weight.shape[1], width,
        stream.squares.shape[1], BIAS=bias is not None, **_options(sizes, h.device),
    )  # fmt: skip


def _squares(stream: Stream | None) -> tuple[int, int]:
    """Stride of the partial sums of squares, and how many of a row are in use."""
    return (1, 1) if stream is None else (stream.squares.shape[1], stream.parts[0])


def _lanes(stream: Stream | None) -> int:
    return 1 if stream is None else triton.next_power_of_2(stream.parts[0])


def _options(sizes: Tiles, device: torch.device) -> dict[str, int | bool]:
    return {
        "ROWS": sizes.rows, "BM": sizes.BM, "BN": sizes.BN, "BK": sizes.BK, "STAGES": sizes.stages,
        "num_warps": sizes.warps, **early(device),
    }  # fmt: skip


@triton.jit
def _inverse_norm(squares, row, B, stride, P, K, eps, PP: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row (BM,), from its first P partial sums of squares."""
    part = tl.arange(0, PP)
    inside = (row < B)[:, None] & (part[None, :] < P)
    sums = tl.load(squares + row[:, None] * stride + part[None, :], mask=inside, other=0.0)
    return tl.rsqrt(tl.sum(sums, 1) / K + eps)


@triton.jit
def _inputs(x, norm, inverse, row, k, B, K, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """Inputs of the product (BM, BK) in the dtype of the weights, normalised where there is a norm."""
    inside = (row[:, None] < B) & (k[None, :] < K)
    a = tl.load(x + row[:, None] * K + k[None, :], mask=inside, other=0.0)
    if NORM:
        weight = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        a = a * inverse[:, None] * weight[None, :]
    return a.to(DTYPE)


@triton.jit
def _weights(w, n, k, N, K):
    """Weights (BN, BK) of outputs `n` and inputs `k`."""
    inside = (n[:, None] < N) & (k[None, :] < K)
    return tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _sums(
    x, norm, squares, row, w, n, second, B, K, N, stride, P, eps,
    NORM: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """fp32 sums (BM, BN) for outputs `n`, and for outputs `second` where PAIR."""
    dtype: tl.constexpr = w.dtype.element_ty
    if ROWS == 1:
        k = tl.arange(0, BK)
        first_w = _weights(w, n, k, N, K)  # weights do not depend on the kernel before: fetched while it ends
        second_w = first_w
        if PAIR:
            second_w = _weights(w, second, k, N, K)
        release_next(PDL)
        after_previous(PDL)
        inverse = row.to(tl.float32)
        if NORM:
            inverse = _inverse_norm(squares, row, B, stride, P, K, eps, PP)
        a = _inputs(x, norm, inverse, row, k, B, K, NORM, dtype).to(tl.float32)  # (1, BK)
        first = tl.sum(first_w.to(tl.float32) * a, 1)[None, :]
        other = first
        if PAIR:
            other = tl.sum(second_w.to(tl.float32) * a, 1)[None, :]
    else:
        after_previous(PDL)
        release_next(PDL)  # not earlier: the next kernel's programs would crowd those of this one
        first = tl.zeros((row.shape[0], n.shape[0]), tl.float32)
        other = first
        for start in tl.range(0, K, BK, num_stages=STAGES):
            k = start + tl.arange(0, BK)
            a = _inputs(x, norm, first, row, k, B, K, False, dtype)
            first = tl.dot(a, tl.trans(_weights(w, n, k, N, K)), first, input_precision="ieee")
            if PAIR:
                other = tl.dot(a, tl.trans(_weights(w, second, k, N, K)), other, input_precision="ieee")
    return first, other


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _project_kernel(
    x, norm, squares, w0, w1, w2, w3, bias, out, B, K, N0, N1, N2, N3, stride, P, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    w, count, base = w0, N0, 0  # the matrix that this program's outputs belong to, its outputs, and those before it
    blocks = tl.cdiv(N0, BN)
    if block >= blocks:
        block -= blocks
        w, count, base = w1, N1, N0
        blocks = tl.cdiv(N1, BN)
        if block >= blocks:
            block -= blocks
            w, count, base = w2, N2, N0 + N1
            blocks = tl.cdiv(N2, BN)
            if block >= blocks:
                block -= blocks
                w, count, base = w3, N3, N0 + N1 + N2
    n = block * BN + tl.arange(0, BN)
    y, _ = _sums(x, norm, squares, row, w, n, n, B, K, count, stride, P, eps, NORM, False, ROWS, BK, PP, STAGES, PDL)
    if BIAS:
        y += tl.load(bias + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < B) & (n[None, :] < count)
    width = N0 + N1 + N2 + N3
    tl.store(out + row[:, None].to(tl.int64) * width + base + n[None, :], y, mask=inside)


@triton.jit
def _gated_kernel(
    x, norm, squares, w, bias, out, out_gate, state, taps, tap_bias, B, K, E, stride, P, eps,
    MODE: tl.constexpr, T: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, TAP_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = w.dtype.element_ty
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    e = tl.program_id(0) * BN + tl.arange(0, BN)
    channel = e < E
    second = tl.where(channel, E + e, 2 * E)  # the other half's outputs; none beyond the last
    value, gate = _sums(
        x, norm, squares, row, w, tl.where(channel, e, 2 * E), second, B, K, 2 * E, stride, P, eps, NORM, True, ROWS, BK, PP, STAGES, PDL
    )  # fmt: skip
    if BIAS:
        value += tl.load(bias + e, mask=channel, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + E + e, mask=channel, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < B) & channel[None, :]
    at = row[:, None] * E + e[None, :]
    if MODE == 0:
        y = value * _silu(gate)
    else:  # a causal convolution on the first half, whose last T - 1 inputs are the state (B, T - 1, E)
        value = value.to(dtype).to(tl.float32)
        place = state + row[:, None] * ((T - 1) * E) + e[None, :]
        c = value * tl.load(taps + e * T + (T - 1), mask=channel, other=0.0).to(tl.float32)[None, :]
        for tap in tl.static_range(T - 1):
            before = tl.load(place + tap * E, mask=inside, other=0.0).to(tl.float32)
            c += before * tl.load(taps + e * T + tap, mask=channel, other=0.0).to(tl.float32)[None, :]
        if TAP_BIAS:
            c += tl.load(tap_bias + e, mask=channel, other=0.0).to(tl.float32)[None, :]
        tl.debug_barrier()  # all of the old state is read before any of it is written
        for tap in tl.static_range(T - 2):
            later = tl.load(place + (tap + 1) * E, mask=inside, other=0.0)
            tl.store(place + tap * E, later, mask=inside)
            tl.debug_barrier()
        if T > 1:
            tl.store(place + (T - 2) * E, value, mask=inside)
        y = _silu(c)
        if MODE == 1:
            y *= gate
        else:
            tl.store(out_gate + at, _silu(gate), mask=inside)
    tl.store(out + at, y, mask=inside)


@triton.jit
def _residual_kernel(
    h, w, bias, x, squares, B, K, N, stride,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    y, _ = _sums(h, h, h, row, w, n, n, B, K, N, 1, 1, 0.0, False, False, ROWS, BK, 1, STAGES, PDL)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < B) & (n[None, :] < N)
    place = x + row[:, None] * N + n[None, :]
    y = tl.load(place, mask=inside, other=0.0) + y.to(w.dtype.element_ty).to(tl.float32)
    tl.store(place, y, mask=inside)
    total = tl.sum(tl.where(inside, y * y, 0.0), 1)
    tl.store(squares + row * stride + tl.program_id(0), total, mask=row < B)


@triton.jit
def _norm_kernel(
    x, norm, squares, out, W, stride, P, eps, PP: tl.constexpr, BW: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    k = tl.arange(0, BW)
    weight = tl.load(norm + k, mask=k < W, other=0.0).to(tl.float32)
    release_next(PDL)
    after_previous(PDL)
    inverse = _inverse_norm(squares, row, row + 1, stride, P, W, eps, PP)
    at = row[:, None] * W + k[None, :]
    y = tl.load(x + at, mask=k[None, :] < W, other=0.0) * inverse[:, None] * weight[None, :]
    tl.store(out + at, y, mask=k[None, :] < W)


@triton.jit
def _embed_kernel(ids, table, x, squares, W, stride, BN: tl.constexpr, PDL: tl.constexpr):
    release_next(PDL)
    after_previous(PDL)
    row, block = tl.program_id(1), tl.program_id(0)
    n = block * BN + tl.arange(0, BN)
    y = tl.load(table + tl.load(ids + row) * W + n, mask=n < W, other=0.0).to(tl.float32)
    tl.store(x + row * W + n, y, mask=n < W)
    tl.store(squares + row * stride + block, tl.sum(y * y, 0))
