"""The states of a text during decoding, in buffers with fixed addresses, which a captured step updates in place.

`load` copies a state of `jrt.cache`, as prefill returns it, into the buffers. `export` copies it back, so that any
later call can continue from it.

Shapes: B batch, K taps, E channels, H heads, D head size, R columns of a ring, F features, N states a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.cache import LayerState
from jrt.config import Config
from jrt.mixers.attention import KeyValues
from jrt.mixers.mamba import MambaState
from jrt.ops import State
from jrt.ops.feature_map import feature_count


@dataclass
class Position:
    """The position of the next token; all layers share it."""

    column: Tensor  # (1,) int64: columns read so far, padding included
    pads: Tensor  # (B,) int64: columns before each row's first own token
    seen: int = 0  # the same number as `column`, on the host
    filled: int = 0  # columns by which a prompt was filled up (`jrt.short_prompts`); `generate` does not count them

    def load(self, seen: int, lengths: Tensor, filled: int = 0) -> None:
        self.seen, self.filled = seen + filled, filled
        self.column.fill_(self.seen)
        self.pads.copy_(self.seen - lengths)

    def lengths(self) -> Tensor:
        """(B,) own tokens of each row so far."""
        return self.seen - self.pads


class ConvolutionInputs:
    """The last K - 1 inputs of a short convolution, the newest last."""

    def __init__(self, rows: int, taps: int, channels: int, like: Tensor) -> None:
        self.inputs = like.new_zeros(rows, taps - 1, channels)

    def load(self, state: LayerState, position: Position) -> None:
        assert isinstance(state, Tensor)
        self.inputs.copy_(state)

    def export(self, position: Position) -> Tensor:
        return self.inputs.clone()


class LinearSums:
    """S and z of linear attention (`jrt.ops.State`). There are `copies` equal copies of z: each program of the Triton
    kernel updates its own (`jrt.ops.steps.linear_attention`)."""

    def __init__(self, rows: int, heads: int, d: int, value_dim: int, copies: int, like: Tensor) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self.S = like.new_zeros(rows, heads, feature_count(d), value_dim, dtype=wide)
        self.z = like.new_zeros(rows, heads, copies, feature_count(d), dtype=wide)

    def load(self, state: LayerState, position: Position) -> None:
        S, z = state
        self.S.copy_(S)
        self.z.copy_(z[:, :, None])

    def export(self, position: Position) -> State:
        return State(self.S.clone(), self.z[:, :, 0].clone())


class KeyRing:
    """Keys and values of attention in a ring buffer: the token at column t is stored at column t mod R."""

    def __init__(self, rows: int, heads: int, ring: int, head_dim: int, window: int | None, like: Tensor) -> None:
        self.k = like.new_zeros(rows, heads, ring, head_dim)
        self.v = torch.zeros_like(self.k)
        self.window = window  # earlier keys that a prefilled state holds; None: all

    def load(self, state: LayerState, position: Position) -> None:
        k, v = state
        count = min(k.shape[1], position.seen)  # a window's zero columns before the text are not copied
        places = torch.arange(position.seen - count, position.seen, device=k.device) % self.k.shape[2]
        for ring, given in ((self.k, k), (self.v, v)):
            ring.zero_()  # unused columns are multiplied by zero in masked sums, and 0 times NaN would be NaN
            ring.index_copy_(2, places, given[:, k.shape[1] - count :].transpose(1, 2).to(ring.dtype))

    def export(self, position: Position) -> KeyValues:
        seen, length = position.seen, position.seen if self.window is None else self.window
        count = min(length, seen)
        places = torch.arange(seen - count, seen, device=self.k.device) % self.k.shape[2]
        k, v = (ring.index_select(2, places).transpose(1, 2) for ring in (self.k, self.v))  # (B, count, H, D)
        return KeyValues(*(F.pad(x, (0, 0, 0, 0, length - count, 0)).contiguous() for x in (k, v)))


class MambaSums:
    """The convolution's last inputs and the state of the scan."""

    def __init__(self, rows: int, config: Config, like: Tensor) -> None:
        channels = config.mamba_expand * config.width
        wide = torch.promote_types(like.dtype, torch.float32)
        self.inputs = like.new_zeros(rows, config.mamba_kernel - 1, channels)
        self.h = like.new_zeros(rows, channels, config.state_dim, dtype=wide)

    def load(self, state: LayerState, position: Position) -> None:
        conv, h = state
        self.inputs.copy_(conv)
        self.h.copy_(h)

    def export(self, position: Position) -> MambaState:
        return MambaState(self.inputs.clone(), self.h.clone())


LayerBuffers = ConvolutionInputs | LinearSums | KeyRing | MambaSums
