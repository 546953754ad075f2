"""The ops without a choice of backend: plain PyTorch, any device, nothing compiled and nothing registered.

`jrt.checkpoints.self_contained` puts these in place of `jrt.ops` into the modelling file of a self-contained folder, which must load
anywhere, and more than once in a process. Shapes and errors: `jrt.ops`, which the functions follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops.call import Call
from jrt.ops.chunked import encode_prefix as chunked_prefix
from jrt.ops.chunked import linear_attention as chunked_attention
from jrt.ops.feature_map import State
from jrt.ops.selective_scan import _chunked_forward as chunked_scan
from jrt.ops.selective_scan import _reference as stepwise_scan


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
    """Causal linear attention with the Taylor feature map, from an optional state."""
    return chunked_attention(Call(q, k, v, initial_state, mask, log_decay, normalize, cu_seqlens))


def encode_prefix(k: Tensor, v: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> State:
    """The state that a prefix leaves, every token of it seen by every later query."""
    return chunked_prefix(Call(None, k, v, mask=mask, cu_seqlens=cu_seqlens))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence; step by step where gradients are needed, in chunks elsewhere."""
    inputs = (u, delta, A, B, C, D, initial_state)
    if u.shape[1] == 1 or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        return stepwise_scan(*inputs)
    y, state, _ = chunked_scan(*inputs, keep=False)
    return y, state
