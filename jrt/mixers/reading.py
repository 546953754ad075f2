"""What a mixer has to know about the tokens it is given besides their vectors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jrt.released.quirks import Quirks


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One call's tokens. Shapes: B batch, T tokens of this call, M the first columns, which hold the prefix."""

    past: Tensor  # (B,) own tokens of each row before this call
    positions: Tensor  # (B, T) index of each token among its row's own tokens
    mask: Tensor | None  # (B, T) bool, False: padding; None: no padding
    blank: (
        Tensor | None
    )  # (B, T) bool, True: a token whose key the release zeroes before the feature map; None: no such
    prefix_end: int  # M; 0: this call encodes no prefix
    prefix_mask: Tensor | None  # (B, M) bool, True: part of the row's prefix; None: all are
    rotary: tuple[Tensor, Tensor] | None  # cos and sin (B, T, 1, ceil(rotary_dim / 2)) fp32; None: nothing rotates
    log_decay: Tensor | None  # (H,) decay of Based's numerator
    quirks: Quirks
