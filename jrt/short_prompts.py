"""What a prefix model does with prompts shorter than its encoder, before transformers' `generate` takes over.

The released JRT models never saw a short encoder in training, so how a short prompt is filled up decides their scores
(paper Table 4: 61.9, 82.0 or 76.3 on FDA-512). The choice is explicit and travels with the model.

Shapes: B batch, T prompt columns, T' columns after filling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHORT_PROMPTS = {
    "none": "encode what is there",
    "pad": "fill up to the encoder's length with a space token on the left (the release's default)",
    "repeat": "fill up with the prompt itself, read again from its end (the paper's length-512 cells)",
    "iterate": "encode what is there, prompt and answer so far, again at each step",
}
SPACE_TOKEN = 220  # GPT-2's token for one space, the release's pad


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the model will read them."""

    input_ids: Tensor  # (B, T')
    attention_mask: Tensor  # (B, T') bool, False: padding, to the left
    prefix_length: Tensor | None  # (B,) tokens that each row's encoder reads; None: again as many as fit, at each step
    blank_length: Tensor | None  # (B,) tokens of each row that fill it up; None: no such tokens


def check_short_prompt(name: str | None) -> None:
    """Raises ValueError for a name that SHORT_PROMPTS does not have."""
    if name is not None and name not in tuple(SHORT_PROMPTS):
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
        The filled batch; rows keep their own tokens last, so that new tokens follow them.
    """
    check_short_prompt(short_prompt)
    own = attention_mask.sum(1)  # (B,)
    if short_prompt == "iterate":
        return Prompt(input_ids, attention_mask, None, None)
    if short_prompt == "none":
        return Prompt(input_ids, attention_mask, own.clamp(max=enc_length), None)
    rows = [ids[mask] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    filled = [_filled(row, enc_length, short_prompt, pad_token) for row in rows]
    lengths = torch.tensor([len(row) for row in filled], device=input_ids.device)
    width = int(lengths.max())
    columns = torch.arange(width, device=input_ids.device)
    ids = input_ids.new_full((len(rows), width), pad_token)
    for target, row in zip(ids, filled, strict=True):
        target[width - len(row) :] = row
    blank = (enc_length - own).clamp(min=0) if short_prompt == "pad" else None
    return Prompt(ids, columns >= width - lengths[:, None], lengths.clamp(max=enc_length), blank)


def _filled(row: Tensor, enc_length: int, short_prompt: str, pad_token: int) -> Tensor:
    missing = enc_length - len(row)
    if missing <= 0:
        return row
    if short_prompt == "pad":
        return torch.cat([row.new_full((missing,), pad_token), row])
    return row.repeat(-(-enc_length // len(row)))[-enc_length:]
