"""Greedy answers to a batch of prompts: common beginnings read once, left padding with a mask, an end where every row has
ended.

Rows are independent: a row's answer does not depend on its batch, so batches may be formed, cut and repeated at will.

Shapes: B rows of a batch, T tokens of its longest prompt.
"""

import logging
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jrt_recall import Protocol
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jrt.evaluate import shared_prefix
from jrt.evaluate.decoding import Start, decode
from jrt.evaluate.shared_prefix import left_padded
from jrt.evaluate.subjects import Subject

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A prompt as ids; truncated: tokens that were cut off on the left."""

    ids: list[int]
    truncated: int


class Generation(NamedTuple):
    """What a model went on with, up to the protocol's stop. finite: False where a logit was NaN; seconds: its share."""

    text: str
    new_tokens: int
    finite: bool
    seconds: float


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int | None) -> list[Encoded]:
    """Prompts as ids with the tokenizer's own special tokens (as lm-eval does), cut on the left to `limit` tokens.

    Raises ValueError for a prompt without tokens."""
    rows = tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} has no tokens")
    if limit is None:
        return [Encoded(row, 0) for row in rows]
    return [Encoded(row[-limit:], max(0, len(row) - limit)) for row in rows]


def prompt_limit(protocol: Protocol, max_length: int | None) -> int | None:
    """The most prompt tokens: the protocol's bound and the model's, which has to hold the answer as well.

    Raises ValueError where the model cannot hold an answer of the protocol's length."""
    bounds = [protocol.max_prompt_tokens] if protocol.max_prompt_tokens is not None else []
    if max_length is not None:
        if max_length <= protocol.max_new_tokens:
            raise ValueError(
                f"the model reads {max_length} tokens: no prompt fits beside the {protocol.max_new_tokens} new tokens "
                f"of {protocol.name}"
            )
        bounds.append(max_length - protocol.max_new_tokens)
    return min(bounds, default=None)


def answer(subject: Subject, rows: Sequence[Sequence[int]], protocol: Protocol) -> list[Generation]:
    """Greedy continuations of prompts (ids), one for each row.

    A batch that does not fit on the GPU is halved and tried again."""
    try:
        return _answer(subject, rows, protocol)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(rows) // 2
    logger.warning("%d prompts do not fit on the GPU at once: going on with %d", len(rows), half)
    return answer(subject, rows[:half], protocol) + answer(subject, rows[half:], protocol)


def _answer(subject: Subject, rows: Sequence[Sequence[int]], protocol: Protocol) -> list[Generation]:
    begun = time.perf_counter()
    ends = end_tokens(subject)
    start = shared_prefix.read(subject, rows, ends)
    if start is None:
        start = Start(*left_padded(rows, subject.pad_token_id, subject.device), None, [[] for _ in rows])
    stops = stop_tokens(subject.tokenizer, protocol.stop).tolist()
    every = torch.tensor([*stops, *ends], dtype=torch.long, device=subject.device)
    decoded = decode(subject, start, every, protocol.max_new_tokens)
    special = {index for index, token in subject.tokenizer.added_tokens_decoder.items() if token.special}
    found = []
    for tokens, finite in decoded:
        # Not skip_special_tokens: the released models pad with an ordinary token, a blank, which answers need.
        text = subject.tokenizer.decode([token for token in tokens if token not in special])
        found.append(Generation(until(text, protocol.stop) if finite else "", len(tokens), finite, 0.0))
    seconds = (time.perf_counter() - begun) / len(rows)
    return [generation._replace(seconds=seconds) for generation in found]


def until(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    for ending in stop:
        text = text.split(ending, maxsplit=1)[0]
    return text


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> Tensor:
    """Ids whose own text holds a stop string, (N,).

    Ending at them saves time only: the answer is cut from the text, also where a stop string spans tokens."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return torch.tensor([index for index, text in enumerate(texts) if any(s in text for s in stop)], dtype=torch.long)


def end_tokens(subject: Subject) -> set[int]:
    """Ids at which the model's own `generate` ends a row."""
    ends = subject.model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
