"""Greedy answers to prompts, in batches whose rows do not influence each other.

A row's answer does not depend on its batch. Three optimisations save time, and none of them changes an answer:
`jrt.evaluate.batches`, `read_beginnings` and the early end in `decode` (docs/batching.md has their measured gains).

Shapes: B rows of a batch, T tokens of its longest prompt, G groups of rows that begin alike, P tokens of the longest
common beginning, R tokens that all rows read after it at once, N tokens that end an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jrt_recall import Protocol
from jrt_recall.fields import is_text
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
# Common beginnings are read once only if that saves at least this share of a batch's tokens: it costs a second model
# call.
SAVED = 0.25
# Multiply-adds that a device could do in the time of one decoding step. On a GPU a step's time is that of kernel
# launches, whatever the model's size. A CPU has no such fixed cost.
STEP = {"cuda": 2e12}


class Encoded(NamedTuple):
    """A prompt as token ids."""

    ids: list[int]
    truncated: int  # tokens that were cut off on the left
    problem: str = ""  # why the model cannot be asked this prompt; empty if it can


class Generation(NamedTuple):
    """A model's answer."""

    text: str  # up to the first stop string of the protocol
    new_tokens: int  # decoded tokens, the one that ended the row included
    finite: bool  # False if a logit was NaN
    seconds: float  # compute time of the batch, divided by its rows


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
    vocabulary: int | None = None,
    shortest: int = 1,
) -> list[Encoded]:
    """Encodes prompts, and cuts them on the left to at most `limit` tokens.

    Special tokens that the tokenizer puts before a text (a begin token) are kept. Those that it puts after a text (an
    end token) are left out, because the answer comes there. A document that spells out a special token, such as "</s>",
    is read as ordinary text.

    Args:
        limit: None keeps all tokens.
        vocabulary: how many token ids the model has embedding rows for; None accepts all ids.
        shortest: the fewest tokens that a prompt must have.

    Returns:
        One entry for each prompt; a prompt that cannot be asked has a `problem`.
    """
    front = _tokens_in_front(tokenizer)
    readable = [prompt if is_text(prompt) else "" for prompt in prompts]
    options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
    rows = tokenizer(readable, **options)["input_ids"] if readable else []
    # Unigram vocabularies find these in any text. One or two characters, such as a pad token "!", are ordinary text.
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {index: str(token) for index, token in added.items() if len(str(token)) > 2}
    special.pop(tokenizer.unk_token_id, None)
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        own = row if limit is None else row[-max(1, limit - len(front)) :]
        beyond = max((*front, *row), default=0)
        if not is_text(prompt):
            problem = "it holds a lone surrogate (half an emoji, or bytes that are not UTF-8)"
        elif not row:
            problem = "it has no tokens"
        elif spelled := [special[index] for index in special.keys() & set(row) if special[index] in prompt]:
            problem = f"its text {spelled[0]!r} becomes the special token of that name"
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
    for text in "a0.Z":  # a tokenizer may normalise a letter to nothing
        if bare := tokenizer(text, add_special_tokens=False)["input_ids"]:
            break
    else:
        return []
    found = tokenizer(text, return_special_tokens_mask=True)
    whole, added = found["input_ids"], found["special_tokens_mask"]
    # The text itself may be the unknown token, which some tokenizers also put in front: only the mask tells them apart.
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare and not added[place]]
    return list(whole[: places[0]]) if places else []


def prompt_limit(protocol: Protocol, max_length: int | None) -> int | None:
    """The most prompt tokens that the protocol allows and that fit into the model beside an answer; None if unbounded.

    max_length: the most tokens that the model reads, prompt and answer together; None: no bound.
    Raises ValueError if an answer of the protocol's length alone fills it."""
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
    """Pads rows on the left to the longest: ids and mask, both (B, T) int64; the mask is 1 on a row's own tokens."""
    texts = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(texts, batch_first=True, padding_value=pad_token_id, padding_side="left")
    own = [torch.ones_like(text) for text in texts]
    return ids.to(device), pad_sequence(own, batch_first=True, padding_side="left").to(device)


def answer(model: OpenModel, rows: Sequence[Sequence[int]], protocol: Protocol) -> list[Generation]:
    """Greedy continuations of prompts (token ids), one for each row, in their order.

    A batch that does not fit on the GPU is halved and tried again. Raises ValueError if the code of a model that is not
    ours failed, and torch.cuda.OutOfMemoryError if a single prompt does not fit."""
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
        # skip_special_tokens=True would also drop the pad token, which for the released models is the ordinary space
        # token.
        text = str(model.tokenizer.decode([token for token in tokens if token not in special])) if finite else ""
        for stop in protocol.stop:
            text = text.split(stop, maxsplit=1)[0]
        found.append(Generation(text, len(tokens), finite, 0.0))
    seconds = (time.perf_counter() - begun) / len(rows)
    return [generation._replace(seconds=seconds) for generation in found]


