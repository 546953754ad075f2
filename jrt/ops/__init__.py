"""The two functions that all models here are built on, and the choice of who computes them.

Prefix linear attention is causal linear attention that starts from a state which is not zero: `encode_prefix` reads the
prefix into a state, `linear_attention` goes on from any state, and one more token is the same call with T = 1.

Shapes: B batch, T tokens, M prefix tokens, H heads, d query/key size, D value size, F = 1 + d + d (d + 1) / 2 features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from jrt.ops import chunked, cuda, reference
from jrt.ops.feature_map import State, feature_count, taylor_features
from jrt.ops.selective_scan import selective_scan
from jrt.ops.short_convolution import short_convolution

Backend = Literal["reference", "chunked", "cuda"]
BACKENDS = ("reference", "chunked", "cuda")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    _check_keys_and_values(k, v, mask)
    _check_tensor("q", q)
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected that of k, {tuple(k.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q is {q.dtype} on {q.device}; expected {k.dtype} on {k.device}, as k")
    if log_decay is not None:
        _check_tensor("log_decay", log_decay, k.device)
        if log_decay.shape != (k.shape[2],):
            raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; expected (H,) = ({k.shape[2]},)")
    if initial_state is not None:
        _check_state(initial_state, k, v)
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
    _check_keys_and_values(k, v, mask)
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


def _check_tensor(name: str, x: object, device: torch.device | None = None) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, as k")


def _check_keys_and_values(k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    _check_tensor("k", k)
    _check_tensor("v", v)
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"expected k (B, T, H, d) and v (B, T, H, D), got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k has (B, T, H) = {tuple(k.shape[:3])} and v {tuple(v.shape[:3])}; expected the same")
    if 0 in k.shape or 0 in v.shape:
        raise ValueError(f"expected at least one token, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if k.dtype not in FLOATING or v.dtype not in FLOATING:
        raise ValueError(f"expected floating-point k and v of 16 bits or more, got {k.dtype} and {v.dtype}")
    if k.device != v.device or k.dtype != v.dtype:
        raise ValueError(f"v is {v.dtype} on {v.device}; expected {k.dtype} on {k.device}, as k")
    if mask is None:
        return
    _check_tensor("mask", mask, k.device)
    if mask.shape != k.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected (B, T) = {tuple(k.shape[:2])}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; expected torch.bool, False where a token is padding")


def _check_state(state: State, k: Tensor, v: Tensor) -> None:
    if not isinstance(state, State):
        raise ValueError(f"initial_state is a {type(state).__name__}; expected a jrt.ops.State(S, z), or None")
    for name, part in zip(("S", "z"), state, strict=True):
        _check_tensor(f"initial_state.{name}", part, k.device)
        if part.dtype not in FLOATING:
            raise ValueError(f"initial_state.{name} is {part.dtype}; expected a floating-point dtype")
    batch, _, heads, d = k.shape
    expected = (batch, heads, feature_count(d), v.shape[-1])
    if tuple(state.S.shape) != expected or tuple(state.z.shape) != expected[:3]:
        raise ValueError(
            f"initial_state has S {tuple(state.S.shape)} and z {tuple(state.z.shape)}; "
            f"expected (B, H, F, D) = {expected} and (B, H, F): is it from another model?"
        )
