"""Triton kernels of `jrt.ops.gated`. Each reads its inputs once and computes in fp32.

With packed sequences each token knows the first token of its own, before which taps read the sequence's state or zero.

The gradients of the taps are sums over tokens. Programs write partial sums to memory, which are then added in a fixed
order; there are no atomic additions, so that results are bit for bit reproducible.

Shapes: B batch, T tokens, E channels, K taps, M hidden units, N = B x T rows, S segments of a text.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no unpacking inside a tuple
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.short_convolution import owners

ROWS, UNITS = 4, 512  # rows and hidden units of one SwiGLU program
STEPS, CHANNELS = 8, 128  # steps and channels of a tile of the convolution
SEGMENT = 128  # steps over which one program of its backward pass sums


def swiglu(x: Tensor) -> Tensor:
    """value * silu(gate) (..., M) for x = [value, gate] (..., 2 M)."""
    x = x.contiguous()
    units = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], units)
    rows = y.numel() // units
    with torch.cuda.device_of(x):
        _swiglu_kernel[_swiglu_grid(rows, units)](x, y, rows, units, R=ROWS, W=UNITS, num_warps=4)
    return y


def swiglu_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x (..., 2 M), and value * silu(gate) (..., M) again."""
    x, dy = x.contiguous(), dy.contiguous()
    units = x.shape[-1] // 2
    dx, y = torch.empty_like(x), torch.empty_like(dy)
    rows = y.numel() // units
    with torch.cuda.device_of(x):
        _swiglu_backward_kernel[_swiglu_grid(rows, units)](x, dy, dx, y, rows, units, R=ROWS, W=UNITS, num_warps=4)
    return dx, y


def convolution(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_gated: bool,
) -> Tensor:
    """silu(conv(u)) (B, T, E) for x = u (B, T, E), or that times gate for x = [u, gate] (B, T, 2 E).

    Other arguments as in `jrt.ops.silu_convolution`."""
    x, (channels, count) = _rows(x), taps.shape
    batch, steps, taps = x.shape[0], x.shape[1], taps.mT.contiguous()
    y = x.new_empty(batch, steps, channels)
    texts = _texts(x, state, mask, cu_seqlens)
    sizes = {"T": steps, "E": channels, "K": count, "S": x.stride(1)}
    grid = (triton.cdiv(channels, CHANNELS), triton.cdiv(steps, STEPS), batch)
    with torch.cuda.device_of(x):
        _convolution_kernel[grid](
            x, taps, _given(bias, taps), *texts.tensors, y, **sizes, **texts.flags, BIASED=bias is not None,
            GATED=is_gated, L=STEPS, W=CHANNELS, num_warps=4,
        )  # fmt: skip
    return y


