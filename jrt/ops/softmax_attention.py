"""Causal softmax attention, full or with a sliding window. Three backends compute it:

    flash-attn   the package, where it is installed, on a GPU (`flash_attention`)
    flex         PyTorch's FlexAttention: windows in compiled training on a GPU (`attention_pytorch`)
    sdpa         PyTorch's scaled_dot_product_attention, anywhere; windows in blocks of queries (`attention_pytorch`)

Windows take the first that can serve a call: outside torch.compile, blocks take three times as long as FlashAttention-2
(benchmarks/layers.py, where PyTorch's own build of it stands for the package). Full attention takes "sdpa", which
has FlashAttention-2 and the faster cuDNN among its kernels (benchmarks/op_training.py).

Shapes: B batch, T queries, K keys, H heads, D head size, W earlier keys in a window.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from jrt.ops import attention_pytorch, checks, flash_attention
from jrt.ops.choice import choose

BACKENDS = ("flash-attn", "flex", "sdpa")
FULL_BACKENDS = ("sdpa", "flash-attn", "flex")


class Call(NamedTuple):
    q: Tensor  # (B, T, H, D)
    k: Tensor  # (B, K, H, D)
    v: Tensor
    scale: float
    window: int | None
    valid: Tensor | None  # (B, K) bool


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of each query over its own key and the earlier ones.

    Args:
        q: (B, T, H, D).
        k, v: (B, K, H, D); the last T of the K keys belong to the queries.
        scale: factor of the products of queries and keys.
        window: W, how many earlier keys a query sees, at least 0, with K at most W + T; None: all.
        valid: (B, K) bool, False for keys that no query but its own may see, because they are padding; None: all are
            seen. Full attention needs it if there are more keys than queries and more than one query.
        backend: "flash-attn", "flex" or "sdpa"; None takes the fastest that can serve the call.

    Returns:
        (B, T, H, D). A query that is itself padding sees at least itself, so that nothing becomes NaN.

    Raises:
        ValueError: shapes do not fit, or the backend that was asked for cannot serve the call.
    """
    checks.attention(q, k, v, window, valid)
    call = Call(q, k, v, scale, window, valid)
    order = FULL_BACKENDS if window is None else BACKENDS
    chosen = choose(backend, order, lambda name: unsupported(name, call))
    if chosen == "flash-attn":
        return flash_attention.softmax_attention(q, k, v, scale, window)
    if window is None:
        return attention_pytorch.full_attention(q, k, v, valid, scale)
    if chosen == "flex":
        return attention_pytorch.compiled_window_attention(q, k, v, window, scale)
    return attention_pytorch.window_attention(q, k, v, valid, window, scale)


def unsupported(backend: str, call: Call) -> str | None:
    """The reason why a backend cannot serve the call; None if it can."""
    q, k, v, _, window, valid = call
    if backend == "flash-attn":
        return flash_attention.unsupported(q, k, v, valid)
    if backend == "flex":
        return attention_pytorch.flex_unsupported(q, k, window, valid)
    return None
