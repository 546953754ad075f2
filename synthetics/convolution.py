"""What a gated short convolution does between its two projections, for the rows of many models.

On a GPU this is a Triton kernel each way.

Shapes: M models, R rows of all models, T tokens, E channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_convolution(u: Tensor, bias: Tensor, taps: Tensor, filter_bias: Tensor) -> Tensor:
    """silu(conv(u + bias)) x (gate + bias), as `jrt.mixers.conv.ShortConvolution` between its projections.

    Args:
        u: (R, T, 2 E), the input, then the gate, both without their bias; the rows of one model are neighbours.
        bias: (M, 2 E), of the projection. Before the text there are zeros, without the bias.
        taps: (M, E, K), the last one is now.
        filter_bias: (M, E).

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
    """`gated_convolution` by its kernels."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor, taps: Tensor, filter_bias: Tensor) -> Tensor:
        from synthetics import convolution_kernels

        ctx.save_for_backward(u, bias, taps, filter_bias)
        return convolution_kernels.forward(u, bias, taps, filter_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        from synthetics import convolution_kernels

        return convolution_kernels.backward(dy, *ctx.saved_tensors)