def convolution_backward(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
    is_gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, taps and bias (the latter two in fp32); and with a gate the result of `convolution` again, else
    None. Arguments as in `convolution`."""
    x, dy, (channels, count) = _rows(x), dy.contiguous(), taps.shape
    batch, steps, taps = x.shape[0], x.shape[1], taps.mT.contiguous()
    segments = triton.cdiv(steps, SEGMENT)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(dy) if is_gated else None
    partial = torch.empty(batch * segments, count + 1, channels, dtype=torch.float32, device=x.device)
    texts = _texts(x, state, mask, cu_seqlens)
    sizes = {"T": steps, "E": channels, "K": count, "S": x.stride(1), "SEGMENT": SEGMENT}
    grid = (triton.cdiv(channels, CHANNELS), segments, batch)
    with torch.cuda.device_of(x):
        _convolution_backward_kernel[grid](
            x, taps, _given(bias, taps), *texts.tensors, dy, dx, _given(y, dx), partial, **sizes, **texts.flags,
            BIASED=bias is not None, GATED=is_gated, L=STEPS, W=CHANNELS, num_warps=1,
        )  # fmt: skip
    summed = partial.sum(0)  # (K + 1, E)
    return dx, summed[:count].mT.contiguous(), summed[count], y


class _Texts(NamedTuple):
    """Where texts begin, as the kernels read it. Tensors that are not given are replaced by any other."""

    tensors: tuple[Tensor, ...]  # starts and sequences of tokens (T,), states (N, K - 1, E), mask (B, T)
    flags: dict[str, bool]


def _texts(x: Tensor, state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Texts:
    starts = sequences = x
    if cu_seqlens is not None:
        sequences = owners(cu_seqlens, x.shape[1]).int()  # (T,) the number of each token's sequence
        starts = cu_seqlens[sequences].int()  # (T,) its first token
    states = x if state is None else state.contiguous()
    shown = x if mask is None else mask.contiguous().view(torch.int8)
    flags = {"PACKED": cu_seqlens is not None, "STARTED": state is not None, "MASKED": mask is not None}
    return _Texts((starts, sequences, states, shown), flags)


def _swiglu_grid(rows: int, units: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(units, UNITS)


def _rows(x: Tensor) -> Tensor:
    """x (B, T, .) with one stride between all its B T rows, as a slice of a wider tensor has; copied if necessary."""
    if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1):
        return x
    return x.contiguous()


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


@triton.jit
def _swiglu_place(rows, units, R: tl.constexpr, W: tl.constexpr):
    """Offsets (R, W) of a program's elements in y and in x, and a mask of those inside the tensors."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    unit = (tl.program_id(1) * W + tl.arange(0, W))[None, :]
    return row * units + unit, row * (2 * units) + unit, (row < rows) & (unit < units)


@triton.jit
def _swiglu_kernel(x, y, rows, units, R: tl.constexpr, W: tl.constexpr):
    own, pair, inside = _swiglu_place(rows, units, R, W)
    value = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + pair + units, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + own, (value * gate * tl.sigmoid(gate)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(x, dy, dx, y, rows, units, R: tl.constexpr, W: tl.constexpr):
    own, pair, inside = _swiglu_place(rows, units, R, W)
    value = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + pair + units, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(dy + own, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(y + own, (value * silu).to(y.dtype.element_ty), mask=inside)
    tl.store(dx + pair, (out * silu).to(dx.dtype.element_ty), mask=inside)
    slope = share * (1 + gate * (1 - share))
    tl.store(dx + pair + units, (out * value * slope).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _inputs(x, steps, inside, e, first, E, S):
    """x (L, W) in fp32 at these steps, zero where not `inside` (L,)."""
    place = (first + steps)[:, None] * S + e[None, :]
    return tl.load(x + place, mask=inside[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_filter(taps, bias, e, E, K: tl.constexpr, BIASED: tl.constexpr):
    """The taps as K vectors (W,), and the bias (W,)."""
    found = ()
    for k in tl.static_range(K):
        found = found + (tl.load(taps + k * E + e, mask=e < E, other=0.0).to(tl.float32),)
    offset = tl.zeros(e.shape, tl.float32)
    if BIASED:
        offset += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    return found, offset


@triton.jit
def _input(x, step, e, first, T, E, S):
    """x (W,) in fp32 at this step, zero outside of the text."""
    inside = (e < E) & (step >= 0) & (step < T)
    return tl.load(x + (first + step) * S + e, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _own_input(x, shown, step, e, first, T, E, S, MASKED: tl.constexpr):
    """As `_input`, also zero where the token is padding."""
    if MASKED:
        inside = (step >= 0) & (step < T)
        inside &= tl.load(shown + first + step, mask=inside, other=0) != 0
        return tl.load(x + (first + step) * S + e, mask=inside & (e < E), other=0.0).to(tl.float32)
    else:
        return _input(x, step, e, first, T, E, S)


@triton.jit(do_not_specialize=["T"])
def _convolution_kernel(
    x, taps, bias, starts, sequences, states, shown, y, T, E, S, K: tl.constexpr, BIASED: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, STARTED: tl.constexpr, MASKED: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * W + tl.arange(0, W)
    steps = tl.program_id(1) * L + tl.arange(0, L)
    first = tl.program_id(2).to(tl.int64) * T
    tap, offset = _load_filter(taps, bias, e, E, K, BIASED)
    begin, sequence = steps * 0, steps * 0 + tl.program_id(2)
    if PACKED:
        begin = tl.load(starts + steps, mask=steps < T, other=0)
        sequence = tl.load(sequences + steps, mask=steps < T, other=0)
    c = offset[None, :]
    for k in tl.static_range(K):
        step = steps - (K - 1) + k
        inside = (step >= begin) & (step < T)
        if MASKED:
            inside &= tl.load(shown + first + step, mask=inside, other=0) != 0
        value = _inputs(x, step, inside, e, first, E, S)
        if STARTED:
            row = sequence.to(tl.int64) * (K - 1) + step - begin
            value += _inputs(states, row, step < begin, e, K - 1, E, E)
        c = c + tap[k][None, :] * value
    out = c * tl.sigmoid(c)
    if GATED:
        out *= _inputs(x + E, steps, steps < T, e, first, E, S)
    inside = (steps < T)[:, None] & (e < E)[None, :]
    tl.store(y + (first + steps)[:, None] * E + e[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _convolution_backward_kernel(
    x, taps, bias, starts, sequences, states, shown, dy, dx, y, partial, T, E, S, SEGMENT, K: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, STARTED: tl.constexpr, MASKED: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """du_t = sum_j taps[K - 1 - j] dc_{t + j}: a program walks through its segment and the K - 1 steps after it.

    dc is the gradient of the convolution before silu. u, dc and own (the first step of a step's packed sequence) hold K
    steps, the newest last. The state's gradient is computed elsewhere."""
    e = tl.program_id(0) * W + tl.arange(0, W)
    start = tl.program_id(1) * SEGMENT
    stop = tl.minimum(T, start + SEGMENT)
    first = tl.program_id(2).to(tl.int64) * T
    width = E * (2 if GATED else 1)  # of a row of dx
    tap, offset = _load_filter(taps, bias, e, E, K, BIASED)
    by_bias = tl.zeros((W,), tl.float32)
    by_taps, u, dc, own = (), (), (), ()
    for k in tl.static_range(K):
        by_taps = by_taps + (tl.zeros((W,), tl.float32),)
        u = u + (_own_input(x, shown, start - K + k, e, first, T, E, S, MASKED),)
        dc = dc + (tl.zeros((W,), tl.float32),)
        own = own + (start * 0,)
    for begin in range(start, stop + K - 1, L):
        next_u, next_out, next_gate, next_own = (), (), (), ()  # all loads of L steps come before the arithmetic
        for i in tl.static_range(L):
            next_u = next_u + (_own_input(x, shown, begin + i, e, first, T, E, S, MASKED),)
            next_out = next_out + (_input(dy, begin + i, e, first, T, E, E),)
            if GATED:
                next_gate = next_gate + (_input(x + E, begin + i, e, first, T, E, S),)
            if PACKED:
                next_own = next_own + (tl.load(starts + begin + i, mask=begin + i < T, other=0),)
        for i in tl.static_range(L):
            step = begin + i
            is_own = step < stop
            u = _shifted(u, next_u[i], K)
            sequence = tl.program_id(2)
            if PACKED:
                own = _shifted(own, next_own[i], K)
                sequence = tl.load(sequences + step, mask=step < T, other=0)
            c, read = offset, ()
            for k in tl.static_range(K):
                value, place = u[k], step - (K - 1) + k - own[K - 1]  # place: in the step's sequence
                if PACKED:
                    value = tl.where(place >= 0, value, 0.0)
                if STARTED:
                    row = sequence.to(tl.int64) * (K - 1) + (K - 1) + place
                    value += tl.load(states + row * E + e, mask=(place < 0) & (e < E), other=0.0).to(tl.float32)
                read = read + (value,)
                c = c + tap[k] * value
            share = tl.sigmoid(c)
            by_silu = next_out[i]
            if GATED:
                silu, row = c * share, first + step
                product = (silu * next_gate[i]).to(y.dtype.element_ty)
                tl.store(y + row * E + e, product, mask=is_own & (e < E))
                tl.store(dx + row * width + E + e, (by_silu * silu).to(dx.dtype.element_ty), mask=is_own & (e < E))
                by_silu *= next_gate[i]
            dc = _shifted(dc, by_silu * share * (1 + c * (1 - share)), K)
            counted = tl.where(is_own, dc[K - 1], 0.0)
            by_bias += counted
            sums, du = (), tl.zeros((W,), tl.float32)
            done = step - (K - 1)  # du of this step is complete
            for k in tl.static_range(K):
                sums = sums + (by_taps[k] + counted * read[k],)
                asked = dc[k]
                if PACKED:
                    asked = tl.where(done >= own[k], asked, 0.0)
                du += asked * tap[K - 1 - k]
            by_taps = sums
            inside = (done >= start) & (done < stop) & (e < E)
            if MASKED:
                du *= tl.load(shown + first + done, mask=(done >= start) & (done < stop), other=0).to(tl.float32)
            tl.store(dx + (first + done) * width + e, du.to(dx.dtype.element_ty), mask=inside)
    partial += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * E + e
    for k in tl.static_range(K):
        tl.store(partial + k * E, by_taps[k], mask=e < E)
    tl.store(partial + K * E, by_bias, mask=e < E)


@triton.jit
def _shifted(values, newest, K: tl.constexpr):
    """The last K - 1 of K values, and the newest."""
    found = ()
    for k in tl.static_range(1, K):
        found = found + (values[k],)
    return found + (newest,)
