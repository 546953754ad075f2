"""Triton kernels of the selective scan: T is cut into short chunks that run in parallel, forward and backward.

Forward has three kernels: (1) the state that each chunk would reach from zero; (2) from these, chunk after chunk, the
state from which each chunk really starts; (3) the outputs. Backward has the same three for g, the gradient of the loss
with respect to the states, from the last chunk to the first. Only the states between chunks are saved for the backward
pass, which computes the others again.

A thread has two channels. It takes the N states one after the other, and computes the recurrence of its chunk in
registers. Threads exchange numbers only for the sums over channels in dB and dC. (An associative scan over a tile of
steps and channels compiled to four times the instructions.) dA, dB, dC and dD are summed from partial sums in memory
without atomic additions, so that results are bit for bit reproducible. All arithmetic is fp32.

Shapes: B batch, T steps, E channels, N states a channel, K chunks, L steps of a chunk, W channels of a program.
"""
# ruff: noqa: RUF005 - Triton's compiler knows no unpacking inside a tuple
# mypy: disable-error-code="assignment"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels of a program, which is one warp with two channels a thread: sums over channels stay inside the warp.
WIDTH = 64
CARRY_WIDTH = 128  # pairs of channel and state of a program of kernel (2)
CARRY_AHEAD = 8  # chunks that such a program loads at once, ahead of their use


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    length: int,
    width: int = WIDTH,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, E), final state (B, E, N) and the states before each chunk of `length` steps (B, K, N, E), both fp32."""
    (batch, steps, channels), states = u.shape, A.shape[1]
    chunks = triton.cdiv(steps, length)
    u, delta = u.contiguous(), delta.contiguous()
    B, C = (_whole_chunks(x, chunks * length) for x in (B, C))
    rates = _rates(A)
    skip = rates.new_zeros(channels) if D is None else D.float().contiguous()
    start = rates.new_zeros(batch, channels, states) if initial_state is None else initial_state.float().contiguous()
    between = rates.new_empty(batch, chunks, states, channels)
    span = rates.new_empty(batch, chunks, channels)  # a chunk's whole time, the sum of its deltas
    final = torch.empty_like(start)
    y = torch.empty_like(u)
    sizes = {"T": steps, "E": channels, "K": chunks, "N": states, "L": length, "W": width}
    grid = (triton.cdiv(channels, width), chunks, batch)
    with torch.cuda.device_of(u):
        _chunk_state_kernel[grid](u, delta, rates, B, between, span, **sizes, num_warps=1)
        _carry(between, span, rates, start, final, reverse=False)
        _output_kernel[grid](u, delta, rates, B, C, skip, between, y, **sizes, num_warps=1)
    return y, final, between


def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    between: Tensor,
    dy: Tensor,
    dstate: Tensor,
    length: int,
    width: int = WIDTH,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D and the initial state from those of y and the final state."""
    (batch, steps, channels), states = u.shape, A.shape[1]
    chunks, slices = triton.cdiv(steps, length), triton.cdiv(channels, width)
    u, delta, dy = (x.contiguous() for x in (u, delta, dy))
    writes, reads = (_whole_chunks(x, chunks * length) for x in (B, C))
    rates, start = _rates(A), dstate.float().contiguous()
    dbetween = torch.empty_like(between)  # gradient with respect to the state after each chunk
    span = rates.new_empty(batch, chunks, channels)
    dinitial = torch.empty_like(start)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dA = torch.empty_like(between)  # (B, K, N, E)
    dD = rates.new_empty(batch, chunks, channels)
    dB, dC = (rates.new_empty(slices, *x.shape) for x in (writes, reads))
    sizes = {"T": steps, "E": channels, "K": chunks, "N": states, "L": length, "W": width}
    grid = (slices, chunks, batch)
    with torch.cuda.device_of(u):
        _chunk_gradient_kernel[grid](dy, delta, rates, reads, dbetween, span, **sizes, num_warps=1)
        _carry(dbetween, span, rates, start, dinitial, reverse=True)
        tensors = (u, delta, rates, writes, reads, D.float().contiguous(), between, dy, dbetween)
        gradients = (du, ddelta, dA, dB, dC, dD)
        _gradient_kernel[grid](*tensors, *gradients, **sizes, num_warps=1)
    dA, dD = dA.sum((0, 1)).mT.contiguous(), dD.sum((0, 1))  # (E, N), (E,)
    dB, dC = (x.sum(0)[:, :steps].to(like.dtype).contiguous() for x, like in ((dB, B), (dC, C)))  # (B, T, N)
    return du, ddelta, dA, dB, dC, dD, dinitial


def _rates(A: Tensor) -> Tensor:
    """A for exp2 and with channels last, (N, E): exp(delta A) = exp2(delta rate)."""
    return (A.float() * math.log2(math.e)).mT.contiguous()


