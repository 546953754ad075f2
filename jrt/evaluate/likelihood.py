"""Log-likelihoods of continuations, such that a prefix encoder never reads the tokens that are scored.

lm-eval's own code pads on the right and passes neither lengths nor a mask, so a prefix encoder would read padding and
the continuation itself. Here the encoder reads the context only. The quirk `leak_continuation` computes as the
published numbers were measured: the encoder also reads the continuation, all but its last token (docs/released.md).

Shapes: B pairs, T their longest row, K the longest continuation, V vocabulary rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from jrt.evaluate.answering import left_padded
from jrt.evaluate.batches import Limits, batches
from jrt.modeling_jrt import JRTForCausalLM
from jrt.short_prompts import fill_short_prompts
from jrt.training.objective import greedy_answers


class Scored(NamedTuple):
    """The score of a continuation: the sum of its tokens' log-probabilities (in nats), and whether greedy decoding
    gives it."""

    log_likelihood: float
    is_greedy: bool


class Row(NamedTuple):
    """A context and its continuation, as the model reads them.

    Args:
        ids: the context, filled up if it is short, then the continuation without its last token, which is only
            predicted.
        prefix: how many of the ids the encoder reads.
        blank: how many of the ids, from the start, are pads of the rule "pad" (`jrt.short_prompts`).
    """

    ids: list[int]
    continuation: list[int]
    prefix: int
    blank: int


def log_likelihoods(
    model: JRTForCausalLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, pad_token_id: int = 0
) -> list[Scored]:
    """Scores pairs of context and continuation (token ids); the results are in the order of the pairs.

    Contexts shorter than the encoder are filled up by the model's own `short_prompt` rule.

    Args:
        batch_size: rows in one call of the model.
        pad_token_id: the id in padded columns, which are masked.

    Raises:
        ValueError: a context or a continuation is empty.
    """
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {number}: context and continuation need at least one token each")
    rows = [(number, row) for number, pair in enumerate(pairs) for row in _rows(model, list(pair[0]), list(pair[1]))]
    # With these quirks the model reads padding as tokens, so a batch holds only rows of equal length.
    pads = not (model.quirks.blank_padding or model.quirks.ignore_batch_padding)
    found = [Scored(0.0, True)] * len(pairs)
    for batch in batches([row.ids for _, row in rows], Limits(batch_size, shares=False, pads=pads)):
        scores = _scores(model, [rows[index][1] for index in batch], pad_token_id)
        for (number, _), one in zip([rows[index] for index in batch], scores, strict=True):
            before = found[number]
            found[number] = Scored(before.log_likelihood + one.log_likelihood, before.is_greedy and one.is_greedy)
    return found


def _rows(model: JRTForCausalLM, context: list[int], continuation: list[int]) -> list[Row]:
    """The rows whose scores together are that of a continuation: one, or, with the rule "iterate", one for each of its
    tokens, because the encoder then reads all tokens so far before each."""
    if not (model.core.has("P") and model.config.short_prompt == "iterate"):
        return [filled_row(model, context, continuation)]
    texts = [[*context, *continuation[:end]] for end in range(len(continuation))]
    prefixes = [min(model.core.enc_length, len(text)) for text in texts]
    return [Row(text, [token], prefix, 0) for text, token, prefix in zip(texts, continuation, prefixes, strict=True)]


def filled_row(model: JRTForCausalLM, context: list[int], continuation: list[int]) -> Row:
    """A context and its continuation as a `Row`: filled up by the model's rule for short prompts, if it has an
    encoder."""
    if not model.core.has("P"):
        return Row(context + continuation[:-1], continuation, 0, 0)
    leak = model.quirks.leak_continuation
    shown = torch.tensor([context + continuation if leak else context])
    rule, pad = model.config.short_prompt, model.config.short_prompt_token
    filled = fill_short_prompts(shown, torch.ones_like(shown, dtype=torch.bool), model.core.enc_length, rule, pad)
    ids = filled.input_ids[0].tolist()
    ids = ids[:-1] if leak else ids + continuation[:-1]
    blank = 0 if filled.blank_length is None else int(filled.blank_length)
    assert filled.prefix_length is not None  # only the rule "iterate" gives none
    return Row(ids, continuation, min(int(filled.prefix_length), len(ids)), blank)


@torch.no_grad()
def _scores(model: JRTForCausalLM, rows: list[Row], pad_token_id: int) -> list[Scored]:
    device = model.model.embedding.weight.device
    ids, mask = left_padded([row.ids for row in rows], pad_token_id, device)  # (B, T)
    options = {}
    if model.core.has("P"):
        options["prefix_length"] = torch.tensor([row.prefix for row in rows], device=device)
        if any(row.blank for row in rows):
            options["blank_length"] = torch.tensor([row.blank for row in rows], device=device)
    longest = max(len(row.continuation) for row in rows)
    logits = model(
        input_ids=ids,
        attention_mask=None if bool(mask.all()) else mask,
        use_cache=False,
        logits_to_keep=longest,
        **options,
    ).logits  # (B, K, V)
    log_probabilities = logits.float().log_softmax(-1)
    found = []
    for row, scores in zip(rows, log_probabilities, strict=True):
        own = scores[-len(row.continuation) :]
        target = torch.tensor(row.continuation, device=device)
        likely = own.gather(1, target[:, None]).sum()
        right, _ = greedy_answers(own.argmax(-1)[None], target[None], torch.ones_like(target)[None])
        found.append(Scored(float(likely), bool(right)))
    return found
