"""Linear attention with the Taylor feature map for short texts, in its quadratic form (paper equations 3, 6 and 7).

The quadratic form computes a score for each pair of tokens, as softmax attention does. `jrt.ops.linear_attention`
computes features instead. Here a batch has thousands of texts of a few hundred tokens. For each token there are T
scores or F features, and F is often the larger number. Scores also need fewer and larger matrix products. On a GPU,
Triton kernels keep the scores on the chip. Results equal those of `jrt.ops.linear_attention` after
`jrt.ops.encode_prefix`.

Shapes: R rows (of all models), T tokens, H heads, d query/key size, D value size, E width, J asked queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def taylor_attention(x: Tensor, heads: int, keys: int, values: int) -> Tensor:
    """Causal linear attention of whole texts, without a prefix or with the whole text as the prefix as well.

    Args:
        x: (R, T, C), with these columns: queries (H d), keys (H d) and values (H D) before the feature map; then, if
            there is a prefix, the encoder's keys (H d) and values (H D). Queries are scaled already, so that a score is
            the product of a query and a key.
        heads, keys, values: H, d and D.

    Returns:
        (R, T, H D).
    """
    if x.is_cuda:
        return TaylorAttention.apply(x, heads, keys, values)
    sizes = [heads * keys, heads * keys, heads * values]
    sizes += sizes[1:] if x.shape[-1] > sum(sizes) else []
    q, *read = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in x.split(sizes, dim=-1))  # (R, H, T, d or D)
    weights = [TaylorWeights.apply(q @ k.mT, own) for k, own in zip(read[::2], (True, False), strict=False)]
    numerator = sum(w @ v for w, v in zip(weights, read[1::2], strict=True))  # (R, H, T, D)
    denominator = sum(w.sum(-1, keepdim=True) for w in weights)
    return (numerator / denominator).transpose(1, 2).flatten(2)


def weighted_sums(queries: Tensor, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """For a few queries of each row, sums the tokens, weighted by 1 + s + s^2 / 2 of the score s.

    Args:
        queries: (R, J, E), scaled. A score is the product of a query and a token over E.
        x: (R, T, E), the tokens.
        last: (R, J) int64, the last token that each query sees.

    Returns:
        Weighted sums of x (R, J, E) in its dtype, and sums of the weights (R, J) in fp32.
    """
    if x.is_cuda:
        sums, totals = WeightedSums.apply(queries, x, last)
        return sums, totals
    scores = queries @ x.mT  # (R, J, T)
    seen = torch.arange(x.shape[1]) <= last[..., None]
    weights = (1 + scores + 0.5 * scores * scores) * seen
    return weights @ x, weights.sum(-1)


class TaylorWeights(torch.autograd.Function):
    """The weights 1 + s + s^2 / 2 of scores s (R, H, T, T).

    `own`: whether the keys are the text's own; then weights of later tokens are 0. The derivative 1 + s is written by
    hand, because these are the largest tensors and autograd would store several of them.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, own: bool) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.own = own
        weights = (0.5 * scores).add_(1).mul_(scores).add_(1)
        return weights.tril_() if own else weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        slopes = (scores + 1).mul_(gradient)
        return slopes.tril_() if ctx.own else slopes, None


class TaylorAttention(torch.autograd.Function):
    """`taylor_attention` by its Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, keys: int, values: int) -> Tensor:
        from synthetics import taylor_kernels

        x = x.contiguous()
        ctx.sizes = heads, keys, values
        o, denominator = taylor_kernels.forward(x, *ctx.sizes)
        ctx.save_for_backward(x, o, denominator)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        from synthetics import taylor_kernels

        return taylor_kernels.backward(*ctx.saved_tensors, do, *ctx.sizes), None, None, None


class WeightedSums(torch.autograd.Function):
    """`weighted_sums` by its Triton kernels."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        from synthetics import asked_kernels

        queries, x = queries.contiguous(), x.contiguous()
        ctx.save_for_backward(queries, x, last)
        return asked_kernels.forward(queries, x, last)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor, dtotals: Tensor) -> tuple[Tensor, Tensor, None]:
        from synthetics import asked_kernels

        return *asked_kernels.backward(*ctx.saved_tensors, dsums, dtotals), None
