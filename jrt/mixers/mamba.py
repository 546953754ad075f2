"""M, Mamba's selective state space layer (arXiv 2312.00752).

Shapes: B batch, T tokens, E channels, N states, R rank, K taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrt.config import Config
from jrt.mixers.batch import TokenBatch
from jrt.ops import selective_scan, silu_convolution


class MambaState(NamedTuple):
    """The state of a Mamba layer."""

    conv: Tensor  # (B, K - 1, E), the last inputs of the convolution
    ssm: Tensor  # (B, E, N) fp32, the state of the selective scan


class Mamba(nn.Module):
    """Convolution, selective scan and gate; a block with this mixer has no MLP."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        channels, self.states, self.rank = config.mamba_expand * config.width, config.state_dim, config.mamba_rank
        self.in_proj = nn.Linear(config.width, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.mamba_kernel, groups=channels)
        self.x_proj = nn.Linear(channels, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, self.states))
        self.D = nn.Parameter(torch.empty(channels))
        self.out_proj = nn.Linear(channels, config.width, bias=False)

    def forward(self, x: Tensor, batch: TokenBatch, state: MambaState | None) -> tuple[Tensor, MambaState]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
        before = None if state is None else state.conv
        u, conv = silu_convolution(u, self.conv1d.weight[:, 0], self.conv1d.bias, before, batch.mask)
        rank, B, C = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        delta = F.linear(rank, self.dt_proj.weight)  # (B, T, E), before bias and softplus
        if batch.mask is not None:
            delta = delta.masked_fill(~batch.mask[..., None], -torch.inf)  # padding leaves the state as it was
        wide = torch.promote_types(u.dtype, torch.float32)
        A, D = -self.A_log.to(wide).exp(), self.D.to(wide)
        ssm = None if state is None else state.ssm
        y, ssm = selective_scan(u, delta, A, B, C, D, delta_bias=self.dt_proj.bias, initial_state=ssm, gate=gate)
        return self.out_proj(y), MambaState(conv, ssm)
