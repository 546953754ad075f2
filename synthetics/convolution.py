"""The part of a gated short convolution between its two projections, for the rows of many models at once.

On a GPU the forward and the backward pass are one Triton function each (`synthetics.convolution_kernels`).

Shapes: M models, R rows of all models, T tokens, E channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_convolution(u: Tensor, bias: Tensor, taps: Tensor, filter_bias: Tensor) -> Tensor:
    """silu(conv(value + bias)) x (gate + bias), as `jrt.mixers.conv.ShortConvolution` computes it.

    Args:
        u: (R, T, 2 E), the first projection's output without its bias: E channels of value, then E of gate. The rows of
            one model stand together.
        bias: (M, 2 E), of the first projection. The convolution's zeros before the text do not get this bias.
        taps: (M, E, K), the convolution's filter. The last tap is for the current token.
        filter_bias: (M, E), of the convolution.

    Returns:
        (R, T, E) in the dtype of `u`.
    """
    if u.is_cuda:
        return GatedConvolution.apply(u, bias, taps, filter_bias)
    models, (rows, length, _), count = len(taps), u.shape, taps.shape[2]
    value, gate = (u.view(models, -1, *u.shape[1:]) + bias[:, None, None].to(u.dtype)).chunk(2, dim=-1)  # (M, B, T, E)
    before = F.pad(value, (0, 0, count - 1, 0))
    each = taps.permute(2, 0, 1).to(u.dtype)[:, :, None, None]  # (K, M, 1, 1, E)
    c = filter_bias[:, None, None].to(u.dtype)
    for tap in range(count):
        c = torch.addcmul(c, before[:, :, tap : tap + length], each[tap])
    return (F.silu(c) * gate).view(rows, length, -1)


class GatedConvolution(torch.autograd.Function):
    """`gated_convolution` by its Triton kernels."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor, taps: Tensor, filter_bias: Tensor) -> Tensor:
        from synthetics import convolution_kernels

        ctx.save_for_backward(u, bias, taps, filter_bias)
        return convolution_kernels.forward(u, bias, taps, filter_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        from synthetics import convolution_kernels

        return convolution_kernels.backward(dy, *ctx.saved_tensors)
