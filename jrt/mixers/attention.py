"""A, full attention, and S, sliding-window attention; both with rotary positions.

Shapes: B batch, T tokens, K keys, H heads, D head size, W earlier keys in a window. A row's own tokens are not padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from jrt.config import Config
from jrt.mixers.batch import TokenBatch
from jrt.ops import split_rotated

MIN_BLOCK = 64  # least queries of a block: matrix products with fewer use a GPU poorly


class KeyValues(NamedTuple):
    """Keys and values of earlier tokens, the newest last. A window always keeps W columns; those before the text are
    zero."""

    k: Tensor  # (B, K, H, D), rotated
    v: Tensor  # (B, K, H, D)


class Attention(nn.Module):
    """Softmax attention over all earlier tokens of the row."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = (config.width // config.heads) ** -0.5
        if config.inverse_layer_scale:
            self.scale /= layer + 1
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias="attention.qkv" in config.biases)
        self.out_proj = nn.Linear(config.width, config.width, bias="attention.out" in config.biases)

    def forward(self, x: Tensor, batch: TokenBatch, state: KeyValues | None) -> tuple[Tensor, KeyValues]:
        q, k, v = self.rotated(x, batch)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)  # (B, K, H, D)
        is_whole = batch.mask is None and state is None  # a whole text without padding: all keys are valid
        o = full_attention(q, k, v, None if is_whole else own_keys(batch, k.shape[1]), self.scale)
        return self.out_proj(o.flatten(2)), KeyValues(k, v)

    def rotated(self, x: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated by their positions, and values: (B, T, H, D) each."""
        qkv = self.Wqkv(x)  # (B, T, 3 H D)
        if batch.rotary is not None:
            return split_rotated(qkv, *batch.rotary, self.heads)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v


class WindowAttention(Attention):
    """Softmax attention over a query's own token and the W tokens before it."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.window = config.window_of(layer)

    def forward(self, x: Tensor, batch: TokenBatch, state: KeyValues | None) -> tuple[Tensor, KeyValues]:
        q, k, v = self.rotated(x, batch)
        if state is None and batch.mask is None and torch.compiler.is_compiling() and x.is_cuda and x.requires_grad:
            o = compiled_window_attention(q, k, v, self.window, self.scale)
            return self.out_proj(o.flatten(2)), KeyValues(*(_last_columns(y, self.window) for y in (k, v)))
        if state is None:
            empty = k.new_zeros(k.shape[0], self.window, *k.shape[2:])
            state = KeyValues(empty, empty)
        k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)  # (B, W + T, H, D)
        o = window_attention(q, k, v, own_keys(batch, k.shape[1]), self.window, self.scale)
        return self.out_proj(o.flatten(2)), KeyValues(k[:, x.shape[1] :], v[:, x.shape[1] :])


def own_keys(batch: TokenBatch, keys: int) -> Tensor:
    """(B, K) bool, True where one of the last K keys belongs to the row's own tokens. These are always the newest
    keys."""
    own = batch.positions[:, -1:] + 1  # (B, 1) own tokens up to now
    return torch.arange(keys, device=own.device) >= keys - own


def full_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Causal softmax attention; the last T of the K keys belong to the T queries.

    Args:
        q: (B, T, H, D); k, v: (B, K, H, D); valid: (B, K) bool or None for all.

    Returns:
        (B, T, H, D); a query that is itself padding sees at least itself, so that nothing becomes NaN.
    """
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if valid is not None and queries == 1:
        mask = valid[:, None, None, :]  # (B, 1, 1, K)
    elif valid is not None:
        age = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(
            keys, device=q.device
        )  # (T, K)
        mask = ((age >= 0) & valid[:, None, :] | (age == 0))[:, None]  # (B, 1, T, K)
    elif queries not in (keys, 1):
        raise AssertionError("keys of earlier calls always come with their valid columns")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or K, D)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1, scale=scale)
    return o.transpose(1, 2)


def window_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, window: int, scale: float) -> Tensor:
    """Softmax attention of query t over keys t to t + W; the keys begin W columns before the first query.

    Queries are computed in blocks, each with the keys of its block and the W before. So memory is linear in T.

    Args:
        q: (B, T, H, D); k, v: (B, W + T, H, D); valid: (B, W + T) bool.

    Returns:
        (B, T, H, D).
    """
    batch, length = q.shape[:2]
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


def _last_columns(x: Tensor, count: int) -> Tensor:
    """The last `count` columns of x (B, T, H, D); zeros come first if it has fewer."""
    missing = max(0, count - x.shape[1])
    return F.pad(x[:, max(0, x.shape[1] - count) :], (0, 0, 0, 0, missing, 0))


def rotary_angles(positions: Tensor, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, 1, ceil(dim / 2)) in fp32; exponents are 2 i / dim, for odd `dim` too (RoFormer, eq. 15)."""
    frequencies = base ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[..., None, None] * frequencies
    return angles.cos(), angles.sin()
