"""The Taylor feature map and the state that it fills.

Shapes: B batch, T tokens, H heads, d query/key size, D value size, F = 1 + d + d (d + 1) / 2 features.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 256  # for at most so many vectors, the number of PyTorch calls decides the time


class State(NamedTuple):
    """The state of linear attention after a text: the two sums of the paper's equation 3."""

    S: Tensor  # (B, H, F, D) fp32: sum of phi(k) v^T
    z: Tensor  # (B, H, F) fp32: sum of phi(k)


def feature_count(d: int) -> int:
    """F, the number of features for vectors of size d. The released code has 1 + d + d^2, with the same inner
    products."""
    return 1 + d + d * (d + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """phi(x) with phi(q).phi(k) = 1 + s + s^2 / 2 for s = q.k / sqrt(d) (paper equations 6-7).

    The second-order part is symmetric in its two indices, so each pair i < j is kept once with weight 1 / sqrt(d) and
    each square with weight 1 / sqrt(2 d). Order: 1, the d first-order features, the pairs i <= j row by row.

    Args:
        x: (..., d).

    Returns:
        (..., F) in the dtype of `x`.

    Raises:
        ValueError: x has no floating-point dtype.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating-point dtype")
    d = x.shape[-1]
    first = x * d**-0.25
    # torch.compile looks through a cache, and warns that it does.
    pairs_of = _pairs.__wrapped__ if torch.compiler.is_compiling() else _pairs
    rows, columns, weights = pairs_of(d, x.device, x.dtype)
    if x.numel() <= SMALL * d:
        pairs = first.index_select(-1, rows) * first.index_select(-1, columns)  # (..., d (d + 1) / 2)
    else:  # slices read memory in order, and their backward pass needs no scattered additions
        pairs = torch.cat([first[..., i : i + 1] * first[..., i:] for i in range(d)], dim=-1)
    return torch.cat([torch.ones_like(x[..., :1]), first, pairs * weights], dim=-1)  # (..., F)


@lru_cache(maxsize=64)
def _pairs(d: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Row i and column j of each pair i <= j, and its weight; the factor d^-1/2 is already in the products of
    `first`."""
    with torch.inference_mode(False):  # the cached tensors may later be used with autograd
        rows, columns = torch.triu_indices(d, d, device=device).unbind()
        weights = rows.new_ones(rows.shape, dtype=dtype).masked_fill(rows == columns, math.sqrt(0.5))
        return rows, columns, weights  # (d (d + 1) / 2,) each
