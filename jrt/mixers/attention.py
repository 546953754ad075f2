"""A, full attention, and S, sliding-window attention; both with rotary positions.

Shapes: B batch, T tokens, K keys, H heads, D head size, W earlier keys in a window. A row's own tokens are not padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrt.config import Config
from jrt.mixers.batch import TokenBatch
from jrt.ops import softmax_attention, split_rotated


class KeyValues(NamedTuple):
    """Keys and values of earlier tokens, the newest last. A window always keeps W columns; those before the text are
    zero."""

    k: Tensor  # (B, K, H, D), rotated
    v: Tensor  # (B, K, H, D)


class Attention(nn.Module):
    """Softmax attention over all earlier tokens of the row."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.window: int | None = None  # W; None: a query sees all earlier tokens
        self.heads = config.heads
        self.scale = (config.width // config.heads) ** -0.5
        if config.inverse_layer_scale:
            self.scale /= layer + 1
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias="attention.qkv" in config.biases)
        self.out_proj = nn.Linear(config.width, config.width, bias="attention.out" in config.biases)

    def forward(self, x: Tensor, batch: TokenBatch, state: KeyValues | None) -> tuple[Tensor, KeyValues]:
        q, k, v = self.rotated(x, batch)
        is_whole = batch.mask is None and state is None  # a whole text without padding: all keys are valid
        if state is not None:
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)  # (B, K, H, D)
        elif self.window is None:
            k, v = k.contiguous(), v.contiguous()  # as views they would keep queries alive as long as the state
        valid = None if is_whole else own_keys(batch, k.shape[1])
        o = softmax_attention(q, k, v, scale=self.scale, window=self.window, valid=valid)
        if self.window is not None:
            k, v = _last_columns(k, self.window), _last_columns(v, self.window)
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


def own_keys(batch: TokenBatch, keys: int) -> Tensor:
    """(B, K) bool, True where one of the last K keys belongs to the row's own tokens. These are always the newest
    keys."""
    own = batch.positions[:, -1:] + 1  # (B, 1) own tokens up to now
    return torch.arange(keys, device=own.device) >= keys - own


def _last_columns(x: Tensor, count: int) -> Tensor:
    """A copy of the last `count` columns of x (B, T, H, D); zeros come first if it has fewer."""
    missing = max(0, count - x.shape[1])
    return F.pad(x[:, max(0, x.shape[1] - count) :], (0, 0, 0, 0, missing, 0))


def rotary_angles(positions: Tensor, dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, 1, ceil(dim / 2)) in fp32; exponents are 2 i / dim, for odd `dim` too (RoFormer, eq. 15)."""
    frequencies = base ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[..., None, None] * frequencies
    return angles.cos(), angles.sin()
