"""The computation behind the short-prompt rule "pad": the keys of the pads are zero in prefix linear attention.

A zero key is not nothing: phi(0) = [1, 0, ...], so each pad adds its value to the state with weight 1, as in the runs of
the paper's Table 4. Convolutions and windows read pads as any other token.

Shapes: B batch, T tokens, M prefix columns, H heads, d key size, D value size.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from jrt.cache import ModelState
from jrt.mixers import MIXERS, TokenBatch
from jrt.mixers.linear_attention import PrefixLinearAttention
from jrt.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class PaddedBatch(TokenBatch):
    """Tokens of which some have zero keys."""

    blank: Tensor | None  # (B, T) bool, True: the key is zero; None: none is


class PaddedPrefixLinearAttention(PrefixLinearAttention):
    """Prefix linear attention whose blank tokens have zero keys, the encoder's and the decoder's."""

    def project(self, x: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, batch)
        if isinstance(batch, PaddedBatch) and batch.blank is not None:
            k = k.masked_fill(batch.blank[..., None, None], 0)
        return q, k, v

    def project_prefix(self, x: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        k, v = super().project_prefix(x, batch)
        if isinstance(batch, PaddedBatch) and batch.blank is not None and batch.prefix is not None:
            k = k.masked_fill(batch.prefix.of(batch.blank[..., None])[..., None], 0)  # (B, M, 1, 1)
        return k, v


class PaddedLanguageModel(LanguageModel):
    """A LanguageModel that can be told how many of each row's first tokens fill up a short prompt."""

    mixers: ClassVar[Mapping[str, type[nn.Module]]] = ChainMap({"P": PaddedPrefixLinearAttention}, MIXERS)

    def read(
        self,
        input_ids: Tensor,
        *,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        prefix_length: Tensor | None = None,
        blank_length: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """As `LanguageModel.read`; blank_length (B,): pads at the start of each row's own tokens; None: none."""
        batch = self.token_batch(input_ids, state, attention_mask, prefix_length)
        if blank_length is not None and batch.prefix is not None and self.config.encoder_mask:
            batch = padded(batch, (batch.positions >= 0) & (batch.positions < blank_length[:, None]))
        return self.read_batch(input_ids, batch, state)


def padded(batch: TokenBatch, blank: Tensor | None) -> PaddedBatch:
    """The batch with blank tokens (B, T)."""
    return PaddedBatch(**vars(batch), blank=blank)
