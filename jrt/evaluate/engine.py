"""Greedy answers to many prompts: length-sorted batches, left padding with a mask, an end where every row has ended.

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
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

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


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, longest first: little padding, and a batch that does not fit shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


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
    start = time.perf_counter()
    ids, mask = left_padded(rows, subject.pad_token_id, subject.device)
    stops = stop_tokens(subject.tokenizer, protocol.stop).to(subject.device)
    watch = NaNWatch()
    sequences = subject.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=protocol.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=subject.pad_token_id,
        stopping_criteria=StoppingCriteriaList([LastTokenIn(stops)]),
        logits_processor=LogitsProcessorList([watch]),
    )
    new = sequences[:, ids.shape[1] :].tolist()
    broken = watch.rows.tolist() if watch.rows is not None else [False] * len(rows)
    seconds = (time.perf_counter() - start) / len(rows)
    ends = set(stops.tolist()) | end_tokens(subject)
    special = {index for index, token in subject.tokenizer.added_tokens_decoder.items() if token.special}
    found = []
    for row, bad in zip(new, broken, strict=True):
        kept = row[: next((index + 1 for index, token in enumerate(row) if token in ends), len(row))]
        # Not skip_special_tokens: the released models pad with an ordinary token, a blank, which answers need.
        text = subject.tokenizer.decode([token for token in kept if token not in special])
        found.append(Generation("" if bad else until(text, protocol.stop), len(kept), not bad, seconds))
    return found


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T); mask is 1 on a row's own tokens."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


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


class LastTokenIn(StoppingCriteria):
    """A row ends with any of these tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


class NaNWatch(LogitsProcessor):
    """Notes the rows that ever had a NaN among their logits, without waiting for the GPU."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (B,) bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken = scores.isnan().any(1)
        self.rows = broken if self.rows is None else self.rows | broken
        return scores
