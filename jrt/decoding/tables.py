"""Tables of constants that a decoding step would otherwise compute again for each token.

Shapes: L positions, D head size, d query/key size of linear attention, F features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jrt.mixers.attention import rotary_angles


class Rotary(NamedTuple):
    """Rotary angles of all positions. A head's vector x (D,) is rotated by x cos + x[partner] sin."""

    cos: Tensor  # (L, D) fp32, 1 where a dimension does not rotate
    sin: Tensor  # (L, D) fp32, 0 where a dimension does not rotate, negative in the first half of those that do
    partner: Tensor  # (D,) int64: the dimension that each one rotates with


def rotary_table(length: int, dim: int, head_dim: int, device: torch.device) -> Rotary:
    """The angles of `jrt.mixers.attention.rotary_angles` for positions 0 to `length` - 1."""
    cos, sin = (x[0, :, 0] for x in rotary_angles(torch.arange(length, device=device)[None], dim))  # (L, half)
    half = cos.shape[1]
    rest = cos.new_ones(length, head_dim - 2 * half)
    partner = torch.arange(head_dim, device=device)
    partner[: 2 * half] = partner[: 2 * half].roll(half)
    return Rotary(torch.cat([cos, cos, rest], 1), torch.cat([-sin, sin, 0 * rest], 1), partner)


class Features(NamedTuple):
    """phi(x)[f] = weight[f] x[row[f]] x[column[f]], where x[d] stands for 1; in the order of
    `jrt.ops.taylor_features`."""

    row: Tensor  # (F,) int64
    column: Tensor  # (F,) int64
    weight: Tensor  # (F,) fp64


def feature_table(d: int, device: torch.device) -> Features:
    """The symmetric second-order Taylor features of a vector of size d."""
    rows, columns = torch.triu_indices(d, d).unbind()
    one, each = torch.full((1,), d), torch.arange(d)
    pairs = torch.ones(rows.shape, dtype=torch.float64).masked_fill(rows == columns, math.sqrt(0.5)) * d**-0.5
    weight = torch.cat([pairs.new_ones(1), pairs.new_full((d,), d**-0.25), pairs])
    row, column = torch.cat([one, each, rows]), torch.cat([one, one.expand(d), columns])
    return Features(row.to(device), column.to(device), weight.to(device))
