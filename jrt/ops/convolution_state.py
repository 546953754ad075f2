"""The gradient of the state from which a convolution starts, for kernels that compute all other gradients.

Shapes: B batch, N packed sequences (or the B rows), T tokens, E channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_gradient(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
) -> Tensor:
    """Only the first K - 1 outputs of each sequence read the state, so these are computed again.

    Args:
        x: u (B, T, E), or [u, gate] (B, T, 2 E).
        taps, bias, state, mask, cu_seqlens: as in `jrt.ops.silu_convolution`.
        dy: (B, T, E), the gradient of silu(conv(u)), or of silu(conv(u)) * gate.

    Returns:
        (N, K - 1, E) in fp32.
    """
    (channels, count), before, length = taps.shape, state.shape[1], x.shape[1]
    taps, step = taps.float(), torch.arange(before, device=x.device)
    if cu_seqlens is None:
        row, token = torch.arange(x.shape[0], device=x.device)[:, None], step[None]
        inside = (token < length).expand(x.shape[0], -1)  # (N, K - 1)
    else:
        row, token = torch.zeros_like(cu_seqlens[:-1, None]), cu_seqlens[:-1, None] + step
        inside = token < cu_seqlens[1:, None]
    token = token.clamp(max=length - 1)
    first = x[row, token].float()  # (N, K - 1, E or 2 E)
    shown = inside if mask is None else inside & mask[row, token]
    u = torch.where(shown[..., None], first[..., :channels], 0)
    inputs = torch.cat([state.float(), u], 1)  # (N, 2 K - 2, E)
    c = sum((taps[:, k] * inputs[:, k : k + before] for k in range(count)), torch.zeros_like(u))
    c = c if bias is None else c + bias.float()
    share = torch.sigmoid(c)
    by_c = dy[row, token].float() * share * (1 + c * (1 - share))
    if x.shape[2] > channels:
        by_c = by_c * first[..., channels:]
    by_c = torch.where(inside[..., None], by_c, 0)
    gradient = torch.zeros_like(u)
    for t in range(before):  # the output at place t reads the state's inputs from t on
        for i in range(t, before):
            gradient[:, i] += taps[:, i - t] * by_c[:, t]
    return gradient
