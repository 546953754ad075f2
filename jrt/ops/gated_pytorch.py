"""SwiGLU and the gated short convolution, with the projection after them, in plain PyTorch (see `jrt.ops.gated`).

Shapes: B batch, T tokens, E channels, M hidden units, K taps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from jrt.ops.short_convolution import short_convolution


def swiglu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(value * silu(gate)) for x = [value, gate] (..., 2 M)."""
    value, gate = x.chunk(2, dim=-1)
    return linear(value * F.silu(gate))


def gated_convolution_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    linear: nn.Module,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """linear(silu(conv(u)) * gate) for x = [u, gate] (B, T, 2 E), and the state after the last token.

    Args:
        weight, bias, state, cu_seqlens: as in `short_convolution`.
        mask: (B, T) bool, False where a token is padding; None: no padding.
    """
    u, gate = x.chunk(2, dim=-1)  # (B, T, E) each
    c, state = silu_convolution(u, weight, bias, state, mask, cu_seqlens)
    return linear(c * gate), state  # no activation on the gate


def silu_convolution(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(conv(u)) (B, T, E), and the state after the last token; arguments as in `gated_convolution_linear`."""
    if mask is not None:
        u = u.masked_fill(~mask[..., None], 0)
    c, state = short_convolution(u, weight, bias, state, cu_seqlens)
    return F.silu(c), state
