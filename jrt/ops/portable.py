"""The functions of `jrt.ops` in plain PyTorch, without a choice of backend and without registered operators.

This file takes the place of `jrt.ops` in a self-contained folder (`jrt.checkpoints.self_contained`), which must load on
any machine, and more than once in a process. It computes what `jrt.ops` computes on a CPU; arguments are documented
there, and not checked here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jrt.ops.attention_pytorch import softmax_attention
from jrt.ops.call import Call
from jrt.ops.chunked import encode_prefix as chunked_prefix
from jrt.ops.chunked import linear_attention as chunked_attention
from jrt.ops.chunked import prefix_linear_attention as chunked_prefix_attention
from jrt.ops.feature_map import State, taylor_features
from jrt.ops.gated_pytorch import gated_convolution_linear, silu_convolution, swiglu_linear
from jrt.ops.rotary_pytorch import split_rotated
from jrt.ops.selective_scan_pytorch import chunked_backward, chunked_forward, state_dtype, stepwise
from jrt.ops.short_convolution import short_convolution

__all__ = [
    "State",
    "encode_prefix",
    "gated_convolution_linear",
    "linear_attention",
    "prefix_linear_attention",
    "selective_scan",
    "short_convolution",
    "silu_convolution",
    "softmax_attention",
    "split_rotated",
    "swiglu_linear",
    "taylor_features",
]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: State | None = None,
    mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As `jrt.ops.linear_attention`."""
    return chunked_attention(Call(q, k, v, initial_state, mask, log_decay, normalize, cu_seqlens))


def encode_prefix(k: Tensor, v: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> State:
    """As `jrt.ops.encode_prefix`."""
    return chunked_prefix(Call(None, k, v, mask=mask, cu_seqlens=cu_seqlens))


def prefix_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    log_decay: Tensor | None = None,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    prefix_cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As `jrt.ops.prefix_linear_attention`."""
    before = Call(None, prefix_k, prefix_v, mask=prefix_mask, cu_seqlens=prefix_cu_seqlens)
    return chunked_prefix_attention(Call(q, k, v, None, mask, log_decay, normalize, cu_seqlens, before))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `jrt.ops.selective_scan`."""
    if delta_bias is not None:
        delta = F.softplus(delta.to(state_dtype(u, delta, A, B, C, D, delta_bias, initial_state)) + delta_bias)
    inputs = (u, delta, A, B, C, D, initial_state)
    y, state = stepwise(*inputs) if u.shape[1] == 1 else ChunkedScan.apply(*inputs)
    return y if gate is None else y * F.silu(gate), state


class ChunkedScan(torch.autograd.Function):
    """The scan in chunks; only the states between chunks are saved for the backward pass."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, initial_state) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        with torch.autocast(u.device.type, enabled=False):
            y, state, between = chunked_forward(u, delta, A, B, C, D, initial_state, keep)
        ctx.save_for_backward(u, delta, A, B, C, D, between)
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, between = ctx.saved_tensors
        skip = A.new_zeros(A.shape[0]) if D is None else D
        with torch.autocast(u.device.type, enabled=False):
            du, ddelta, dA, dB, dC, dD, dh = chunked_backward(u, delta, A, B, C, skip, between, dy, dstate)
        skipped = None if D is None else dD.to(D.dtype)
        before = None if ctx.state_dtype is None else dh.to(ctx.state_dtype)
        return du, ddelta, dA.to(A.dtype), dB, dC, skipped, before