@lru_cache(maxsize=8)
def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> Tensor:
    """Token ids whose text contains a stop string, (N,) int64.

    Decoding ends at them only to save time. The answer is cut at the stop string in the text, because a stop string can
    also span several tokens."""
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return torch.tensor([index for index, text in enumerate(texts) if any(s in text for s in stop)], dtype=torch.long)


def end_tokens(model: OpenModel) -> set[int]:
    """Token ids at which the model's own `generate` ends a row (its `eos_token_id`)."""
    ends = model.model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


class Start(NamedTuple):
    """The arguments with which `generate` starts or continues a batch.

    Args:
        cache: the model's state after the tokens that it has already read; None if it has read none. A cache with keys
            and values covers the first columns of `ids`. A recurrent cache has no token dimension, and `ids` come after
            it.
        forced: for each row, the end of its prompt. These tokens are fed in the first steps of decoding, in place of
            the tokens that the model would choose.
    """

    ids: Tensor  # (B, T), padded on the left
    mask: Tensor  # (B, T), 1 on a row's own tokens
    cache: Cache | None
    forced: list[list[int]]


def read_beginnings(model: OpenModel, rows: Sequence[Sequence[int]], ends: set[int]) -> Start | None:
    """Reads the common beginning of each group of rows once: several questions on one page share the reading of the
    page.

    The state after a group's common tokens is copied to each of its rows. After it, all rows read as many of their own
    tokens as the shortest has in one call; the remaining ones are forced in the first steps of decoding
    (`Start.forced`). This way no padding stands in the middle of a row, where recurrent layers could not skip it.

    Args:
        ends: tokens at which `generate` ends a row; a prompt with such a token cannot be forced.

    Returns:
        None if this saves too little time, or is not possible with these prompts or this model. The caller then reads
        each prompt whole.
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
    # One step of `generate` in place of a forward call, because it computes each model's position ids under left
    # padding.
    cache = _generate(model, ids, mask, max_new_tokens=1)[CACHE]
    row_of = torch.tensor(owner, device=model.device)
    select_rows(cache, row_of)
    own = torch.tensor([tokens[:at_once] for tokens in rest], device=model.device)  # (B, R)
    if keeps_no_tokens(cache):
        return Start(own, torch.ones_like(own), cache, forced)
    return Start(torch.cat([ids[row_of], own], 1), torch.cat([mask[row_of], torch.ones_like(own)], 1), cache, forced)


def outweighs(saved: int, steps: int, parameters: int, device: str) -> bool:
    """Whether reading `saved` fewer tokens saves more time than `steps` additional decoding steps cost."""
    return saved * parameters > steps * STEP.get(device, 0)


class NaNWatch(LogitsProcessor):
    """Records which rows had a NaN among their logits at any step, on the device, so that no step waits for the GPU."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)  # (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows = self.rows | scores.isnan().any(1)
        return scores


class Pause(StoppingCriteria):
    """Ends a row at its end token or length limit, and the `generate` call when all rows have ended.

    After each step it also adapts the number of threads to the free cores (`FreeCores.look`).

    tokens: (N,) ids that end a row; forced: (B,) how many tokens of each row are forced (they cannot end it); limits:
    (B,) new tokens after which a row ends; early: end the call as soon as half of the rows have ended."""

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
    """Returns for each row its greedy continuation, at most `max_new_tokens`, and whether its logits never held a NaN.

    In many batches half of the rows end after a few tokens, while one row continues to the limit. So on a CPU
    `generate` stops when half of the rows have ended, and is called again with the states of the other rows. A GPU
    takes as long for fewer rows, so there it runs to the end.

    ends: (N,) token ids that end a row; the continuation includes them."""
    tokens: list[list[int]] = [[] for _ in range(len(start.ids))]
    finite = [True] * len(tokens)
    rows = list(range(len(tokens)))  # the rows that have not ended
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
    """The `Start` for the rows that have not ended, given as indices. Their cache covers all columns but the last.

    If `generate` filled up short prompts (`jrt.short_prompts`), the cache covers more columns than `start.ids` has.
    They are added on the left; their ids are never read again, so any id will do."""
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
    """Calls transformers' `generate` with greedy decoding; the output has `sequences` and the cache.

    Raises ValueError if the code of a model that is not ours failed."""
    if not model.mode.cache:
        options["use_cache"] = False
    generate: Any = model.model.generate  # transformers does not annotate it
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
