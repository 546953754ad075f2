"""A causal depthwise convolution over a few taps, with the state from which it can continue.

Shapes: B batch, N packed sequences, T tokens, E channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.ops.packing import owners


def short_convolution(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """c_t = bias + sum_j weight[:, j] u_{t - K + 1 + j}, as a sum of K shifted products (faster than conv1d for few
    taps).

    Args:
        u: (B, T, E); padding must be zero already.
        weight: (E, K); the last tap multiplies the current token.
        bias: (E,) or None.
        state: (B, K - 1, E), the inputs before `u`; None: zeros.
        cu_seqlens: (N + 1,) int32 or int64, for N sequences packed into one row (B = 1): sequence n has the tokens
            cu_seqlens[n] to cu_seqlens[n + 1] - 1. No tap reaches into the sequence before. States are then
            (N, K - 1, E). None: each row is one text.

    Returns:
        c (B, T, E), and the state after the last token, in memory of its own: a view would keep all inputs alive.
    """
    taps, length = weight.shape[1], u.shape[1]
    if cu_seqlens is not None:
        return _packed_convolution(u, weight, bias, state, cu_seqlens)
    if state is None:
        state = u.new_zeros(u.shape[0], taps - 1, u.shape[2])
    u = torch.cat([state.to(u.dtype), u], dim=1)  # (B, K - 1 + T, E)
    weight = weight.to(u.dtype)
    if length == 1:
        c = (u * weight.mT).sum(1, keepdim=True)
        return c if bias is None else c + bias.to(c.dtype), u[:, 1:].clone()
    c = u[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        c = c + u[:, tap : tap + length] * weight[:, tap]
    return c if bias is None else c + bias.to(c.dtype), u[:, length:].clone()


def last_inputs(u: Tensor, taps: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The state after the last token: the last K - 1 inputs of each row (B, K - 1, E), or of each packed sequence
    (N, K - 1, E). Those before `u` come from `state`, or are zero. Arguments as in `short_convolution`."""
    before, length = taps - 1, u.shape[1]
    if cu_seqlens is None:
        if length >= before:
            return u[:, length - before :].clone()
        missing = u.new_zeros(u.shape[0], before, u.shape[2]) if state is None else state.to(u.dtype)
        return torch.cat([missing[:, length:], u], dim=1)
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    token = end - before + torch.arange(before, device=u.device)  # (N, K - 1), may lie before the sequence
    own = u[0, token.clamp(min=0)]  # (N, K - 1, E)
    sequence = torch.arange(len(start), device=u.device)[:, None]
    return torch.where((token >= start)[..., None], own, _state_at(state, sequence, token - start, own))


def _packed_convolution(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    taps, length = weight.shape[1], u.shape[1]
    owner = owners(cu_seqlens, length)  # (T,)
    place = torch.arange(length, device=u.device) - cu_seqlens[owner]  # (T,), of each token in its sequence
    earlier, weight = F.pad(u, (0, 0, taps - 1, 0)), weight.to(u.dtype)  # (1, K - 1 + T, E)
    c = None
    for tap in range(taps):
        back = taps - 1 - tap
        input_ = earlier[:, tap : tap + length]
        if back:
            inside = (place >= back)[:, None]
            input_ = torch.where(inside, input_, _state_at(state, owner, place - back, input_))
        c = input_ * weight[:, tap] if c is None else c + input_ * weight[:, tap]
    assert c is not None
    return c if bias is None else c + bias.to(c.dtype), last_inputs(u, taps, state, cu_seqlens)


def _state_at(state: Tensor | None, sequence: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """Inputs before each sequence, at places -(K - 1) to -1 before its first token (any value at other places).

    Args:
        state: (N, K - 1, E); None: zeros.
        sequence, place: integers of shapes that broadcast to (...).

    Returns:
        (..., E) in the dtype of `like`.
    """
    if state is None:
        return like.new_zeros(())
    before = state.shape[1]
    return state.to(like.dtype)[sequence, (place + before).clamp(0, before - 1)]
