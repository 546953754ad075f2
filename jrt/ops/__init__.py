"""The two functions that all models here are built on, and the choice of who computes them.

Prefix linear attention is causal linear attention that starts from a state which is not zero: `encode_prefix` reads the
prefix into a state, `linear_attention` goes on from any state, and one more token is the same call with T = 1.

Shapes: B batch, T tokens, M prefix tokens, H heads, d query/key size, D value size, F = 1 + d + d (d + 1) / 2 features.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from jrt.ops import checks, chunked, cuda, reference
from jrt.ops.feature_map import State, feature_count, taylor_features
from jrt.ops.selective_scan import selective_scan
from jrt.ops.short_convolution import short_convolution

Backend = Literal["reference", "chunked", "cuda"]
BACKENDS = ("reference", "chunked", "cuda")
__all__ = [
    "BACKENDS",
    "State",
    "encode_prefix",
    "feature_count",
    "linear_attention",
    "selective_scan",
    "short_convolution",
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
    backend: Backend | None = None,
) -> tuple[Tensor, State]:
    """Causal linear attention with the Taylor feature map, from an optional state (paper equation 3).

        y_i = phi(q_i) (S_0 + sum_{j<=i} phi(k_j) v_j^T) / phi(q_i) . (z_0 + sum_{j<=i} phi(k_j))

    Args:
        q, k: (B, T, H, d), before the feature map.
        v: (B, T, H, D).
        initial_state: what was read before, from `encode_prefix` or an earlier call; None: nothing.
        mask: (B, T) bool, False where a token is padding and must leave no trace; its own output means nothing. (The
            "cuda" backend needs finite keys and values there.)
        log_decay: (H,) log of the numerator's decay per token (the released Based-360M); None: no decay.
        normalize: divide by the denominator; False gives the numerator.
        backend: "reference" (T^2, the definition), "chunked" (PyTorch) or "cuda" (Hopper kernels, forward only);
            None takes the fastest that supports the call.

    Returns:
        o (B, T, H, D) in the dtype of `v`, and the State after the last token, in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend that was asked for cannot serve the call.
    """
    checks.keys_and_values(k, v, mask)
    checks.queries(q, k)
    if log_decay is not None:
        checks.decay(log_decay, k)
    if initial_state is not None:
        checks.state(initial_state, k, v)
    match _choose(backend, q, k, v, initial_state, mask, log_decay, normalize):
        case "cuda":
            return cuda.linear_attention(q, k, v, initial_state, mask, normalize)
        case "reference":
            return reference.linear_attention(q, *_kept(k, v, mask), initial_state, mask, log_decay, normalize)
        case _:
            return chunked.linear_attention(q, *_kept(k, v, mask), initial_state, mask, log_decay, normalize)


def encode_prefix(k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: Backend | None = None) -> State:
    """The first reading: the state that a prefix leaves, every token seen by every later query.

    Args:
        k: (B, M, H, d), before the feature map.
        v: (B, M, H, D).
        mask: (B, M) bool, False where a token is not part of the prefix.
        backend: as in `linear_attention`.

    Returns:
        State in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: as in `linear_attention`.
    """
    checks.keys_and_values(k, v, mask)
    match _choose(backend, k, k, v, None, mask, None, True):
        case "cuda":
            return cuda.encode_prefix(k, v, mask)
        case "reference":
            return reference.encode_prefix(*_kept(k, v, mask), mask)
        case _:
            return chunked.encode_prefix(*_kept(k, v, mask), mask)


def _choose(backend, q, k, v, initial_state, mask, log_decay, normalize) -> Backend:
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend {backend!r}: expected one of {BACKENDS}, or None for the fastest")
    if backend in ("reference", "chunked"):
        return backend
    reason = cuda.unsupported(q, k, v, initial_state, mask, log_decay, normalize)
    if backend == "cuda" and reason is not None:
        raise ValueError(f"backend 'cuda' cannot serve this call: {reason}")
    return "chunked" if reason else "cuda"


def _kept(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values without those of padding, which may hold anything: 0 times NaN would be NaN."""
    if mask is None:
        return k, v
    padding = ~mask[:, :, None, None]
    return k.masked_fill(padding, 0), v.masked_fill(padding, 0)
