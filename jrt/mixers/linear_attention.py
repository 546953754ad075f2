"""L, causal linear attention (Based), and P, prefix linear attention (JRT-RNN).

Shapes: B batch, T tokens, M prefix columns, E width, H heads, d feature_dim, D = E / H.
"""

from __future__ import annotations

from torch import Tensor, nn

from jrt.config import Config
from jrt.mixers.batch import TokenBatch
from jrt.ops import State, linear_attention, prefix_linear_attention


class LinearAttention(nn.Module):
    """Based's mixer (arXiv 2402.18668): linear attention with the Taylor feature map, without rotary positions."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.heads = config.linear_heads
        self.has_decay = config.decay_const is not None and config.decay_projection
        self.key_gain = (config.feature_dim / config.feature_scale) ** 0.25 if config.feature_scale else 1.0
        keys = config.linear_heads * config.feature_dim
        self.proj_q = nn.Linear(config.width, keys, bias=False)
        self.proj_k = nn.Linear(config.width, keys, bias=False)
        self.proj_v = nn.Linear(config.width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)
        if config.decay_projection:
            self.decay_proj = nn.Linear(config.width, config.linear_heads, bias=False)

    def forward(self, x: Tensor, batch: TokenBatch, state: State | None) -> tuple[Tensor, State]:
        q, k, v = self.project(x, batch)
        log_decay = batch.log_decay if self.has_decay else None
        o, state = linear_attention(q, k, v, initial_state=state, mask=batch.mask, log_decay=log_decay)
        if self.has_decay:
            o = o * self.decay_proj(x)[..., None]  # (B, T, H, 1): with decay, each head and token has an output gain
        return self.out_proj(o.flatten(2)), state

    def project(self, x: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, T, H, d), values (B, T, H, D) of all tokens."""
        q, k, v = self.heads_of(self.proj_q(x)), self.heads_of(self.proj_k(x)), self.heads_of(self.proj_v(x))
        return q * self.key_gain, k * self.key_gain, v

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # (B, T, H, d or D)


class PrefixLinearAttention(LinearAttention):
    """Linear attention that starts from the state of a prefix encoder (paper, equation 3).

    The encoder reads the prefix without a causal mask, by keys and values from projections of its own.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.proj_k_enc = nn.Linear(config.width, config.linear_heads * config.feature_dim, bias=False)
        self.proj_v_enc = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, batch: TokenBatch, state: State | None) -> tuple[Tensor, State]:
        q, k, v = self.project(x, batch)
        if batch.prefix is None:
            o, state = linear_attention(q, k, v, initial_state=state, mask=batch.mask)
        else:
            prefix = self.project_prefix(x, batch)
            o, state = prefix_linear_attention(q, k, v, *prefix, mask=batch.mask, prefix_mask=batch.prefix.mask)
        return self.out_proj(o.flatten(2)), state

    def project_prefix(self, x: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The encoder's keys (B, M, H, d) and values (B, M, H, D)."""
        assert batch.prefix is not None
        prefix = batch.prefix.of(x)  # (B, M, E)
        return self.heads_of(self.proj_k_enc(prefix)) * self.key_gain, self.heads_of(self.proj_v_enc(prefix))
