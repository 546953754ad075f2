"""Adds a layer's output to the residual stream and norms the sum for the next layer, in one pass over the tokens.

On a GPU the forward and the backward pass are Triton kernels. These are the largest tensors, and reading and writing
them takes nearly all the time.

Shapes: M models, N tokens of each, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_and_norm(
    x: Tensor, y: Tensor | None, bias: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + y + bias, and its root-mean-square norm (arXiv 1910.07467).

    Args:
        x: (M, N, E) fp32.
        y: (M, N, E) in `dtype`, the layer's output; None: nothing is added.
        bias: (M, E), added to the sum; None: no bias.
        weight: (M, E), of the norm.
        eps: of the norm.
        dtype: of the norm's result.

    Returns:
        The sum (M, N, E) in fp32, and its norm (M, N, E) in `dtype`.
    """
    if x.is_cuda:
        total, normed = AddAndNorm.apply(x, y, bias, weight, eps, dtype)
        return total, normed
    total = x if y is None else x + y
    if bias is not None:
        total = total + bias[:, None]
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total, (total * scale * weight[:, None]).to(dtype)


class AddAndNorm(torch.autograd.Function):
    """`add_and_norm` by its Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, bias: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from synthetics import residual_kernels

        total, normed = residual_kernels.forward(x, y, bias, weight, eps, dtype)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.adds, ctx.has_bias = eps, y is not None, bias is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        from synthetics import residual_kernels

        total, weight = ctx.saved_tensors
        dx, dy, dbias, dweight = residual_kernels.backward(dtotal, dnormed, total, weight, ctx.eps, ctx.adds)
        return dx, dy, dbias if ctx.has_bias else None, dweight, None, None
