"""Linear attention with the Taylor feature map for short texts, by its scores (paper equations 3 and 6-7).

Training batches here hold thousands of texts of at most a few hundred tokens, with heads of odd sizes. Scores take
T x T numbers there and features T x F, of which F is often the larger; scores also need few and large products.
The result is that of `jrt.ops.linear_attention` after `jrt.ops.encode_prefix`.

Shapes: R rows (of all models), T tokens, M prefix tokens, H heads, d query/key size, D value size, J columns of scores.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthetics.fused import fused

ALIGNMENT = 8  # tensor cores read half precision in groups of so many numbers


def taylor_attention(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Causal linear attention on top of an optional prefix, all of which every query sees.

    Args:
        q, k: (R, T, H, d), before the feature map.
        v: (R, T, H, D).
        prefix: keys (R, M, H, d) and values (R, M, H, D).

    Returns:
        (R, T, H, D).
    """
    size = v.shape[-1]
    q, k, v = (q * q.shape[-1] ** -0.5).transpose(1, 2), _keys(k), _values(v)
    own = k.shape[2]
    if prefix is not None:
        k, v = torch.cat([k, _keys(prefix[0])], dim=2), torch.cat([v, _values(prefix[1])], dim=2)
    sums = TaylorWeights.apply(q @ k.mT, own) @ v  # (R, H, T, D + 1 or more): numerator, then denominator
    return (sums[..., :size] / sums[..., size : size + 1]).transpose(1, 2)


class TaylorWeights(torch.autograd.Function):
    """1 + s + s^2 / 2, and 0 where a query would see a later token.

    Written with its derivative, 1 + s, because these are the largest tensors: autograd would keep and pass over several.
    scores (R, H, T, J), of which the first `own` columns are causal.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, own: int) -> Tensor:
        seen = _seen(scores, own)
        ctx.save_for_backward(scores, seen)
        return _weights(scores, seen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _slopes(*ctx.saved_tensors, gradient), None


def _seen(scores: Tensor, own: int) -> Tensor:
    """(T, J), 1 where the query may see the column's token."""
    row = torch.arange(scores.shape[-2], device=scores.device)[:, None]
    column = torch.arange(scores.shape[-1], device=scores.device)
    return ((column <= row) | (column >= own)).to(scores.dtype)


@fused
def _weights(scores: Tensor, seen: Tensor) -> Tensor:
    return (0.5 * scores).add_(1).mul_(scores).add_(1).mul_(seen)


@fused
def _slopes(scores: Tensor, seen: Tensor, gradient: Tensor) -> Tensor:
    return (scores + 1).mul_(gradient).mul_(seen)


def _keys(k: Tensor) -> Tensor:
    """(R, H, T or more, d)."""
    return F.pad(k.transpose(1, 2), (0, 0, 0, _missing(k.shape[1], k)))


def _values(v: Tensor) -> Tensor:
    """(R, H, T or more, D + 1 or more): a column of ones sums the weights; what is added for alignment is 0."""
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).transpose(1, 2)
    return F.pad(v, (0, _missing(v.shape[-1], v), 0, _missing(v.shape[2], v)))


def _missing(size: int, x: Tensor) -> int:
    return -size % ALIGNMENT if x.dtype in (torch.bfloat16, torch.float16) else 0
