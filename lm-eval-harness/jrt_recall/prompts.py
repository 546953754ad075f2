"""Makes the prompts of the recall tasks. `once` and `twice` equal the published prompts byte for byte.

A reading strategy says how often the context is shown, and where the question stands:

once            the published default prompt: context, question
question_first  the published "twice" prompt with the context once: question, context, question
twice           the published "twice" prompt: question, context, context, question
Nx              the "twice" form with the context N times (`3x`); `1x` is question_first, `2x` is twice
Nshot           N other documents with their answers in front of the `once` prompt (`2shot`); see `items`

Each task has two functions. `once` makes the published default prompt. `parts` returns the three parts of the published
"twice" prompt, from which all other strategies are built. The tasks strip blanks and full stops in different ways.
These differences are in the published code and are kept, because they change the prompts. Documents are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .fields import text_field
from .protocols import LM_EVAL, PASSAGES, Protocol, protocol_named, published_task

SWDE_SUMMARY = "Summary of information above..."
TRIVIA_MARKS = ("[PAR]", "[DOC]", "[TLE]")
MAX_SHOTS = 16
MAX_COPIES = 64  # a typing error such as 1000x should fail, not fill the memory
_COUNTED = re.compile(r"(\d+)(?:x|_?times)")
_SHOTS = re.compile(r"(\d+)_?shots?")


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


def times(n: int) -> Strategy:
    """Returns the strategy that shows the context n times, with the question first. Needs 1 <= n <= 64."""
    if not 1 <= n <= MAX_COPIES:
        raise ValueError(f"a context is read 1 to {MAX_COPIES} times, got {n}")
    return (QUESTION_FIRST, TWICE)[n - 1] if n <= 2 else Strategy(f"{n}x", announced=True, copies=n)


def few_shot(shots: int) -> Strategy:
    """Returns the strategy `once` with that many answered examples in front. Needs 1 <= shots <= 16."""
    if not 1 <= shots <= MAX_SHOTS:
        raise ValueError(f"1 to {MAX_SHOTS} examples stand in front of a prompt, got {shots}")
    return Strategy(f"{shots}shot", announced=False, copies=1, shots=shots)


def strategy_named(name: str | Strategy) -> Strategy:
    """Returns the strategy of that name: once, twice, question_first (or question-first), Nx (or N-times), Nshot.

    Raises ValueError for any other name."""
    if isinstance(name, Strategy):
        return name
    plain = name.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(name, str) else ""
    for strategy in (ONCE, QUESTION_FIRST, TWICE):
        if plain == strategy.name:
            return strategy
    if counted := _COUNTED.fullmatch(plain):
        return times(int(counted[1]))
    if shots := _SHOTS.fullmatch(plain):
        return few_shot(int(shots[1]))
    raise ValueError(
        f"unknown strategy {name!r}: choose once, twice, question_first, Nx with a number N such as 3x, or Nshot"
    )


class Parts(NamedTuple):
    """Parts of a prompt whose question stands first: announcement, a blank, then `context` and a line feed for each
    reading but the last, then `closing`, which is the last reading followed by the question."""

    announcement: str
    context: str
    closing: str


@dataclass(frozen=True)
class _Form:
    once: Callable[[dict], str]
    parts: Callable[[dict], Parts]


def prompt(task: str, doc: dict, strategy: str | Strategy = "once", protocol: str | Protocol | None = None) -> str:
    """Returns the prompt that asks `doc` for its answer.

    Args:
        task: swde, fda, squad, drop, nq_512, nq_1024, nq_2048 (or nq) or triviaqa, with or without `recall_`, or a
            `qa_*` task, whose prompt has the form of squad's or fda's.
        doc: the document. To use a window, cut it first with `jrt_recall.cut`.
        strategy: once, twice, question_first or Nx.
        protocol: `lm-eval-v0` or `lm-eval-v1` give the prompts of lm-eval's own tasks; all others, the published
            prompts.

    Raises:
        ValueError: unknown task, strategy or protocol; a protocol that does not fit the task; or a field that is
            missing, empty or not text (the message names it).
    """
    name = published_task(task).name
    form = _PASSAGE if PASSAGES.get(task) == "squad" else _FORMS[name]
    chosen = strategy_named(strategy)
    upstream = None if protocol is None else LM_EVAL.get(protocol_named(protocol, task).name)
    if not isinstance(doc, dict):
        raise ValueError(f"{task}: a document is a dict of fields, got {type(doc).__name__}")
    if chosen.shots:
        raise ValueError(f"{chosen.name} needs other documents as examples: use jrt_recall.items")
    if upstream is not None:
        return _lm_eval_prompt(task, upstream(text_field(task, doc, "text")), chosen)
    if not chosen.announced:
        return form.once(doc)
    announcement, context, closing = form.parts(doc)
    return f"{announcement} " + f"{context}\n" * (chosen.copies - 1) + closing


def _lm_eval_prompt(task: str, text: str, strategy: Strategy) -> str:
    """The whole `text`, which includes the question.

    lm-eval shows it once; here it is repeated, each copy on its lines."""
    if not text.strip():
        raise ValueError(f"{task}: field 'text' is empty: there is nothing to ask for")
    if strategy.announced and strategy.copies == 1:
        raise ValueError(
            "question_first: lm-eval's own prompts have no question apart from the text; choose once or Nx"
        )
    return "\n".join([text] * strategy.copies)


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


def _capital(key: str) -> str:
    return key[0].upper() + key[1:]


def _with_full_stop(text: str) -> str:
    return text if text.endswith(".") else text + "."


# swde and fda: the document is a page, and the question is the name of an attribute


def _attribute_parts(key: str, page: str) -> Parts:
    return Parts(f"Information about {_capital(key)}.", page, f"{page} {_capital(key)}:")


def _swde_page(doc: dict) -> tuple[str, str]:
    key = _filled("swde", doc, "key")
    page = text_field("swde", doc, "text").split(SWDE_SUMMARY)[0]
    return key, _without_suffix(page, key + ":")


def _swde_once(doc: dict) -> str:
    key, page = _swde_page(doc)
    page = page.strip("\n").strip().strip("\n").strip().strip(".")
    return f"{page}. {_capital(key)}:"


def _swde_parts(doc: dict) -> Parts:
    key, page = _swde_page(doc)
    page = page.strip("\n").strip(".").strip().strip("\n").strip()
    return _attribute_parts(key, _with_full_stop(page))


def _fda_parts(doc: dict) -> Parts:
    key = _filled("fda", doc, "key")
    page = _without_suffix(text_field("fda", doc, "text"), key + ":")
    return _attribute_parts(key, _with_full_stop(page.strip("\n").strip(".")))


def _fda_once(doc: dict) -> str:
    return _fda_parts(doc).closing


# squad: the text already ends with the statement to complete


def _squad_once(doc: dict) -> str:
    return text_field("squad", doc, "text").strip()


def _squad_parts(doc: dict) -> Parts:
    # The first reading is the column `context`, which is never cut: windows cut only `text`.
    passage = text_field("squad", doc, "context").split("Question:")[0]
    return Parts(text_field("squad", doc, "question"), passage, _squad_once(doc))


# passages of your own: the form of squad, with a question in place of the statement


def passage_ending(question: str) -> str:
    """What follows a passage in its `text`."""
    return f"\nQuestion: {question}\nAnswer:"


def _passage_parts(doc: dict) -> Parts:
    # Unlike squad's contexts, a passage may have the word "Question:" in it.
    return _squad_parts(doc)._replace(context=text_field("squad", doc, "context"))


# drop, nq and triviaqa: a passage, a statement to complete (`question`) and the question itself (`orig_question`)


def _sentence(passage: str) -> str:
    return passage.strip().strip(".").strip() + "."


def _drop_passage(doc: dict) -> tuple[str, str]:
    question = _filled("drop", doc, "question").strip()
    return question, _without_suffix(text_field("drop", doc, "context").strip(), question)


def _drop_once(doc: dict) -> str:
    question, passage = _drop_passage(doc)
    return f"{passage.strip().strip('.')}. {question}"


def _drop_parts(doc: dict) -> Parts:
    question, passage = _drop_passage(doc)
    passage = _sentence(passage)
    return Parts(text_field("drop", doc, "orig_question").strip(":"), passage, f"{passage} {question}")


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
    return parts._replace(announcement=text_field("triviaqa", doc, "orig_question"))


_PASSAGE = _Form(_squad_once, _passage_parts)
_FORMS = {
    "swde": _Form(_swde_once, _swde_parts),
    "fda": _Form(_fda_once, _fda_parts),
    "squad": _Form(_squad_once, _squad_parts),
    "drop": _Form(_drop_once, _drop_parts),
    "triviaqa": _Form(_trivia_once, _trivia_parts),
    **dict.fromkeys(("nq_512", "nq_1024", "nq_2048"), _Form(_nq_once, _drop_parts)),
}
