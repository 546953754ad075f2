"""Cuts long documents: the published rule that keeps a window of tokens around the answer, and the tokenizers for it.

The *cutting tokenizer* is the one whose tokens measure the window. It is part of a protocol, whatever the model's own
tokenizer is. A score made with another cutting tokenizer carries another protocol name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .data import FOLDER_VARIABLE, mirror_folder
from .fields import answers_of, checked_text, is_text, kind, text_field, whole_field
from .prompts import passage_ending
from .protocols import GPT2, PASSAGES, SHIPPED, Protocol, document_task
from .scoring import contains, hits

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
_GPT2_ENTRIES = 50257
_GPT2_SAMPLE = ("Just read twice: closing the recall gap", [5703, 1100, 5403, 25, 9605, 262, 10014, 7625])


def cutting_tokenizer(name: str, data: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Returns a tokenizer by name: `gpt2`, `shipped`, or a folder or hub name that transformers' AutoTokenizer reads.

    GPT-2's is read from the subfolder `gpt2` of the mirror (`data`, then the folder that JRT_DATA names) if it is
    there, else from the hub or its cache. If the tokenizer cannot be loaded, the ValueError says how to get it."""
    if name == SHIPPED:
        return shipped_tokenizer()
    if name == GPT2:
        for mirror in (mirror_folder(data), mirror_folder()):
            if mirror is not None and (mirror / GPT2).is_dir():
                return _from_pretrained(str(mirror / GPT2))
    return _from_pretrained(os.path.expanduser(name))


@cache
def shipped_tokenizer() -> PreTrainedTokenizerBase:
    """The 4,096-entry byte-level BPE that ships with this package; the mini models use it too."""
    if not (ASSETS / "tokenizer.json").is_file():
        raise ValueError(f"the shipped tokenizer is absent ({ASSETS.name}/tokenizer.json): install jrt_recall again")
    return _from_pretrained(str(ASSETS))


def model_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a model folder or hub name, or None if it cannot be loaded."""
    try:
        return _from_pretrained(name)
    except ValueError:
        return None


def reachable(tokenizer: PreTrainedTokenizerBase | None, answers: Sequence[str], stop: Sequence[str]) -> bool:
    """Whether a model with this tokenizer could write at least one of the answers.

    It can write no stop string and no spelling that the tokenizer normalises away. The metric ignores case. tokenizer
    None: whether any model could."""
    for answer in (*answers, *map(str.lower, answers)):
        if is_text(answer) and not any(ending in answer for ending in stop):
            if tokenizer is None:
                return True
            ids = tokenizer(f"x {answer} x", add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if contains(str(tokenizer.decode(ids)), answer):
                return True
    return False


def protocol_and_tokenizer(
    protocol: Protocol, tokenizer: str | PreTrainedTokenizerBase | None, data: str | Path | None = None
) -> tuple[Protocol, PreTrainedTokenizerBase | None]:
    """Returns the protocol as it will be run, and its cutting tokenizer (None if the protocol cuts nothing).

    Args:
        protocol: the protocol that was asked for.
        tokenizer: None for the protocol's own, a name as in `cutting_tokenizer`, or a loaded tokenizer. If it is not
            the protocol's own, the returned protocol has another name.
        data: mirror folder.

    Raises:
        ValueError: a tokenizer is named although the protocol cuts nothing, or it cannot be loaded.
    """
    if protocol.window is None:
        if isinstance(tokenizer, str):
            raise ValueError(f"{protocol.name} leaves documents whole: there is nothing that {tokenizer!r} could cut")
        return protocol, None
    if tokenizer is None:
        return protocol, cutting_tokenizer(protocol.cutting_tokenizer or GPT2, data)
    chosen = cutting_tokenizer(tokenizer, data) if isinstance(tokenizer, str) else tokenizer
    name = _label(chosen)
    if name == protocol.cutting_tokenizer:
        return protocol, chosen
    return replace(protocol, name=f"{protocol.name}+cut-by-{name}", cutting_tokenizer=name), chosen


def _label(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's short name: `gpt2` or `shipped` if it has their vocabulary, else the last part of its name."""
    if is_gpt2(tokenizer):
        return GPT2
    if tokenizer.get_vocab() == shipped_tokenizer().get_vocab():
        return SHIPPED
    return Path(tokenizer.name_or_path or "unnamed").name