def _whole_chunks(x: Tensor, steps: int) -> Tensor:
    """B or C (B, T, N) in fp32 with zeros up to the end of the last chunk: the inner loops then need no masks."""
    return torch.nn.functional.pad(x.float(), (0, 0, 0, steps - x.shape[1])).contiguous()


def _carry(between: Tensor, span: Tensor, rates: Tensor, start: Tensor, end: Tensor, reverse: bool) -> None:
    batch, chunks, states, channels = between.shape
    grid = (triton.cdiv(states * channels, CARRY_WIDTH), batch)
    sizes = {"E": channels, "K": chunks, "N": states, "REVERSE": reverse, "AHEAD": CARRY_AHEAD, "W": CARRY_WIDTH}
    _carry_kernel[grid](between, span, rates, start, end, **sizes, num_warps=CARRY_WIDTH // 32)


@triton.jit
def _place(E, K, L: tl.constexpr, W: tl.constexpr):
    """A program's channels (W,), its first step, its batch row and its chunk among all B K of them."""
    b = tl.program_id(2).to(tl.int64)
    k = tl.program_id(1)
    return tl.program_id(0) * W + tl.arange(0, W), k * L, b, b * K + k


@triton.jit
def _load_steps(x, first, e, T, E, L: tl.constexpr):
    """A chunk of x (T, E) from its first step on: a tuple of L vectors (W,) in fp32, zero beyond the end."""
    steps = ()
    for j in tl.static_range(L):
        inside = e < tl.where(first + j < T, E, 0)
        steps = steps + (tl.load(x + (first + j) * E + e, mask=inside, other=0.0).to(tl.float32),)
    return steps


@triton.jit
def _multiply(x, y, L: tl.constexpr):
    products = ()
    for j in tl.static_range(L):
        products = products + (x[j] * y[j],)
    return products


@triton.jit
def _sum(x, L: tl.constexpr):
    total = x[0]
    for j in tl.static_range(1, L):
        total += x[j]
    return total


@triton.jit(do_not_specialize=["T", "K"])
def _chunk_state_kernel(u, delta, rates, B, between, span, T, E, K, N: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    """The state that a chunk reaches from zero, and the sum of its step sizes."""
    e, first, b, chunk = _place(E, K, L, W)
    step = _load_steps(delta + b * T * E, first, e, T, E, L)
    x = _multiply(step, _load_steps(u + b * T * E, first, e, T, E, L), L)
    tl.store(span + chunk * E + e, _sum(step, L), mask=e < E)
    B += chunk * L * N
    for n in range(N):
        rate = tl.load(rates + n * E + e, mask=e < E, other=0.0)
        h = tl.zeros((W,), tl.float32)
        for j in tl.static_range(L):
            h = tl.exp2(step[j] * rate) * h + x[j] * tl.load(B + n + j * N)
        tl.store(between + (chunk * N + n) * E + e, h, mask=e < E)


@triton.jit(do_not_specialize=["T", "K"])
def _chunk_gradient_kernel(
    dy, delta, rates, C, dbetween, span, T, E, K, N: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    """The gradient with respect to the state before a chunk, through the chunk's own outputs."""
    e, first, b, chunk = _place(E, K, L, W)
    step = _load_steps(delta + b * T * E, first, e, T, E, L)
    out = _load_steps(dy + b * T * E, first, e, T, E, L)
    tl.store(span + chunk * E + e, _sum(step, L), mask=e < E)
    C += chunk * L * N
    for n in range(N):
        rate = tl.load(rates + n * E + e, mask=e < E, other=0.0)
        g = tl.zeros((W,), tl.float32)
        for j in tl.static_range(L - 1, -1, -1):
            g = tl.exp2(step[j] * rate) * (g + out[j] * tl.load(C + n + j * N))
        tl.store(dbetween + (chunk * N + n) * E + e, g, mask=e < E)


@triton.jit(do_not_specialize=["K"])
def _carry_kernel(
    between, span, rates, start, end, E, K, N: tl.constexpr,
    REVERSE: tl.constexpr, AHEAD: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Replaces, in place, each chunk's own contribution by the state before it (with REVERSE: the gradient after
    it)."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * W + tl.arange(0, W)  # n * E + e
    n = i // E
    e = i - n * E
    rate = tl.load(rates + i, mask=i < N * E, other=0.0)
    carry = tl.load(start + (b * E + e) * N + n, mask=i < N * E, other=0.0)
    for first in range(0, K, AHEAD):
        own = ()
        decay = ()
        for j in tl.static_range(AHEAD):
            k = b * K + (K - 1 - first - j if REVERSE else first + j)
            inside = i < tl.where(first + j < K, N * E, 0)
            own = own + (tl.load(between + k * N * E + i, mask=inside, other=0.0),)
            decay = decay + (tl.exp2(tl.load(span + k * E + e, mask=inside, other=0.0) * rate),)
        for j in tl.static_range(AHEAD):
            k = b * K + (K - 1 - first - j if REVERSE else first + j)
            tl.store(between + k * N * E + i, carry, mask=i < tl.where(first + j < K, N * E, 0))
            carry = decay[j] * carry + own[j]
    tl.store(end + (b * E + e) * N + n, carry, mask=i < N * E)


@triton.jit(do_not_specialize=["T", "K"])
def _output_kernel(u, delta, rates, B, C, D, between, y, T, E, K, N: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    e, first, b, chunk = _place(E, K, L, W)
    step = _load_steps(delta + b * T * E, first, e, T, E, L)
    token = _load_steps(u + b * T * E, first, e, T, E, L)
    x = _multiply(step, token, L)
    skip = tl.load(D + e, mask=e < E, other=0.0)
    out = ()
    for j in tl.static_range(L):
        out = out + (skip * token[j],)
    B += chunk * L * N
    C += chunk * L * N
    for n in range(N):
        rate = tl.load(rates + n * E + e, mask=e < E, other=0.0)
        h = tl.load(between + (chunk * N + n) * E + e, mask=e < E, other=0.0)
        more = ()
        for j in tl.static_range(L):
            h = tl.exp2(step[j] * rate) * h + x[j] * tl.load(B + n + j * N)
            more = more + (out[j] + h * tl.load(C + n + j * N),)
        out = more
    y += b * T * E
    for j in tl.static_range(L):
        inside = e < tl.where(first + j < T, E, 0)
        tl.store(y + (first + j) * E + e, out[j].to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "K"])
def _gradient_kernel(
    u, delta, rates, B, C, D, between, dy, dbetween, du, ddelta, dA, dB, dC, dD,
    T, E, K, N: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Computes the chunk's states again, then backwards g_t = C_t dy_t + a_{t+1} g_{t+1} with a_t = exp(delta_t A).

    The gradient with respect to delta_t A is g_t a_t h_{t-1}, and with respect to delta_t u_t the sum of g_t B_t over
    n.
    """
    e, first, b, chunk = _place(E, K, L, W)
    step = _load_steps(delta + b * T * E, first, e, T, E, L)
    x = _multiply(step, _load_steps(u + b * T * E, first, e, T, E, L), L)
    out = _load_steps(dy + b * T * E, first, e, T, E, L)
    by_input = ()
    by_decay = ()
    for _ in tl.static_range(L):
        by_input = by_input + (tl.zeros((W,), tl.float32),)
        by_decay = by_decay + (tl.zeros((W,), tl.float32),)
    partial = (tl.program_id(0) * tl.num_programs(2) * K + chunk) * L * N  # in (slices, B, K L, N)
    B += chunk * L * N
    C += chunk * L * N
    dB += partial
    dC += partial
    for n in range(N):
        edge = (chunk * N + n) * E + e
        rate = tl.load(rates + n * E + e, mask=e < E, other=0.0)
        h = tl.load(between + edge, mask=e < E, other=0.0)
        decay = ()
        kept = ()  # a_t h_{t-1}
        for j in tl.static_range(L):
            decay = decay + (tl.exp2(step[j] * rate),)
            kept = kept + (decay[j] * h,)
            h = kept[j] + x[j] * tl.load(B + n + j * N)
            tl.store(dC + n + j * N, tl.sum(out[j] * h, 0))

        g = tl.load(dbetween + edge, mask=e < E, other=0.0)
        by_rate = tl.zeros((W,), tl.float32)
        new_input = ()
        new_decay = ()
        for j in tl.static_range(L - 1, -1, -1):
            g += out[j] * tl.load(C + n + j * N)
            tl.store(dB + n + j * N, tl.sum(g * x[j], 0))
            through = g * kept[j]
            by_rate += through * step[j]
            new_decay = (by_decay[j] + through * rate,) + new_decay
            new_input = (by_input[j] + g * tl.load(B + n + j * N),) + new_input
            g *= decay[j]
        tl.store(dA + edge, by_rate, mask=e < E)
        by_input = new_input
        by_decay = new_decay

    token = _load_steps(u + b * T * E, first, e, T, E, L)
    tl.store(dD + chunk * E + e, _sum(_multiply(out, token, L), L), mask=e < E)
    skip = tl.load(D + e, mask=e < E, other=0.0)
    du += b * T * E
    ddelta += b * T * E
    for j in tl.static_range(L):
        here = (first + j) * E + e
        inside = e < tl.where(first + j < T, E, 0)
        tl.store(du + here, (by_input[j] * step[j] + skip * out[j]).to(du.dtype.element_ty), mask=inside)
        # by_decay was summed against A log2(e)
        by_step = by_input[j] * token[j] + by_decay[j] * 0.6931471805599453
        tl.store(ddelta + here, by_step.to(ddelta.dtype.element_ty), mask=inside)
