"""Softmax attention by the package flash-attn (https://github.com/Dao-AILab/flash-attention), where it is installed.

Its function has this project's layout (B, T, H, D), and its windows count as ours do: the query's own key and the W
before. In the backward pass it adds in an order that changes from run to run, unless
`torch.use_deterministic_algorithms` asks for the slower way.

The adapter is written to the signature of version 2.8. It is tested with a stand-in that computes the same in PyTorch
(tests/test_optional_packages.py); the package itself has not been run. PyTorch contains a build of the same kernels,
which `benchmarks/layers.py` measures as `varlen_attn`.

Shapes: B batch, T queries, K keys, H heads, D head size, W earlier keys in a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops import packages

PACKAGE, MODULE, NAME = "flash-attn", "flash_attn", "flash_attn_func"
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
LEAST_CAPABILITY = (8, 0)  # Ampere


def unsupported(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> str | None:
    """The reason why the package cannot serve the call; None if it can."""
    if reason := packages.unavailable(PACKAGE, MODULE, NAME, (q, k, v)):
        return reason
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it, and FlexAttention is faster there"
    if valid is not None or q.shape[1] != k.shape[1]:
        return "it serves whole texts without padding"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: expected bfloat16 or float16 for all three"
    if q.shape[-1] > LARGEST_HEAD:
        return f"head size {q.shape[-1]}: expected at most {LARGEST_HEAD}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < LEAST_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or more"
    return None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """`jrt.ops.softmax_attention`, for calls for which `unsupported` returns None."""
    o = packages.function(MODULE, NAME)(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return packages.once_differentiable(o, "the op with backend='sdpa'")
