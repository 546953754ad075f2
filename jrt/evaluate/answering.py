"""Greedy answers to prompts, in batches whose rows do not influence each other.

A row's answer does not depend on its batch, so batches may be formed, cut and repeated at will. Three things save time, and
none of them changes an answer (docs/batching.md has what each is worth):

- `jrt.evaluate.batches`: prompts that begin alike, or are of like length, are read together;
- `read_beginnings`: what several prompts begin with is read once, and the state after it is copied to each of them;
- `decode`: on a CPU, decoding pauses when half of the rows have ended, and goes on with the others.

Shapes: B rows of a batch, T tokens of its longest prompt, G groups of rows that begin alike, P tokens of the longest common
beginning, R tokens that all rows read after it at once, N tokens that end an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jrt_recall import Protocol, contains
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from jrt.evaluate.batches import groups
from jrt.evaluate.models import OpenModel
from jrt.foreign.caches import cache_argument, keeps_no_tokens, select_rows
from jrt.foreign.greedy import ForcedTokens
from jrt.recurrent_cache import CACHE
from jrt.system.breaks import BREAKS, one_line
from jrt.system.cores import FreeCores

logger = logging.getLogger(__name__)

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
SAVED = 0.25  # the least part of a batch's tokens that is worth a second call of the model
STEP = {"cuda": 2e12}  # multiply-adds in the time of one decoding step: on a GPU launches take it, on a CPU it is short


class Encoded(NamedTuple):
    """A prompt as ids. truncated: tokens that were cut off; problem: why it cannot be asked, empty where it can."""

    ids: list[int]
    truncated: int
    problem: str = ""


class Generation(NamedTuple):
    """What a model wrote, up to the protocol's stop. finite: False where a logit was NaN; seconds: its share of the batch."""

    text: str
    new_tokens: int
    finite: bool
    seconds: float


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
    vocabulary: int | None = None,
    shortest: int = 1,
) -> list[Encoded]:
    """Prompts as ids, cut on the left to `limit` tokens.

    What the tokenizer puts in front of a text (a begin token) stays in front; what it puts behind one (an end token, say)
    is left out, because the answer comes there. The text of a special token in a document is text.

    vocabulary: ids that the model has rows for; None: all. shortest: tokens that a prompt has to have. A prompt that cannot
    be asked says so in its `problem`."""
    front = _tokens_in_front(tokenizer)
    readable = [prompt if is_text(prompt) else "" for prompt in prompts]
    options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
    rows = tokenizer(readable, **options)["input_ids"] if readable else []
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        own = row if limit is None else row[-max(1, limit - len(front)) :]
        beyond = max(row, default=0)
        if not is_text(prompt):
            problem = "it holds a lone surrogate (half an emoji, or bytes that are not UTF-8)"
        elif not row:
            problem = "it has no tokens"
        elif vocabulary is not None and beyond >= vocabulary:
            problem = f"token {beyond} of it is beyond the model's {vocabulary} rows"
        elif len(front) + len(own) < shortest:
            problem = "it has one token, and the model reads such a prompt on top of what it read before"
        else:
            problem = ""
        found.append(Encoded([*front, *own], len(row) - len(own), problem))
    return found


def _tokens_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts in front of every text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return list(whole[: places[0]]) if places else []


def is_text(text: str) -> bool:
    """False for a string with a lone surrogate, which no encoding of text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def reachable(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], stop: Sequence[str]) -> bool:
    """Whether a model with this tokenizer could write any of the answers.

    No generation holds a stop string, and none holds a spelling that the tokenizer normalises away."""
    for answer in answers:
        if is_text(answer) and not any(ending in answer for ending in stop):
            ids = tokenizer(f"x {answer} x", add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if contains(str(tokenizer.decode(ids)), answer):
                return True
    return False


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


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, (rows, tokens of the longest); the mask is 1 on a row's own tokens."""
    texts = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(texts, batch_first=True, padding_value=pad_token_id, padding_side="left")
    own = [torch.ones_like(text) for text in texts]
    return ids.to(device), pad_sequence(own, batch_first=True, padding_side="left").to(device)


def answer(model: OpenModel, rows: Sequence[Sequence[int]], protocol: Protocol) -> list[Generation]:
    """Greedy continuations of prompts (ids), one for each row.

    A batch that does not fit on the GPU is halved and tried again."""
    try:
        with model.cores:
            return _answer(model, rows, protocol)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(rows) // 2
    logger.warning("%d prompts do not fit on the GPU at once: going on with %d", len(rows), half)
    return answer(model, rows[:half], protocol) + answer(model, rows[half:], protocol)


