"""The functions that the models are built on. Each has several backends, of which the fastest that can serve a call is
used.

Prefix linear attention is causal linear attention that starts from a state that is not zero: `encode_prefix` turns the
prefix into a state, `linear_attention` continues from any state, and decoding a token is the same call with T = 1.
`prefix_linear_attention` is the first two in one call.

Shapes: B batch, N packed sequences, T tokens, M prefix tokens, H heads, d query/key size, D value size, F = 1 + d + d
(d + 1) / 2 features.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from jrt.ops import backends, checks
from jrt.ops.call import Call
from jrt.ops.feature_map import State, feature_count, taylor_features
from jrt.ops.gated import gated_convolution_linear, silu_convolution, swiglu_linear
from jrt.ops.rotary import split_rotated
from jrt.ops.selective_scan import selective_scan
from jrt.ops.short_convolution import short_convolution
from jrt.ops.softmax_attention import softmax_attention

Backend = Literal["cuda", "triton", "chunked", "reference"]
BACKENDS = tuple(backends.TABLE)
__all__ = [
    "BACKENDS",
    "State",
    "encode_prefix",
    "feature_count",
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
    backend: Backend | None = None,
) -> tuple[Tensor, State]:
    """Causal linear attention with the Taylor feature map, from an optional state (paper equation 3).

        y_i = phi(q_i) (S_0 + sum_{j<=i} phi(k_j) v_j^T) / phi(q_i) . (z_0 + sum_{j<=i} phi(k_j))

    Args:
        q, k: (B, T, H, d), before the feature map.
        v: (B, T, H, D).
        initial_state: the state after earlier tokens, from `encode_prefix` or an earlier call; None: zero.
        mask: (B, T) bool, False where a token is padding. Its key and value may hold anything, even NaN, and change
            nothing. Its output has no meaning, and its query must be finite if gradients are wanted. None: no padding.
        log_decay: (H,) log of the factor by which the numerator's sum is multiplied at each token (the released
            Based-360M), finite; None: no decay.
        normalize: divide by the denominator; False gives the numerator.
        cu_seqlens: (N + 1,) int32 or int64, for N sequences packed into one row (B = 1): sequence n has the tokens
            cu_seqlens[n] to cu_seqlens[n + 1] - 1. States are then (N, H, F, D) and (N, H, F). On a GPU its values are
            not checked; the backends "chunked" and "reference" copy them to the host. Inside `torch.compile` these two
            take N times the time and memory.
        backend: "cuda" (Hopper kernels), "triton" (any GPU), "chunked" (PyTorch, any device) or "reference" (the
            definition, with memory in T^2); None takes the first of these that can serve the call.

    Returns:
        o (B, T, H, D) in the dtype of `v`, and the State after the last token, in fp32 (fp64 for fp64 inputs).

    Range: bf16, fp32 and fp64 are finite for entries of q and k up to 1,000. In fp16 outputs and gradients must
    themselves stay below its largest number, 65,504. "triton" has no other bound, nor has any backend on a CPU. "cuda"
    in fp16 needs entries of q and k up to 32, and sums over the text of k_i k_j, v and k_i k_j v below 16.8 million.
    "chunked" on a GPU rounds scores, states and outputs before the division to fp16: they must stay below 65,504.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend that was asked for cannot serve the call.
    """
    checks.keys_and_values(k, v, mask)
    checks.queries(q, k)
    checks.normalization(normalize)
    if log_decay is not None:
        checks.decay(log_decay, k)
    if cu_seqlens is not None:
        checks.packing(cu_seqlens, k)
    if initial_state is not None:
        checks.state(initial_state, k, v, cu_seqlens)
    call = Call(q, k, v, initial_state, mask, log_decay, normalize, cu_seqlens)
    return backends.choose(call, backend).linear_attention(call)


def encode_prefix(
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> State:
    """Encodes a prefix into the state from which `linear_attention` starts (paper equation 3, encoder sums).

        S = sum_j phi(k_j) v_j^T,  z = sum_j phi(k_j)

    Args:
        k: (B, M, H, d), before the feature map.
        v: (B, M, H, D).
        mask: (B, M) bool, False where a token is not part of the prefix; None: all are.
        cu_seqlens: (N + 1,), for N prefixes packed into one row, as in `linear_attention`.
        backend: as in `linear_attention`.

    Returns:
        State in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: as in `linear_attention`.
    """
    checks.keys_and_values(k, v, mask)
    if cu_seqlens is not None:
        checks.packing(cu_seqlens, k)
    call = Call(None, k, v, mask=mask, cu_seqlens=cu_seqlens)
    return backends.choose(call, backend).encode_prefix(call)


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
    backend: Backend | None = None,
) -> tuple[Tensor, State]:
    """Prefix linear attention (paper equation 3): reads a prefix without causal mask, then a text after it.

        state = encode_prefix(prefix_k, prefix_v, mask=prefix_mask)
        o, state = linear_attention(q, k, v, initial_state=state, mask=mask)

    It computes what these two calls do, in one operator forward and one backward.

    Args:
        q, k, v, mask, log_decay, normalize, backend: the text, as in `linear_attention`. The prefix does not decay.
        prefix_k: (B, M, H, d), before the feature map.
        prefix_v: (B, M, H, D).
        prefix_mask: (B, M) bool, False where a token is not part of the prefix; None: all are. A row may have none.
        cu_seqlens, prefix_cu_seqlens: (N + 1,) each, for N texts packed into one row and their N prefixes packed into
            another; both or neither.

    Returns:
        As `linear_attention`: o (B, T, H, D) and the State after the last token of the text.

    Raises:
        ValueError: as in `linear_attention`, or prefix and text do not fit together.
    """
    checks.keys_and_values(k, v, mask)
    checks.queries(q, k)
    checks.prefix(prefix_k, prefix_v, prefix_mask, k, v)
    checks.normalization(normalize)
    if log_decay is not None:
        checks.decay(log_decay, k)
    checks.packing_of_both(cu_seqlens, prefix_cu_seqlens, k, prefix_k)
    before = Call(None, prefix_k, prefix_v, mask=prefix_mask, cu_seqlens=prefix_cu_seqlens)
    call = Call(q, k, v, None, mask, log_decay, normalize, cu_seqlens, before)
    return backends.choose(call, backend).prefix_linear_attention(call)
