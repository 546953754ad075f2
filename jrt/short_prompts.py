"""The rules by which a prompt that is shorter than the prefix encoder is filled up before a model reads it.

The released JRT models were trained only with prefixes of the encoder's full length, so the rule decides their scores
on short prompts (paper Table 4: 61.9, 82.0 or 76.3 on FDA-512). A model's configuration names its rule, and `generate`
can name another.

Shapes: B batch, T prompt columns, T' columns after filling.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jrt.mixers import MIXERS, TokenBatch
from jrt.mixers.linear_attention import PrefixLinearAttention

SHORT_PROMPTS = {
    "none": "encode what is there",
    "pad": "fill up to the encoder's length with a space token on the left (the release's default)",
    "repeat": "fill up with the prompt itself, read again from its end (the paper's length-512 cells)",
    "iterate": "encode what is there, prompt and answer so far, again at each step",
}
SPACE_TOKEN = 220  # GPT-2's token for one space, with which the release pads


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the model reads them. A row's own tokens are those that the mask does not hide."""

    input_ids: Tensor  # (B, T')
    attention_mask: Tensor | None  # (B, T') bool, False: padding, to the left; None: no padding
    prefix_length: Tensor | None  # (B,) tokens that each row's encoder reads; None: as many as fit, again at each step
    blank_length: Tensor | None  # (B,) how many of each row's first own tokens are pads; None: no pads

    def followed_by(self, input_ids: Tensor, mask: Tensor) -> Prompt:
        """The prompts, followed by tokens that were generated after them; input_ids and mask: (B, S)."""
        ids = torch.cat([self.input_ids, input_ids], dim=1)
        own = None if self.attention_mask is None else torch.cat([self.attention_mask, mask], dim=1)
        return Prompt(ids, own, self.prefix_length, self.blank_length)


def check_short_prompt(name: str) -> None:
    """Raises ValueError for a name that SHORT_PROMPTS does not have."""
    if name not in tuple(SHORT_PROMPTS):
        raise ValueError(f"short_prompt={name!r}: expected one of {', '.join(SHORT_PROMPTS)}")


def fill_short_prompts(
    input_ids: Tensor, attention_mask: Tensor, enc_length: int, short_prompt: str, pad_token: int = SPACE_TOKEN
) -> Prompt:
    """Fills each row that has fewer than `enc_length` own tokens, by the named rule.

    Args:
        input_ids, attention_mask: (B, T), padded on the left; the mask is bool.
        enc_length: tokens that the prefix encoder reads.
        short_prompt: a key of SHORT_PROMPTS.
        pad_token: the token that "pad" fills with.

    Returns:
        The filled batch. The prompt stands at the end of each row, so that new tokens follow it.

    Raises:
        ValueError: an unknown rule.
    """
    check_short_prompt(short_prompt)
    own = attention_mask.sum(1)  # (B,)
    if short_prompt == "iterate":
        return Prompt(input_ids, attention_mask, None, None)
    if short_prompt == "none":
        return Prompt(input_ids, attention_mask, own.clamp(max=enc_length), None)
    lengths = own.clamp(min=enc_length)  # (B,) after filling
    back = torch.arange(int(lengths.max()) - 1, -1, -1, device=own.device)  # (T',) columns that follow each column
    last = input_ids.shape[1] - 1
    source = back % own[:, None] if short_prompt == "repeat" else back.clamp(max=last).expand(len(own), -1)  # (B, T')
    ids = input_ids.gather(1, last - source)
    if short_prompt == "pad":
        ids = ids.masked_fill(back >= own[:, None], pad_token)
    blank = lengths - own if short_prompt == "pad" else None
    return Prompt(ids, back < lengths[:, None], lengths.clamp(max=enc_length), blank)


@dataclass(frozen=True, kw_only=True)
class PaddedBatch(TokenBatch):
    """A `TokenBatch` in which some tokens are blank: prefix linear attention sets their keys to zero."""

    blank: Tensor | None  # (B, T) bool, True: the key is zero; None: none is


class PaddedPrefixLinearAttention(PrefixLinearAttention):
    """Prefix linear attention in which the keys of blank tokens are zero, in the encoder and in the decoder.

    A blank token is not ignored: phi(0) = [1, 0, ...], so it adds its value to the state with weight 1, as in the
    release.
    """

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


PADDED_MIXERS: MutableMapping[str, type[nn.Module]] = ChainMap({"P": PaddedPrefixLinearAttention}, MIXERS)


def padded(batch: TokenBatch, pads: Tensor) -> PaddedBatch:
    """The batch with blank tokens: in each row, the first `pads` (B,) of its own tokens."""
    return PaddedBatch(**vars(batch), blank=(batch.positions >= 0) & (batch.positions < pads[:, None]))
