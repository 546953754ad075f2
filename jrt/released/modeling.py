"""Models that compute as the release did where their configuration's quirks say so (docs/released.md).

Importing this module is all that `JRTForCausalLM` needs to find the class; `jrt.configuration_jrt` imports it.

Shapes: B batch, T tokens of a call.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from jrt.cache import ModelState
from jrt.config import Config
from jrt.configuration_jrt import JRTConfig
from jrt.inputs import check_tensor
from jrt.mixers import MIXERS, Prefix
from jrt.modeling_jrt import JRTForCausalLM
from jrt.padded_prompts import PaddedLanguageModel
from jrt.released.mixers import ReleasedBatch, ReleasedLinearAttention, ReleasedPrefixLinearAttention
from jrt.released.quirks import Quirks


class ReleasedLanguageModel(PaddedLanguageModel):
    """A language model that hands its quirks to the mixers and, under `blank_padding`, reads padding as tokens."""

    mixers: ClassVar[Mapping[str, type[nn.Module]]] = ChainMap(
        {"L": ReleasedLinearAttention, "P": ReleasedPrefixLinearAttention}, MIXERS
    )

    def __init__(self, config: Config, quirks: Quirks) -> None:
        super().__init__(config)
        self.quirks = quirks

    def read(
        self,
        input_ids: Tensor,
        *,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        prefix_length: Tensor | None = None,
        blank_length: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """As `PaddedLanguageModel.read`; under `blank_padding` the mask is any (B, T), and blanks keys only."""
        keep = attention_mask if self.quirks.blank_padding else None  # the mask of a model that reads pads
        batch = self.token_batch(input_ids, state, attention_mask if keep is None else None, prefix_length)
        own, prefix, blank = batch.positions, batch.prefix, None
        if keep is not None:
            own = own - keep.long().argmax(1, keepdim=True)  # counts from a row's first token that is no padding
        if keep is not None and prefix is not None and prefix_length is not None:
            prefix = Prefix(prefix.length, None, own[:, : prefix.length] < prefix_length[:, None])
        if prefix is not None and self.config.encoder_mask:
            if blank_length is not None:
                blank = (own >= 0) & (own < blank_length[:, None])
            elif keep is not None and input_ids.shape[1] <= self.config.enc_length:
                blank = ~keep  # the release drops a mask that is longer than its encoder
        fields = vars(batch) | {"prefix": prefix}
        return self.read_batch(input_ids, ReleasedBatch(**fields, blank=blank, quirks=self.quirks), state)


class ReleasedForCausalLM(JRTForCausalLM):
    """A JRTForCausalLM with the quirks of its configuration; `JRTForCausalLM(config)` makes it where there are any."""

    computes_quirks: ClassVar[bool] = True

    def __init__(self, config: JRTConfig) -> None:
        super().__init__(config)
        if self.quirks.padded_rows:
            self.tokens = self.core.vocab_rows

    def language_model(self) -> ReleasedLanguageModel:
        return ReleasedLanguageModel(self.core, self.quirks)

    def own_tokens(self, attention_mask: Tensor | None, input_ids: Tensor, state: ModelState | None) -> Tensor | None:
        """The mask as `read` takes it; under `blank_padding` (B, T) bool, False where the release zeroes keys.

        The release looks at no mask that is longer than the text, comes after the first call, or is for one token.
        """
        if not self.quirks.blank_padding:
            return super().own_tokens(attention_mask, input_ids, state)
        batch, length = input_ids.shape
        if attention_mask is None or state is not None or length == 1:
            return None
        check_tensor("attention_mask", attention_mask, "a tensor (B, T) or (B, 1, T, T)")
        if attention_mask.ndim == 4:
            attention_mask = attention_mask[:, 0, -1] == 0
        if attention_mask.ndim == 2 and attention_mask.shape[1] > length:
            return None
        if attention_mask.shape not in ((batch, length), (1, length)):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask has shape {shape}; expected (B, T) or (B, 1, T, T) with T = {length}")
        mask = attention_mask.bool()
        return None if bool(mask.all()) else mask.expand(batch, length)

    def prompt_mask(self, attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
        """(B, T), 0 for padding; all 1 under `ignore_batch_padding`."""
        mask = super().prompt_mask(attention_mask, input_ids)
        return torch.ones_like(mask) if self.quirks.ignore_batch_padding else mask