def is_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if `tokenizer` has as many entries as GPT-2's and encodes a sample text as GPT-2's does."""
    text, ids = _GPT2_SAMPLE
    return len(tokenizer) == _GPT2_ENTRIES and token_ids(tokenizer, text) == ids


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, special_is_text: bool = False) -> list[int]:
    """Token ids of the whole text, without added special tokens and without truncation.

    special_is_text: read text that spells a special token, such as "</s>", as ordinary text."""
    options = {"add_special_tokens": False, "truncation": False, "verbose": False}
    return list(tokenizer(text, **options, split_special_tokens=special_is_text)["input_ids"])


def cut(task: str, doc: dict, tokenizer: PreTrainedTokenizerBase, window: int, answer_room: int) -> dict | None:
    """Returns a copy of `doc` whose context is cut to at most `window - answer_room` tokens around its answer.

    The published rule: half of the tokens stand before the answer. Near the end of a document the window becomes
    shorter; it is not shifted. If the answer is not in the context, alternative answers (`alt_answers`) are tried; if
    none is there, the last half window is kept. drop and triviaqa keep the beginning of the document. The `qa_*` tasks
    cut around the first answer of their list that is in the context, and keep their question whole: its tokens count as
    part of the window. In all other tasks only the context column changes, so the first reading of squad, which is
    another column, stays whole, as published.

    Args:
        task: name of the task.
        doc: the document, which is not changed.
        tokenizer: the cutting tokenizer.
        window: size of the window in tokens of `tokenizer`.
        answer_room: tokens of the window that are left free for the answer.

    Returns:
        The new document, or None if the published rule drops it: its answer or key has at most one character.

    Raises:
        ValueError: unknown task, reference pages, missing field, empty answer list, or a window that leaves no context.
    """
    spec, is_passage = document_task(task), task in PASSAGES
    if spec.form == "page":
        raise ValueError(f"{task}: its documents are windows already; choose their size by the protocol")
    context = text_field(task, doc, spec.context).strip()
    ending = passage_ending(text_field(task, doc, "question")) if spec.form == "passage" else ""
    desired = window - answer_room - len(token_ids(tokenizer, ending, special_is_text=True))
    if answer_room < 0 or desired < 1:
        beside = " beside the question" if ending else ""
        raise ValueError(
            f"a window of {window} tokens with {answer_room} kept for the answer leaves no context{beside}"
        )
    position = _answer_position(task, doc, context)
    if position is None:
        return None
    ids = token_ids(tokenizer, context, special_is_text=is_passage)  # the published windows lose such text
    # If no answer was found, position is -1 and the slice is "all but the last character". The published code does so.
    before = len(token_ids(tokenizer, context[:position], special_is_text=is_passage))
    if position == -1 and doc.get("tok_pos") is not None and before > desired:
        before = whole_field(task, doc, "tok_pos")
    start = max(0, before - desired // 2)
    end = min(len(ids), before + desired - (before - start))
    # Without clean-up of spaces, so that the window is a piece of the document.
    window_text = str(tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    cut_doc = {**doc, spec.context: window_text}
    return {**cut_doc, "text": window_text + ending} if ending else cut_doc


def _answer_position(task: str, doc: dict, context: str) -> int | None:
    """Character position of the answer or key that the window lies around; 0 if the task does not locate answers.

    -1 if none stands in the context; None if the published rule drops the document."""
    if task in PASSAGES:
        needles = [answer for answer in answers_of(task, doc) if len(answer) > 1]
        return next(hits(needles, context), -1) if needles else None
    keys = document_task(task).answer_keys
    if not keys:
        return 0
    needles = [answers_of(task, doc)[0] if key == "answers" else text_field(task, doc, key) for key in keys]
    if any(len(needle) <= 1 for needle in needles):
        return None
    if (earliest := min(hits(needles, context), default=None)) is not None:
        return earliest
    alternatives = doc.get("alt_answers") or []
    if not isinstance(alternatives, list | tuple):
        raise ValueError(f"{task}: field 'alt_answers' must be a list of strings, got {kind(alternatives)}")
    texts = [checked_text(f"{task}: one of 'alt_answers'", text) for text in alternatives]
    return next(hits(texts, context), -1)


@cache
def _from_pretrained(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (AttributeError, LookupError, TypeError) as error:  # its files hold other things than a tokenizer's
        raise ValueError(f"the tokenizer {name!r} cannot be read: {type(error).__name__} {error}") from error
    except Exception as error:
        if type(error) is Exception or isinstance(error, OSError | ValueError):
            # The tokenizers package raises the class Exception itself.
            raise ValueError(
                f"the cutting tokenizer {name!r} is neither here nor on the hub. With network, load it once "
                f"(transformers keeps it); without, put its folder at ${FOLDER_VARIABLE}/{GPT2} or name another "
                f"tokenizer, such as {SHIPPED!r}, which gives the protocol another name"
            ) from error
        raise
