"""A causal depthwise convolution over a few taps, with the state from which it can continue.

Shapes: B batch, T tokens, E channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def short_convolution(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """c_t = bias + sum_j weight[:, j] u_{t - K + 1 + j}, as a sum of K shifted products (faster than conv1d for few
    taps).

    Args:
        u: (B, T, E); padding must be zero already.
        weight: (E, K); the last tap multiplies the current token.
        bias: (E,) or None.
        state: (B, K - 1, E), the inputs before `u`; None: zeros.

    Returns:
        c (B, T, E), and the state after the last token.
    """
    taps, length = weight.shape[1], u.shape[1]
    if state is None:
        state = u.new_zeros(u.shape[0], taps - 1, u.shape[2])
    u = torch.cat([state.to(u.dtype), u], dim=1)  # (B, K - 1 + T, E)
    weight = weight.to(u.dtype)
    if length == 1:
        c = (u * weight.mT).sum(1, keepdim=True)
        return c if bias is None else c + bias.to(c.dtype), u[:, 1:]
    c = u[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        c = c + u[:, tap : tap + length] * weight[:, tap]
    return c if bias is None else c + bias.to(c.dtype), u[:, length:]
