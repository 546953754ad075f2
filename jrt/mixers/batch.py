"""What a mixer gets to know about its tokens besides their vectors: positions, padding, and the prefix.

Shapes: B batch, T tokens of this call, M columns that the prefix encoder is given (at most its length).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Prefix(NamedTuple):
    """The columns that the prefix encoder reads in this call."""

    length: int  # M, a Python number, so that no shape depends on the contents of a tensor
    columns: Tensor | None  # (B, M) int64: the columns of each row, if padding shifts them; None: the first M
    mask: Tensor | None  # (B, M) bool, True: part of the row's prefix; None: all are

    def of(self, x: Tensor) -> Tensor:
        """The prefix's columns (B, M, E) of x (B, T, E)."""
        if self.columns is None:
            return x[:, : self.length]
        return x.take_along_dim(self.columns[..., None], dim=1)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The tokens of one call. A row's own tokens are those that are not padding."""

    positions: Tensor  # (B, T) int64: index of each token among its row's own tokens
    mask: Tensor | None  # (B, T) bool, False: padding; None: no padding
    prefix: Prefix | None  # None: nothing is encoded in this call
    rotary: tuple[Tensor, Tensor] | None  # cos and sin (B, T, 1, ceil(rotary_dim / 2)) fp32; None: nothing rotates
    log_decay: Tensor | None  # (H,) fp32: decay of Based's numerator; None: the model has none
