"""Triton kernels of `jrt.ops.steps.products`.

With one row (ROWS = 1), a program loads its whole tile of weights at once, and applies the RMSNorm to its input itself.
With more rows, tiles along K go to the tensor cores. No two programs add to the same address, so results are bit for
bit reproducible: if the sum over K is cut into parts, each part is written separately (`jrt.ops.steps.stream` adds
them).

Weights do not change, so with one row a program loads its weights before the previous kernel has ended. With more rows
this does not help: loading them into the L2 cache early made a layer an eighth slower.

Shapes: B batch rows, K inputs, N outputs, E channels, P partial sums of squares of the row, S parts of K, T taps.
A program has BM rows, BN outputs and BK inputs at a time.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no unpacking inside a tuple

from __future__ import annotations

import triton
import triton.language as tl

from jrt.ops.steps.launch import after_previous, release_next
from jrt.ops.steps.stream import inverse_norm


@triton.jit
def _weights(w, n, k, N, K):
    """Weights (BN, BK) of outputs `n` and inputs `k`."""
    inside = (n[:, None] < N) & (k[None, :] < K)
    return tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _weights_ahead(w, n, second, K, N, PAIR: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr):
    """With one row, all weights of outputs `n` and (if PAIR) `second`; needs BK >= K. With more rows, zeros as
    placeholders."""
    first_w, second_w = 0, 0
    if ROWS == 1:
        k = tl.arange(0, BK)
        first_w = _weights(w, n, k, N, K)
        second_w = first_w
        if PAIR:
            second_w = _weights(w, second, k, N, K)
    return first_w, second_w


@triton.jit
def _sums_of_one_row(
    x, norm, squares, first_w, second_w, K, P, eps,
    NORM: tl.constexpr, PAIR: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """fp32 sums (1, BN) for the outputs with the given weights, and (if PAIR) for the second ones."""
    k = tl.arange(0, BK)
    release_next(PDL)
    after_previous(PDL)
    a = tl.load(x + k, mask=k < K, other=0.0)
    if NORM:
        weight = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        a = a * inverse_norm(squares, P, K, eps, PP) * weight
    a = a.to(first_w.dtype).to(tl.float32)[None, :]
    first = tl.sum(first_w.to(tl.float32) * a, 1)[None, :]
    other = first
    if PAIR:
        other = tl.sum(second_w.to(tl.float32) * a, 1)[None, :]
    return first, other


@triton.jit
def _sums_of_rows(
    x, w, row, n, second, start, end, B, K, N,
    PAIR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """fp32 sums (BM, BN) over inputs `start` to `end` for outputs `n`, and for outputs `second` where PAIR."""
    after_previous(PDL)
    release_next(PDL)  # not earlier, or the next kernel's programs would take multiprocessors from this kernel
    first = tl.zeros((row.shape[0], n.shape[0]), tl.float32)
    other = first
    for k0 in tl.range(start, end, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x + row[:, None] * K + k[None, :], mask=(row[:, None] < B) & (k[None, :] < K), other=0.0)
        first = tl.dot(a, tl.trans(_weights(w, n, k, N, K)), first, input_precision="ieee")
        if PAIR:
            other = tl.dot(a, tl.trans(_weights(w, second, k, N, K)), other, input_precision="ieee")
    return first, other


@triton.jit
def _sums(
    x, norm, squares, w, first_w, second_w, row, n, second, B, K, N, P, eps,
    NORM: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if ROWS == 1:
        first, other = _sums_of_one_row(x, norm, squares, first_w, second_w, K, P, eps, NORM, PAIR, BK, PP, PDL)
    else:
        first, other = _sums_of_rows(x, w, row, n, second, 0, K, B, K, N, PAIR, BK, STAGES, PDL)
    return first, other


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def project_kernel(
    x, norm, squares, w0, w1, w2, w3, bias, out, B, K, N0, N1, N2, N3, P, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
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
    first_w, second_w = _weights_ahead(w, n, n, K, count, False, ROWS, BK)
    y, _ = _sums(
        x, norm, squares, w, first_w, second_w, row, n, n, B, K, count, P, eps, NORM, False, ROWS, BK, PP, STAGES, PDL
    )  # fmt: skip
    if BIAS:
        y += tl.load(bias + n, mask=n < count, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < B) & (n[None, :] < count)
    width = N0 + N1 + N2 + N3
    tl.store(out + row[:, None].to(tl.int64) * width + base + n[None, :], y, mask=inside)


@triton.jit
def gated_kernel(
    x, norm, squares, w, bias, out, out_gate, state, taps, tap_bias, B, K, E, P, eps,
    MODE: tl.constexpr, T: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, TAP_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = w.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    e = tl.program_id(1) * BN + tl.arange(0, BN)
    channel = e < E
    inside = (row[:, None] < B) & channel[None, :]
    first, second = tl.where(channel, e, 2 * E), tl.where(channel, E + e, 2 * E)  # none beyond the last of each half
    first_w, second_w = _weights_ahead(w, first, second, K, 2 * E, True, ROWS, BK)
    place = state + row[:, None] * ((T - 1) * E) + e[None, :]
    convolved = 0.0
    if MODE > 0:
        convolved = _older_inputs(place, taps, e, E, inside, channel, T)
    value, gate = _sums(
        x, norm, squares, w, first_w, second_w, row, first, second, B, K, 2 * E, P, eps, NORM, True, ROWS, BK, PP,
        STAGES, PDL,
    )  # fmt: skip
    if BIAS:
        value += tl.load(bias + e, mask=channel, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias + E + e, mask=channel, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * E + e[None, :]
    if MODE == 0:
        y = value * _silu(gate)
    else:  # the first half goes through a causal convolution
        value = value.to(dtype).to(tl.float32)
        convolved += value * tl.load(taps + e * T + (T - 1), mask=channel, other=0.0).to(tl.float32)[None, :]
        if TAP_BIAS:
            convolved += tl.load(tap_bias + e, mask=channel, other=0.0).to(tl.float32)[None, :]
        if T > 1:
            tl.store(place + (T - 2) * E, value, mask=inside)
        y = _silu(convolved)
        if MODE == 1:
            y *= gate
        else:
            tl.store(out_gate + at, _silu(gate), mask=inside)
    tl.store(out + at, y, mask=inside)


@triton.jit
def _older_inputs(place, taps, e, E, inside, channel, T: tl.constexpr):
    """The part (BM, BN) of the convolution from the T - 1 earlier inputs, which are then shifted by one in memory.

    place: the addresses of the oldest input."""
    c = tl.zeros(inside.shape, tl.float32)
    inputs = ()
    for tap in tl.static_range(T - 1):
        inputs = inputs + (tl.load(place + tap * E, mask=inside, other=0.0),)  # type: ignore[assignment]  # it grows
        c += inputs[tap].to(tl.float32) * tl.load(taps + e * T + tap, mask=channel, other=0.0).to(tl.float32)[None, :]
    tl.debug_barrier()  # all are read before any is overwritten
    for tap in tl.static_range(1, T - 1):
        tl.store(place + (tap - 1) * E, inputs[tap], mask=inside)
    tl.debug_barrier()  # the newest place is free before the new input takes it
    return c


@triton.jit
def residual_kernel(
    h, w, bias, x, squares, K, N,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    n = block * BN + tl.arange(0, BN)
    first_w, second_w = _weights_ahead(w, n, n, K, N, False, ROWS, BK)
    y, _ = _sums_of_one_row(h, h, h, first_w, second_w, K, 1, 0.0, False, False, BK, 1, PDL)
    y = tl.reshape(y, (BN,))
    inside = n < N
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x + n, mask=inside, other=0.0) + y.to(w.dtype.element_ty).to(tl.float32)
    tl.store(x + n, y, mask=inside)
    tl.store(squares + block, tl.sum(tl.where(inside, y * y, 0.0), 0))


@triton.jit
def partial_kernel(
    h, w, partial, B, K, N, S: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(K, BK), S) * BK
    start = split * share
    y, _ = _sums_of_rows(h, w, row, n, n, start, tl.minimum(start + share, K), B, K, N, False, BK, STAGES, PDL)
    place = partial + (split.to(tl.int64) * B + row[:, None]) * N + n[None, :]
    tl.store(place, y, mask=(row[:, None] < B) & (n[None, :] < N))
