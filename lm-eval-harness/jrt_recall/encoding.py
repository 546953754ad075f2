"""Prompts to ids as the published evaluation makes them: left truncation, left padding, context and continuation.

Shape legend: B prompts of a batch, L their common length in tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .cutting import token_ids


class Batch(NamedTuple):
    """ids and mask (B, L), lists of lists; mask is 1 on a prompt's own tokens; truncated: prompts that lost tokens."""

    ids: list[list[int]]
    mask: list[list[int]]
    truncated: int


def left_padded(tokenizer, prompts: Sequence[str], pad_token_id: int, limit: int | None = None) -> Batch:
    """Prompts cut on the left to `limit` tokens and padded on the left to the longest.

    The published runs pad with GPT-2's token 220, a blank, and let the models read it; masks are given so that ours
    need not. Raises ValueError for an empty list and for a prompt without tokens."""
    if not prompts:
        raise ValueError("a batch needs at least one prompt")
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens")
    kept = rows if limit is None else [row[-limit:] for row in rows]
    longest = max(map(len, kept))
    pads = [longest - len(row) for row in kept]
    return Batch(
        ids=[[pad_token_id] * pad + row for pad, row in zip(pads, kept, strict=True)],
        mask=[[0] * pad + [1] * len(row) for pad, row in zip(pads, kept, strict=True)],
        truncated=sum(len(row) > len(cut) for row, cut in zip(rows, kept, strict=True)),
    )


class Pair(NamedTuple):
    """A context and the continuation to be scored, as ids; mask over both (0 = padding), None without padding."""

    context: list[int]
    continuation: list[int]
    mask: list[int] | None


def context_and_continuation(
    tokenizer, context: str, continuation: str, pad_to: int | None = None, pad_token_id: int = 220
) -> Pair:
    """Both texts encoded together and split where the context ends; blanks that end the context go to the continuation.

    pad_to: the published JRT evaluation pads shorter pairs on the left to the encoder length (1024)."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = token_ids(tokenizer, stripped + continuation)
    split = len(token_ids(tokenizer, stripped))
    pads = 0 if pad_to is None else max(0, pad_to - len(whole))
    mask = [0] * pads + [1] * len(whole) if pads else None
    return Pair([pad_token_id] * pads + whole[:split], whole[split:], mask)
