"""Greedy decoding of a batch whose rows end at different times, by transformers' `generate`.

Half a batch often has its answer after a few tokens while one row goes on to the limit. So on a CPU `generate` pauses whenever
half of its rows have ended, and goes on with the states of the others. On a GPU a step of fewer rows is no faster.

Shapes: B rows, K rows that go on, T tokens of a prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from jrt.evaluate.subjects import Subject
from jrt.modeling_jrt import CACHE

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


class Start(NamedTuple):
    """Where decoding starts. cache: has read the first columns of `ids`; None: has read nothing.

    forced: what is left of each row's prompt, to be read in the first steps of decoding."""

    ids: Tensor  # (B, T), padded on the left
    mask: Tensor  # (B, T), 1 on a row's own tokens
    cache: Cache | None
    forced: list[list[int]]


class Decoded(NamedTuple):
    """A row's new tokens, its end token included; finite: False where a logit was NaN."""

    tokens: list[int]
    finite: bool


class ForcedTokens(LogitsProcessor):
    """Lets each row read the rest of its prompt before it chooses tokens itself; for one call of `generate`."""

    def __init__(self, forced: Sequence[Sequence[int]]) -> None:
        self.forced, self.steps = forced, 0  # not read off input_ids: short prompts may have been filled up

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, self.steps = self.steps, self.steps + 1
        rows = [row for row, tokens in enumerate(self.forced) if step < len(tokens)]
        if not rows:
            return scores
        scores = scores.clone()
        scores[rows] = float("-inf")
        scores[rows, [self.forced[row][step] for row in rows]] = 0.0
        return scores


class NaNWatch(LogitsProcessor):
    """Notes the rows that ever had a NaN among their logits, without waiting for the GPU."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (B,) bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken = scores.isnan().any(1)
        self.rows = broken if self.rows is None else self.rows | broken
        return scores


class Pause(StoppingCriteria):
    """Ends rows at any of the tokens or their limit, and the call when all have ended, or half of them if `early`."""

    def __init__(self, tokens: Tensor, forced: Tensor, limits: Tensor, early: bool) -> None:
        self.tokens, self.forced, self.limits, self.early = tokens, forced, limits, early
        self.steps = 0
        self.ended: Tensor | None = None  # (B,) bool

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.steps += 1
        new = self.steps - self.forced  # (B,)
        ended = (new > 0) & torch.isin(input_ids[:, -1], self.tokens) | (new >= self.limits)
        self.ended = ended if self.ended is None else self.ended | ended
        if self.early and len(self.ended) > 1 and 2 * int(self.ended.sum()) >= len(self.ended):
            return torch.ones_like(self.ended)
        return self.ended


def decode(subject: Subject, start: Start, ends: Tensor, max_new_tokens: int) -> list[Decoded]:
    """Each row's greedy continuation, up to one of the tokens `ends` (N,) or `max_new_tokens`."""
    tokens: list[list[int]] = [[] for _ in range(len(start.ids))]
    finite = [True] * len(tokens)
    rows = list(range(len(tokens)))  # those that go on
    early = subject.copies_states and subject.device.type == "cpu"
    while rows:
        forced = [len(prompt) for prompt in start.forced]
        limits = [max_new_tokens - len(tokens[row]) for row in rows]
        watch = NaNWatch()
        pause = Pause(
            ends,
            torch.tensor(forced, device=ends.device),
            torch.tensor(limits, device=ends.device),
            early,
        )
        output = subject.model.generate(
            input_ids=start.ids,
            attention_mask=start.mask,
            max_new_tokens=max(map(sum, zip(forced, limits, strict=True))),
            pad_token_id=subject.pad_token_id,
            stopping_criteria=StoppingCriteriaList([pause]),
            logits_processor=LogitsProcessorList([watch, ForcedTokens(start.forced)]),
            return_dict_in_generate=True,
            **{CACHE: start.cache},
            **GREEDY,
        )
        new = output.sequences[:, start.ids.shape[1] :].tolist()
        broken, ended = watch.rows.tolist(), pause.ended.tolist()
        stops = set(ends.tolist())
        for index, row in enumerate(rows):
            own = new[index][forced[index] :][: limits[index]]
            tokens[row] += own[: next((place + 1 for place, token in enumerate(own) if token in stops), len(own))]
            finite[row] &= not broken[index]
        going_on = [index for index, done in enumerate(ended) if not done]
        if going_on:
            start = _continued(subject, start, output, going_on)
        rows = [rows[index] for index in going_on]
    return [Decoded(*one) for one in zip(tokens, finite, strict=True)]


def _continued(subject: Subject, start: Start, output, rows: list[int]) -> Start:
    """The rows that go on, with the states they have. Their cache has read all columns but the last.

    Short prompts may have been filled up inside `generate`, so that the cache has read more columns than we know of:
    what stands in them does not matter any more."""
    kept = torch.tensor(rows, device=start.ids.device)
    cache = output[CACHE]
    cache.batch_select_indices(kept)
    ids = output.sequences[kept]
    steps = ids.shape[1] - start.ids.shape[1]
    width = cache.get_seq_length() + 1
    mask = torch.cat([start.mask[kept], start.mask.new_ones(len(rows), steps)], dim=1)
    missing = width - ids.shape[1]
    if missing:
        ids = torch.cat([ids.new_full((len(rows), missing), subject.pad_token_id), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(rows), missing), mask], dim=1)
    forced = [start.forced[row][steps:] for row in rows]
    return Start(ids, mask, cache, forced)
