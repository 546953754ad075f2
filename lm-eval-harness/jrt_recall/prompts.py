"""The published prompts of the recall tasks, byte for byte: plain string functions, documents are never changed.

Each task has a pair of functions. `once` gives the published default prompt. `reading` gives the three parts of the
published "twice" prompt, from which every other strategy is made: what announces the question, the context as it is
shown first, and the context with the question that ends the prompt. The uneven trimming between tasks is the
published behaviour and decides bytes, so it is kept where it looks odd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .catalogue import published_task, text_field
from .strategies import Strategy, strategy_named

SWDE_SUMMARY = "Summary of information above..."
TRIVIA_MARKS = ("[PAR]", "[DOC]", "[TLE]")


class Reading(NamedTuple):
    """Parts of an announced prompt: `announcement context LF ... context LF closing`."""

    announcement: str
    context: str
    closing: str


@dataclass(frozen=True)
class _Form:
    once: Callable[[dict], str]
    reading: Callable[[dict], Reading]


def _filled(task: str, doc: dict, field: str) -> str:
    value = text_field(task, doc, field)
    if not value.strip():
        raise ValueError(f"{task}: field {field!r} is empty: there is nothing to ask for")
    return value


def _without_suffix(text: str, suffix: str) -> str:
    """text without any number of trailing copies of suffix, in any letter case."""
    while text.lower().endswith(suffix.lower()):
        text = text[: -len(suffix)]
    return text


def _capital(key: str) -> str:
    return key[0].upper() + key[1:]


def _with_full_stop(text: str) -> str:
    return text if text.endswith(".") else text + "."


# swde and fda: a page and the name of an attribute


def _attribute_reading(key: str, page: str) -> Reading:
    return Reading(f"Information about {_capital(key)}.", page, f"{page} {_capital(key)}:")


def _swde_page(doc: dict) -> tuple[str, str]:
    key = _filled("swde", doc, "key")
    page = text_field("swde", doc, "text").split(SWDE_SUMMARY)[0]
    return key, _without_suffix(page, key + ":")


def _swde_once(doc: dict) -> str:
    key, page = _swde_page(doc)
    page = page.strip("\n").strip().strip("\n").strip().strip(".")
    return f"{page}. {_capital(key)}:"


def _swde_reading(doc: dict) -> Reading:
    key, page = _swde_page(doc)
    page = page.strip("\n").strip(".").strip().strip("\n").strip()
    return _attribute_reading(key, _with_full_stop(page))


def _fda_page(doc: dict) -> tuple[str, str]:
    key = _filled("fda", doc, "key")
    page = _without_suffix(text_field("fda", doc, "text"), key + ":")
    return key, _with_full_stop(page.strip("\n").strip("."))


def _fda_once(doc: dict) -> str:
    key, page = _fda_page(doc)
    return f"{page} {_capital(key)}:"


def _fda_reading(doc: dict) -> Reading:
    return _attribute_reading(*_fda_page(doc))


# squad: the cloze statement already stands in the text


def _squad_once(doc: dict) -> str:
    return text_field("squad", doc, "text").strip()


def _squad_reading(doc: dict) -> Reading:
    # The first reading is `context`, which cutting leaves whole: only `text` is cut.
    passage = text_field("squad", doc, "context").split("Question:")[0]
    return Reading(text_field("squad", doc, "question"), passage, _squad_once(doc))


# drop, nq and triviaqa: a passage, a cloze statement `question` and the question itself, `orig_question`


def _sentence(passage: str) -> str:
    return passage.strip().strip(".").strip() + "."


def _drop_passage(doc: dict) -> tuple[str, str]:
    question = _filled("drop", doc, "question").strip()
    return question, _without_suffix(text_field("drop", doc, "context").strip(), question)


def _drop_once(doc: dict) -> str:
    question, passage = _drop_passage(doc)
    return f"{passage.strip().strip('.')}. {question}"


def _drop_reading(doc: dict) -> Reading:
    question, passage = _drop_passage(doc)
    passage = _sentence(passage)
    return Reading(text_field("drop", doc, "orig_question").strip(":"), passage, f"{passage} {question}")


def _nq_once(doc: dict) -> str:
    # Unlike drop: one copy of the question, in its own letter case.
    question = _filled("nq", doc, "question").strip()
    passage = text_field("nq", doc, "context").strip().removesuffix(question)
    return f"{passage.strip().strip('.')}. {question}"


def _trivia_document(doc: dict) -> dict:
    passage = text_field("triviaqa", doc, "context")
    for mark in TRIVIA_MARKS:
        passage = passage.replace(mark, "")
    return {**doc, "context": passage}


def _trivia_once(doc: dict) -> str:
    return _drop_once(_trivia_document(doc))


def _trivia_reading(doc: dict) -> Reading:
    # Unlike drop: the announced question keeps its colons and its blanks.
    reading = _drop_reading(_trivia_document(doc))
    return reading._replace(announcement=text_field("triviaqa", doc, "orig_question"))


_NQ = _Form(_nq_once, _drop_reading)
_FORMS = {
    "swde": _Form(_swde_once, _swde_reading),
    "fda": _Form(_fda_once, _fda_reading),
    "squad": _Form(_squad_once, _squad_reading),
    "drop": _Form(_drop_once, _drop_reading),
    "triviaqa": _Form(_trivia_once, _trivia_reading),
    "nq_512": _NQ,
    "nq_1024": _NQ,
    "nq_2048": _NQ,
}


def prompt(task: str, doc: dict, strategy: str | Strategy = "once") -> str:
    """The prompt that asks `doc` for its answer.

    task: swde, fda, squad, drop, nq_512, nq_1024, nq_2048 (or nq) or triviaqa; strategy: once, twice, question_first
    or Nx (see `strategies`). `once` and `twice` are byte-equal to the published prompts. Raises ValueError for an
    unknown task or strategy and for a missing, empty or wrongly typed field, which it names."""
    form = _FORMS[published_task(task).name]
    chosen = strategy_named(strategy)
    if not isinstance(doc, dict):
        raise ValueError(f"{task}: a document is a dict of fields, got {type(doc).__name__}")
    if chosen.shots:
        raise ValueError(f"{chosen.name} needs other documents as examples: use jrt_recall.items")
    if not chosen.announced:
        return form.once(doc)
    announcement, context, closing = form.reading(doc)
    return f"{announcement} " + f"{context}\n" * (chosen.readings - 1) + closing
