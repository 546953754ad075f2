"""Causal softmax attention, full and with a sliding window, in PyTorch.

Shapes: B batch, T queries, K keys, H heads, D head size, W earlier keys in a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

MIN_BLOCK = 64  # least queries of a block: matrix products with fewer use a GPU poorly


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, valid: Tensor | None = None
) -> Tensor:
    """As `jrt.ops.softmax_attention`, by PyTorch."""
    if window is None:
        return full_attention(q, k, v, valid, scale)
    if flex_unsupported(q, k, window, valid) is None:
        return compiled_window_attention(q, k, v, window, scale)
    return window_attention(q, k, v, valid, window, scale)


def flex_unsupported(q: Tensor, k: Tensor, window: int | None, valid: Tensor | None) -> str | None:
    """The reason why `compiled_window_attention` does not serve a call; None if it does."""
    if not torch.compiler.is_compiling():
        return "FlexAttention is a fast kernel inside torch.compile only"
    if not (q.is_cuda and q.requires_grad):
        return "it is for training on a GPU"
    if window is None or valid is not None or q.shape[1] != k.shape[1]:
        return "it is for windows over whole texts without padding"
    return None


def full_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Causal softmax attention; the last T of the K keys belong to the T queries.

    Args:
        q: (B, T, H, D); k, v: (B, K, H, D); valid: (B, K) bool or None for all.

    Returns:
        (B, T, H, D); a query that is itself padding sees at least itself, so that nothing becomes NaN.
    """
    queries, keys = q.shape[1], k.shape[1]
    mask, is_causal = None, False
    if valid is not None and queries == 1:
        mask = F.pad(valid[:, :-1], (0, 1), value=True)[:, None, None]  # (B, 1, 1, K)
    elif valid is not None:
        column = torch.arange(keys, device=q.device)
        age = column[keys - queries :, None] - column  # (T, K)
        mask = ((age >= 0) & valid[:, None, :] | (age == 0))[:, None]  # (B, 1, T, K)
    elif queries > 1:  # a branch, because torch.compile has no plain bool for a comparison of lengths
        assert queries == keys, "keys of earlier calls always come with their valid columns"
        is_causal = True
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or K, D)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return o.transpose(1, 2)


def window_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int, scale: float) -> Tensor:
    """Softmax attention of each query over its own key and the W before.

    Queries are computed in blocks, each with the keys of its block and the W before. So memory is linear in T.

    Args:
        q: (B, T, H, D); k, v: (B, K, H, D) with T <= K <= W + T, of which the last T belong to the queries.
        valid: (B, K) bool, or None for all.

    Returns:
        (B, T, H, D).
    """
    batch, length = q.shape[:2]
    missing = window + length - k.shape[1]  # columns before the first key
    valid = valid if valid is not None else torch.ones(1, 1, dtype=torch.bool, device=q.device).expand(k.shape[:2])
    k, v = (F.pad(x, (0, 0, 0, 0, missing, 0)) for x in (k, v))  # (B, W + T, H, D)
    valid = F.pad(valid, (missing, 0))
    if length == 1:
        return full_attention(q, k, v, valid, scale)
    block = min(max(window, MIN_BLOCK), length)
    padding = -length % block
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
        valid = F.pad(valid, (0, padding))
    q = rearrange(q, "b (n i) h d -> (b n) h i d", i=block)
    k, v = (rearrange(x.unfold(1, window + block, block), "b n h d j -> (b n) h j d") for x in (k, v))
    offset = torch.arange(window + block, device=q.device) - torch.arange(block, device=q.device)[:, None]
    near, itself = (offset >= 0) & (offset <= window), offset == window  # (block, W + block)
    shown = rearrange(valid.unfold(1, window + block, block), "b n j -> (b n) 1 1 j")
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=near & shown | itself, scale=scale)
    return rearrange(o, "(b n) h i d -> b (n i) h d", b=batch)[:, :length]


def compiled_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """As `window_attention`, for a whole text without padding, in training under torch.compile.

    FlexAttention becomes a kernel that skips blocks outside of the window (`python benchmarks/layers.py` times it).

    Args:
        q, k, v: (B, T, H, D).

    Returns:
        (B, T, H, D).
    """

    def is_shown(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= window)

    length = q.shape[1]
    mask = create_block_mask(is_shown, None, None, length, length, device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    o = flex_attention(q, k, v, block_mask=mask, scale=scale)
    assert isinstance(o, Tensor)
    return o.transpose(1, 2)
