"""L, causal linear attention (Based), and P, prefix linear attention (JRT-RNN).

Shapes: B batch, T tokens, M prefix columns, E width, H heads, d feature_dim, D = E / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jrt.config import Config
from jrt.mixers.reading import Reading
from jrt.ops import State, encode_prefix, linear_attention, taylor_features


class LinearAttention(nn.Module):
    """Based's mixer: queries, keys and values without rotation, the Taylor feature map, no softmax."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.heads = config.linear_heads
        self.has_gain = config.decay_projection
        self.has_decay = config.decay_const is not None and self.has_gain
        self.key_gain = (config.feature_dim / config.feature_scale) ** 0.25 if config.feature_scale else 1.0
        keys = config.linear_heads * config.feature_dim
        self.proj_q = nn.Linear(config.width, keys, bias=False)
        self.proj_k = nn.Linear(config.width, keys, bias=False)
        self.proj_v = nn.Linear(config.width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        if config.decay_projection:
            self.decay_proj = nn.Linear(config.width, config.linear_heads, bias=False)

    def forward(self, x: Tensor, reading: Reading, state: State | None) -> tuple[Tensor, State]:
        q, k = self.heads_of(self.proj_q(x)) * self.key_gain, self.heads_of(self.proj_k(x)) * self.key_gain
        v = self.heads_of(self.proj_v(x))
        is_step = state is not None and x.shape[1] == 1
        by_step = is_step and reading.quirks.decay_in_steps
        if reading.quirks.double_add and is_step:
            state = _added_once_more(k, v, state)
        log_decay = reading.log_decay if self.has_decay or by_step else None
        o, after = linear_attention(q, k, v, initial_state=state, mask=reading.mask, log_decay=log_decay)
        if reading.quirks.decay_in_steps and reading.log_decay is not None and log_decay is None:
            _, after = linear_attention(q, k, v, initial_state=state, mask=reading.mask, log_decay=reading.log_decay)
        state = after
        if self.has_decay or (by_step and self.has_gain):
            o = o * self.decay_proj(x)[..., None]  # the released numerator's dt: a gain per head and token
        return self.out_proj(o.flatten(2)), stored(state, x, reading)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # (B, T, H, d or D)


class PrefixLinearAttention(LinearAttention):
    """Linear attention whose first state is a non-causal reading of the prefix, by its own keys and values (eq. 3)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.proj_k_enc = nn.Linear(config.width, config.linear_heads * config.feature_dim, bias=False)
        self.proj_v_enc = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, reading: Reading, state: State | None) -> tuple[Tensor, State]:
        q = self.heads_of(self.proj_q(x)) * self.key_gain
        k, v = self._keys(self.proj_k(x), reading.blank), self.heads_of(self.proj_v(x))
        if reading.prefix_end:
            prefix = x[:, : reading.prefix_end]  # (B, M, E)
            blank = None if reading.blank is None else reading.blank[:, : reading.prefix_end]
            k_enc, v_enc = self._keys(self.proj_k_enc(prefix), blank), self.heads_of(self.proj_v_enc(prefix))
            state = encode_prefix(k_enc, v_enc, mask=reading.prefix_mask)
        o, state = linear_attention(q, k, v, initial_state=state, mask=reading.mask)
        return self.out_proj(o.flatten(2)), stored(state, x, reading)

    def _keys(self, k: Tensor, blank: Tensor | None) -> Tensor:
        if blank is not None:
            k = k.masked_fill(blank[..., None], 0)
        return self.heads_of(k) * self.key_gain


def stored(state: State, x: Tensor, reading: Reading) -> State:
    """The state as it is kept for the next call."""
    if not reading.quirks.half_states or x.dtype not in (torch.bfloat16, torch.float16):
        return state
    return State(state.S.to(x.dtype).to(state.S.dtype), state.z.to(x.dtype).to(state.z.dtype))


def _added_once_more(k: Tensor, v: Tensor, state: State) -> State:
    phi = taylor_features(k[:, 0].to(state.S.dtype))  # (B, H, F)
    return State(state.S + phi[..., None] * v[:, 0].to(state.S.dtype)[..., None, :], state.z)
