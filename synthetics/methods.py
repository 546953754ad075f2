"""The three ways to read two lists: in order once, in order twice, and once without the causal mask.

All are four layers, gated convolution and linear attention in turn, with two heads and no MLP, as released
(original_spec section 9; paper appendix B.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jrt.config import Config
from jrt.model import LanguageModel
from synthetics.data import read_twice

HEADS = 2


@dataclass(frozen=True)
class Method:
    """What a row of the figure is."""

    pattern: str
    reading: Callable[[Tensor], Tensor] = lambda inputs: inputs
    encodes: bool = False  # the whole input is the prefix

    def config(self, width: int, feature_dim: int, vocab_size: int, longest: int) -> Config:
        """Raises ValueError for sizes that cannot be built."""
        return Config(
            pattern=self.pattern,
            width=width,
            vocab_rows=vocab_size,
            linear_heads=HEADS,
            feature_dim=feature_dim,
            conv_expand=1,
            enc_length=longest if self.encodes else 0,
        )

    def answer(self, model: LanguageModel, inputs: Tensor) -> Tensor:
        """Logits (N, V) after SEPARATE_ANSWER; inputs (N, T)."""
        tokens = self.reading(inputs)  # (N, T or 2 T - 1)
        prefix = torch.full((len(tokens),), tokens.shape[1], device=tokens.device) if self.encodes else None
        hidden, _ = model.read(tokens, prefix_length=prefix)  # (N, T, E)
        return model.head(hidden[:, -1])


METHODS = {
    "based": Method("CLCL"),
    "jrt-prompt": Method("CLCL", reading=read_twice),
    "jrt-rnn": Method("CPCP", encodes=True),
}