def _answer(model: OpenModel, rows: Sequence[Sequence[int]], protocol: Protocol) -> list[Generation]:
    begun = time.perf_counter()
    ends = end_tokens(model)
    start = read_beginnings(model, rows, ends)
    if start is None:
        start = Start(*left_padded(rows, model.pad_token_id, model.device), None, [[] for _ in rows])
    stops = stop_tokens(model.tokenizer, protocol.stop).tolist()
    every = torch.tensor([*stops, *ends], dtype=torch.long, device=model.device)  # (N,)
    special = {index for index, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    found = []
    for tokens, finite in decode(model, start, every, protocol.max_new_tokens):
        # Not skip_special_tokens: the released models pad with an ordinary token, a blank, which answers need.
        text = str(model.tokenizer.decode([token for token in tokens if token not in special])) if finite else ""
        for stop in protocol.stop:
            text = text.split(stop, maxsplit=1)[0]
        found.append(Generation(text, len(tokens), finite, 0.0))
    seconds = (time.perf_counter() - begun) / len(rows)
    return [generation._replace(seconds=seconds) for generation in found]


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> Tensor:
    """Ids whose own text holds a stop string, (N,).

    Ending at them saves time only: the answer is cut from the text, also where a stop string spans tokens."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return torch.tensor([index for index, text in enumerate(texts) if any(s in text for s in stop)], dtype=torch.long)


def end_tokens(model: OpenModel) -> set[int]:
    """Ids at which the model's own `generate` ends a row."""
    ends = model.model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


class Start(NamedTuple):
    """Where decoding starts.

    Args:
        cache: what was read before: the first columns of `ids`, or, where the cache keeps no tokens, a text that `ids` goes
            on from. None: nothing was read.
        forced: the rest of each row's prompt, which it reads in the first steps of decoding.
    """

    ids: Tensor  # (B, T), padded on the left
    mask: Tensor  # (B, T), 1 on a row's own tokens
    cache: Cache | None
    forced: list[list[int]]


def read_beginnings(model: OpenModel, rows: Sequence[Sequence[int]], ends: set[int]) -> Start | None:
    """Reads once what several rows begin with: the questions on one page read the page together.

    The state after a group's common tokens is copied to each of its rows. Then all rows read as many of their own tokens
    as the shortest has, and the others are forced on them in the first steps of decoding. So no padding stands inside a
    text, which recurrent layers could not skip.

    Args:
        ends: tokens at which `generate` ends a row, which therefore cannot be forced.

    Returns:
        None where that saves little, a prompt has one token, or the model's states cannot be copied from row to row.
    """
    if not model.mode.sharing:
        return None
    found = groups(rows)
    saved = sum(group.common * (len(group.rows) - 1) for group in found)
    if saved < SAVED * sum(map(len, rows)) or min(group.common for group in found) < 1:
        return None
    rest: list[list[int]] = [[]] * len(rows)
    owner = [0] * len(rows)
    for number, group in enumerate(found):
        for index in group.rows:
            rest[index], owner[index] = list(rows[index][group.common :]), number
    at_once = min(map(len, rest))
    forced = [tokens[at_once:] for tokens in rest]
    if not outweighs(saved, max(map(len, forced)), model.parameters, model.device.type):
        return None
    if any(token in ends for tokens in forced for token in tokens):
        return None
    beginnings = [rows[group.rows[0]][: group.common] for group in found]
    ids, mask = left_padded(beginnings, model.pad_token_id, model.device)  # (G, P)
    # One step of `generate`, not a forward call: it knows each model's positions under left padding.
    cache = _generate(model, ids, mask, max_new_tokens=1)[CACHE]
    row_of = torch.tensor(owner, device=model.device)
    select_rows(cache, row_of)
    own = torch.tensor([tokens[:at_once] for tokens in rest], device=model.device)  # (B, R)
    if keeps_no_tokens(cache):
        return Start(own, torch.ones_like(own), cache, forced)
    return Start(torch.cat([ids[row_of], own], 1), torch.cat([mask[row_of], torch.ones_like(own)], 1), cache, forced)


def outweighs(saved: int, steps: int, parameters: int, device: str) -> bool:
    """Whether reading `saved` tokens fewer is worth more time than `steps` more decoding steps cost."""
    return saved * parameters > steps * STEP.get(device, 0)


class NaNWatch(LogitsProcessor):
    """Notes the rows that ever had a NaN among their logits, without waiting for the GPU."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)  # (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows = self.rows | scores.isnan().any(1)
        return scores


class Pause(StoppingCriteria):
    """Ends rows at any of the tokens or their limit, and the call when all have ended, or half of them if `early`.

    Between two steps it looks how many cores are free."""

    def __init__(self, tokens: Tensor, forced: Tensor, limits: Tensor, early: bool, cores: FreeCores) -> None:
        self.tokens, self.forced, self.limits, self.early = tokens, forced, limits, early  # (N,), (B,), (B,)
        self.cores = cores
        self.steps = 0
        self.ended = torch.zeros_like(forced, dtype=torch.bool)  # (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.cores.look()
        self.steps += 1
        new = self.steps - self.forced  # (B,)
        self.ended = self.ended | (new > 0) & torch.isin(input_ids[:, -1], self.tokens) | (new >= self.limits)
        if self.early and len(self.ended) > 1 and 2 * int(self.ended.sum()) >= len(self.ended):
            return torch.ones_like(self.ended)
        return self.ended


def decode(model: OpenModel, start: Start, ends: Tensor, max_new_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """Each row's greedy continuation, up to one of the tokens `ends` (N,), which is included, or `max_new_tokens`; and
    whether all of its logits were finite.

    Half a batch often has its answer after a few tokens while one row goes on to the limit. So on a CPU `generate` pauses
    when half of its rows have ended, and goes on with the states of the others. A GPU is no faster on fewer rows."""
    tokens: list[list[int]] = [[] for _ in range(len(start.ids))]
    finite = [True] * len(tokens)
    rows = list(range(len(tokens)))  # those that go on
    early = model.copies_states and model.device.type == "cpu"
    stops = set(ends.tolist())
    while rows:
        forced = [len(prompt) for prompt in start.forced]
        limits = [max_new_tokens - len(tokens[row]) for row in rows]
        watch = NaNWatch(len(rows), ends.device)
        counts = torch.tensor([forced, limits], device=ends.device)  # (2, B)
        pause = Pause(ends, counts[0], counts[1], early, model.cores)
        output = _generate(
            model,
            start.ids,
            start.mask,
            max_new_tokens=max(map(sum, zip(forced, limits, strict=True))),
            stopping_criteria=StoppingCriteriaList([pause]),
            logits_processor=LogitsProcessorList([watch, ForcedTokens(start.forced)]),
            **({} if start.cache is None else {cache_argument(model.model): start.cache}),
        )
        new = output.sequences[:, start.ids.shape[1] :].tolist()
        for index, (row, broken) in enumerate(zip(rows, watch.rows.tolist(), strict=True)):
            own = new[index][forced[index] :][: limits[index]]
            tokens[row] += own[: next((place + 1 for place, token in enumerate(own) if token in stops), len(own))]
            finite[row] &= not broken
        going_on = [index for index, ended in enumerate(pause.ended.tolist()) if not ended]
        if going_on:
            start = _continued(model, start, output, going_on)
        rows = [rows[index] for index in going_on]
    return zip(tokens, finite, strict=True)


def _continued(model: OpenModel, start: Start, output: Any, rows: list[int]) -> Start:
    """The rows that go on, with the states they have. Their cache has read all columns but the last.

    Where `generate` filled up short prompts, the cache has read more columns than `start` has; any id may stand there."""
    kept = torch.tensor(rows, device=start.ids.device)
    cache = output[CACHE]
    select_rows(cache, kept)
    ids = output.sequences[kept]
    steps = ids.shape[1] - start.ids.shape[1]
    forced = [start.forced[row][steps:] for row in rows]
    if keeps_no_tokens(cache):
        return Start(ids[:, -1:], torch.ones_like(ids[:, -1:]), cache, forced)
    mask = torch.cat([start.mask[kept], start.mask.new_ones(len(rows), steps)], dim=1)
    missing = cache.get_seq_length() + 1 - ids.shape[1]
    if missing:
        ids = torch.cat([ids.new_full((len(rows), missing), model.pad_token_id), ids], dim=1)
        mask = torch.cat([mask.new_ones(len(rows), missing), mask], dim=1)
    return Start(ids, mask, cache, forced)


def _generate(model: OpenModel, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """transformers' greedy `generate`, with the cache in what it returns.

    Raises ValueError where the code of a model that is not ours fails."""
    if not model.mode.cache:
        options["use_cache"] = False
    generate: Any = model.model.generate  # transformers gives it no type of its own
    try:
        return generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=model.pad_token_id,
            return_dict_in_generate=True,
            **options,
            **GREEDY,
        )
    except BREAKS as error:
        if model.ours or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ValueError(f"{model.spec.name} cannot be run: {one_line(error)}") from error
