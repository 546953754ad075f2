"""Cutting a long context to a window around its answer, with the published rule and its corner cases."""

import re

from .catalogue import PublishedTask, published_task, text_field


def token_ids(tokenizer, text: str) -> list[int]:
    """Token ids of the whole text: no special tokens, no truncation. tokenizer: one of transformers' tokenizers."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def _first_hit(answer: str, context: str) -> int:
    hit = re.search(re.escape(answer), context, re.IGNORECASE)
    return hit.start() if hit else -1


def _needle(task: str, doc: dict, key: str) -> str:
    if key not in doc:
        raise ValueError(f"{task}: the document has no field {key!r} (it has {', '.join(map(str, doc)) or 'none'})")
    value = doc[key]
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{task}: field {key!r} is an empty list: there is no answer to cut around")
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{task}: field {key!r} must hold strings, got {type(value).__name__}")
    return value


def _answer_position(spec: PublishedTask, doc: dict, context: str, needles: list[str]) -> int:
    """Character at which the earliest answer or key stands; -1 if none does; 0 where the task asks for no answer."""
    if not spec.answer_keys:
        return 0
    hits = [hit for needle in needles if (hit := _first_hit(needle, context)) >= 0]
    if hits:
        return min(hits)
    for alternative in doc.get("alt_answers") or ():
        if (hit := _first_hit(alternative, context)) >= 0:
            return hit
    return -1


def cut(task: str, doc: dict, tokenizer, window: int, answer_room: int) -> dict | None:
    """A copy of `doc` whose context is cut to at most `window - answer_room` tokens of `tokenizer` around its answer.

    Half of the tokens stand before the answer; near a document's end the window is shorter, not shifted. Without a
    hit, alternative answers are tried, then the last half window is taken. drop and triviaqa keep the beginning.
    Returns None where the published rule drops the document (an answer or key of at most one character).
    Only the context column changes: squad's first reading stays whole, as published.
    Raises ValueError for an unknown task, a missing field, an empty answer list or an impossible window."""
    spec = published_task(task)
    desired = window - answer_room
    if answer_room < 0 or desired < 1:
        raise ValueError(f"a window of {window} tokens with {answer_room} kept for the answer leaves no context")
    context = text_field(task, doc, spec.context).strip()
    needles = [_needle(task, doc, key) for key in spec.answer_keys]
    if any(len(needle) <= 1 for needle in needles):
        return None

    ids = token_ids(tokenizer, context)
    position = _answer_position(spec, doc, context, needles)
    # A position of -1 means "all but the last character" here: the published code slices with it.
    before = len(token_ids(tokenizer, context[:position]))
    if position == -1 and "tok_pos" in doc and before > desired:
        before = doc["tok_pos"]
    start = max(0, before - desired // 2)
    end = min(len(ids), before + desired - (before - start))
    # No clean-up of spaces: the window must be text that stands in the document.
    window_text = tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {**doc, spec.context: window_text}
