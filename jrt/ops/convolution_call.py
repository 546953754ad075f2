"""The arguments of one call of the short convolution, which every backend is given.

Shapes: B batch, N packed sequences, T tokens, E channels, K taps.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Call(NamedTuple):
    u: Tensor  # (B, T, E)
    weight: Tensor  # (E, K)
    bias: Tensor | None  # (E,)
    state: Tensor | None  # (B, K - 1, E), or (N, K - 1, E) for packed sequences
    mask: Tensor | None  # (B, T) bool, False where a token is padding
    cu_seqlens: Tensor | None  # (N + 1,), ends of packed sequences
    linear: nn.Module | None = None  # the projection behind the gated convolution
