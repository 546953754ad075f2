"""Makes the prompts of the recall tasks. `once` and `twice` equal the published prompts byte for byte.

A reading strategy says how often the context is shown, and where the question stands:

once            the published default prompt: context, question
question_first  the published "twice" prompt with the context once: question, context, question
twice           the published "twice" prompt: question, context, context, question
Nx              the "twice" form with the context N times (`3x`); `1x` is question_first, `2x` is twice
Nshot           N other documents with their answers in front of the `once` prompt (`2shot`); see `items`

Each form of prompt has two functions. `once` makes the published default prompt. `parts` returns the three parts of the
published "twice" prompt, from which all other strategies are built. The forms strip blanks and full stops in different
ways. These differences are in the published code and are kept, because they change the prompts. Documents are never
changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from . import api_text
from .fields import text_field
from .protocols import LM_EVAL, Protocol, document_task, protocol_named

SWDE_SUMMARY = "Summary of information above..."
TRIVIA_MARKS = ("[PAR]", "[DOC]", "[TLE]")
MAX_SHOTS = 16
MAX_COPIES = 64  # a typing error such as 1000x should fail, not fill the memory
_COUNTED = re.compile(r"(\d+)(?:x|_?times|_?shots?)")


@dataclass(frozen=True)
class Strategy:
    """A reading strategy.

    Args:
        name: as it stands in results.
        announced: whether the question also stands in front of the context.
        copies: how often the context is shown.
        shots: number of answered examples in front of the prompt.
    """

    name: str
    announced: bool
    copies: int
    shots: int = 0


ONCE = Strategy("once", announced=False, copies=1)
QUESTION_FIRST = Strategy("question_first", announced=True, copies=1)
TWICE = Strategy("twice", announced=True, copies=2)


def strategy_named(name: str | Strategy) -> Strategy:
    """Returns the strategy of that name: once, twice, question_first (or question-first), Nx (or N-times), Nshot.

    Raises ValueError for any other name, for N above 64 copies or 16 examples, and for N = 0."""
    if isinstance(name, Strategy):
        return name
    plain = name.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(name, str) else ""
    for strategy in (ONCE, QUESTION_FIRST, TWICE):
        if plain == strategy.name:
            return strategy
    counted = _COUNTED.fullmatch(plain)
    if counted is None:
        raise ValueError(
            f"unknown strategy {name!r}: choose once, twice, question_first, Nx with a number N such as 3x, or Nshot"
        )
    number = int(counted[1])
    if "shot" in plain:
        if not 1 <= number <= MAX_SHOTS:
            raise ValueError(f"1 to {MAX_SHOTS} examples stand in front of a prompt, got {number}")
        return Strategy(f"{number}shot", announced=False, copies=1, shots=number)
    if not 1 <= number <= MAX_COPIES:
        raise ValueError(f"a context is read 1 to {MAX_COPIES} times, got {number}")
    return (QUESTION_FIRST, TWICE)[number - 1] if number <= 2 else Strategy(f"{number}x", announced=True, copies=number)


class Parts(NamedTuple):
    """Parts of a prompt whose question stands first: announcement, then `context` and a line feed for each reading but
    the last, then `closing`, which is the last reading followed by the question."""

    announcement: str
    context: str
    closing: str


def prompt(task: str, doc: dict, strategy: str | Strategy = "once", protocol: str | Protocol | None = None) -> str:
    """Returns the prompt that asks `doc` for its answer.

    Args:
        task: swde, fda, squad, drop, nq_512, nq_1024, nq_2048 (or nq) or triviaqa, with or without `recall_`, or a
            `qa_*` task, whose prompt has the form of squad's or fda's, or reference_pages.
        doc: the document. To use a window, cut it first with `jrt_recall.cut`.
        strategy: once, twice, question_first or Nx.
        protocol: `lm-eval-v0` or `lm-eval-v1` give the prompts of lm-eval's own tasks; all others, the published
            prompts.

    Raises:
        ValueError: unknown task, strategy or protocol; a protocol that does not fit the task; or a field that is
            missing, empty or not text (the message names it).
    """
    once, parts = _FORMS[document_task(task).form]
    chosen = strategy_named(strategy)
    upstream = None if protocol is None else LM_EVAL.get(protocol_named(protocol, task).name)
    if not isinstance(doc, dict):
        raise ValueError(f"{task}: a document is a dict of fields, got {type(doc).__name__}")
    if chosen.shots:
        raise ValueError(f"{chosen.name} needs other documents as examples: use jrt_recall.items")
    if upstream is not None:
        # The text includes the question. lm-eval shows it once; here it is repeated, each copy on its lines.
        text = upstream(_filled(task, doc, "text"))
        if chosen == QUESTION_FIRST:
            raise ValueError(
                "question_first: lm-eval's own prompts have no question apart from the text; choose once or Nx"
            )
        return "\n".join([text] * chosen.copies)
    if not chosen.announced and once is not None:
        return once(doc)
    announcement, context, closing = parts(doc)
    return (announcement if chosen.announced else "") + f"{context}\n" * (chosen.copies - 1) + closing


def _filled(task: str, doc: dict, field: str) -> str:
    value = text_field(task, doc, field)
    if not value.strip():
        raise ValueError(f"{task}: field {field!r} is empty: there is nothing to ask for")
    return value


def _without_suffix(text: str, suffix: str) -> str:
    """Removes all copies of suffix at the end of text, in any letter case."""
    while text.lower().endswith(suffix.lower()):
        text = text[: -len(suffix)]
    return text


# swde and fda: the document is a page, and the question is the name of an attribute


def _page(form: str, doc: dict) -> tuple[str, str]:
    """The attribute, and the page without the question at its end. A swde page ends before its summary."""
    key, page = _filled(form, doc, "key"), text_field(form, doc, "text")
    if form == "swde":
        page = page.split(SWDE_SUMMARY)[0]
    return key[0].upper() + key[1:], _without_suffix(page, key + ":")


def _page_parts(key: str, page: str) -> Parts:
    page = page if page.endswith(".") else page + "."
    return Parts(f"Information about {key}. ", page, f"{page} {key}:")


def _swde_once(doc: dict) -> str:
    key, page = _page("swde", doc)
    return f"{page.strip().strip('.')}. {key}:"


def _swde_parts(doc: dict) -> Parts:
    key, page = _page("swde", doc)
    return _page_parts(key, page.strip("\n").strip(".").strip())


def _fda_parts(doc: dict) -> Parts:
    key, page = _page("fda", doc)
    return _page_parts(key, page.strip("\n").strip("."))


# squad: the text already ends with the statement to complete; for passages of your own, with the question


def passage_ending(question: str) -> str:
    """What follows a passage of your own in its `text`."""
    return f"\nQuestion: {question}\nAnswer:"


def _squad_once(doc: dict) -> str:
    return text_field("squad", doc, "text").strip()


def _passage_parts(doc: dict) -> Parts:
    # The first reading is the column `context`. In squad it is never cut: windows cut only `text`.
    passage = text_field("squad", doc, "context")
    return Parts(text_field("squad", doc, "question") + " ", passage, _squad_once(doc))


def _squad_parts(doc: dict) -> Parts:
    # A passage of your own may have the word "Question:" in it; in squad's contexts it ends the passage.
    parts = _passage_parts(doc)
    return parts._replace(context=parts.context.split("Question:")[0])


# drop, nq and triviaqa: a passage, a statement to complete (`question`) and the question itself (`orig_question`)


def _drop_passage(doc: dict) -> tuple[str, str]:
    question = _filled("drop", doc, "question").strip()
    return question, _without_suffix(text_field("drop", doc, "context").strip(), question)


def _drop_once(doc: dict) -> str:
    question, passage = _drop_passage(doc)
    return f"{passage.strip().strip('.')}. {question}"


def _drop_parts(doc: dict) -> Parts:
    question, passage = _drop_passage(doc)
    passage = passage.strip().strip(".").strip() + "."
    return Parts(text_field("drop", doc, "orig_question").strip(":") + " ", passage, f"{passage} {question}")


def _nq_once(doc: dict) -> str:
    # Unlike drop, one copy of the question is removed from the passage's end, and only in the same letter case.
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


def _trivia_parts(doc: dict) -> Parts:
    # Unlike drop, the question in front keeps its colons and blanks.
    parts = _drop_parts(_trivia_document(doc))
    return parts._replace(announcement=text_field("triviaqa", doc, "orig_question") + " ")


# reference pages: a window of a page, and the beginning of a heading in it


def _page_window_parts(doc: dict) -> Parts:
    name, window = text_field("reference_pages", doc, "name"), text_field("reference_pages", doc, "window")
    return Parts(f"{api_text.announcement(name)}\n", window, f"{window}\n{api_text.question(name)}")


_FORMS: dict[str, tuple[Callable[[dict], str] | None, Callable[[dict], Parts]]] = {
    "swde": (_swde_once, _swde_parts),
    "fda": (None, _fda_parts),
    "squad": (_squad_once, _squad_parts),
    "passage": (_squad_once, _passage_parts),
    "drop": (_drop_once, _drop_parts),
    "nq": (_nq_once, _drop_parts),
    "triviaqa": (_trivia_once, _trivia_parts),
    "page": (None, _page_window_parts),
}
"""For each form its `once` and its `parts`. None: `once` is the closing part."""
