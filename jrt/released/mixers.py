"""Linear attention as the release computes it, one quirk at a time (docs/released.md).

Shapes: B batch, T tokens, H heads, d query/key size, D value size, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jrt.config import Config
from jrt.mixers import TokenBatch
from jrt.mixers.linear_attention import LinearAttention
from jrt.ops import State, linear_attention, taylor_features
from jrt.padded_prompts import PaddedBatch, PaddedPrefixLinearAttention
from jrt.released.quirks import Quirks

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class ReleasedBatch(PaddedBatch):
    """Tokens, and the quirks that they are computed with."""

    quirks: Quirks


class ReleasedLinearAttention(LinearAttention):
    """Based's mixer with `double_add`, `decay_in_steps` and `half_states`."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.has_gain = config.decay_projection

    def forward(self, x: Tensor, batch: TokenBatch, state: State | None) -> tuple[Tensor, State]:
        assert isinstance(batch, ReleasedBatch)
        quirks, is_step = batch.quirks, state is not None and x.shape[1] == 1
        q, k, v = self.project(x, batch)
        if quirks.double_add and is_step:
            state = added_once_more(k, v, state)
        in_state = batch.log_decay if self.has_decay or quirks.decay_in_steps else None
        in_output = in_state if self.has_decay or is_step else None
        o, after = linear_attention(q, k, v, initial_state=state, mask=batch.mask, log_decay=in_output)
        if in_state is not in_output:  # a decay without a gain: the parallel form decays the state only
            _, after = linear_attention(q, k, v, initial_state=state, mask=batch.mask, log_decay=in_state)
        if self.has_decay or (quirks.decay_in_steps and is_step and self.has_gain):
            o = o * self.decay_proj(x)[..., None]
        return self.out_proj(o.flatten(2)), stored(after, x, quirks)


class ReleasedPrefixLinearAttention(PaddedPrefixLinearAttention):
    """Prefix linear attention with `half_states`."""

    def forward(self, x: Tensor, batch: TokenBatch, state: State | None) -> tuple[Tensor, State]:
        assert isinstance(batch, ReleasedBatch)
        y, state = super().forward(x, batch, state)
        return y, stored(state, x, batch.quirks)


def added_once_more(k: Tensor, v: Tensor, state: State) -> State:
    """The state whose S, but not z, has one more time the token with k (B, 1, H, d) and v (B, 1, H, D)."""
    phi = taylor_features(k[:, 0].to(state.S.dtype))  # (B, H, F)
    return State(state.S + phi[..., None] * v[:, 0].to(state.S.dtype)[..., None, :], state.z)


def stored(state: State, x: Tensor, quirks: Quirks) -> State:
    """The state as it is kept for the next call: under `half_states`, rounded to the dtype of x if that is half."""
    if not quirks.half_states or x.dtype not in HALF:
        return state
    return State(state.S.to(x.dtype).to(state.S.dtype), state.z.to(x.dtype).to(state.z.dtype))
