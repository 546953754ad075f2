"""Makes the items of a run (prompts with their answers) from a task, a strategy and a protocol.

It also counts the documents that could not be used, because results report these counts. The lm-eval tasks and `jrt
eval` share this code, so both ask the same questions.
"""

from __future__ import annotations

import logging
import platform
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import reference_pages
from .data import PROBLEM, Documents, load, load_passages
from .fields import answers_of, is_blank, text_field
from .files import digest
from .prompts import ONCE, SWDE_SUMMARY, Strategy, passage_ending, prompt, strategy_named
from .protocols import LM_EVAL, PAGES, PASSAGES, Protocol, document_task, protocol_named, task_named
from .scoring import contains, hits
from .tokenizers import cut, protocol_and_tokenizer, reachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """One question.

    id: unique within the task. doc: the document, cut to the window. answers: a right generation contains any of them.
    position: where the first answer stands in the context, from 0 (start) to 1 (end); None if it is not there.
    lost: whether the answer was in the whole document and was cut away."""

    id: str
    doc: dict
    prompt: str
    answers: tuple[str, ...]
    position: float | None
    lost: bool


@dataclass(frozen=True)
class TaskItems:
    """The items of one task, strategy and protocol.

    Args:
        documents: number of documents that were read. Each became an item, was dropped by the published rule, or was
            invalid, that is, could not be asked or scored. For reference pages: headings in all windows; only some of
            them become items.
        dropped: number of documents that the published rule dropped.
        invalid: for each invalid document, the reason.
        source: where the documents come from.
        sha256: of the documents.
        seed: of the choice of pages or examples; None if nothing was chosen.
        python: version of the standard library that was read, for reference pages.
    """

    task: str
    strategy: str
    protocol: Protocol
    items: tuple[Item, ...]
    documents: int
    dropped: int
    invalid: tuple[str, ...]
    source: str
    sha256: str
    seed: int | None = None
    python: str | None = None

    @property
    def lost(self) -> int:
        """Number of items whose answer was cut away."""
        return sum(item.lost for item in self.items)

    @property
    def absent(self) -> int:
        """Number of items whose answer was never in the document."""
        return sum(item.position is None and not item.lost for item in self.items)

    @property
    def unreachable(self) -> int:
        """Number of items that no generation can answer, because each of their answers contains a stop string."""
        return sum(not reachable(None, item.answers, self.protocol.stop) for item in self.items)

    def summary(self) -> dict:
        """The counts and settings as plain values, without the items."""
        names = ("task", "strategy", "documents", "dropped", "lost", "absent", "unreachable")
        found = {name: getattr(self, name) for name in (*names, "source", "sha256", "seed", "python")}
        return {**found, "protocol": self.protocol.name, "items": len(self.items), "invalid": len(self.invalid)}


def items(
    task: str,
    strategy: str | Strategy = "once",
    protocol: str | Protocol | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
) -> TaskItems:
    """Returns the items of a task.

    Args:
        task: name with or without `recall_`; the result has the full name.
        strategy: once, twice, question_first, Nx or Nshot (see `prompts`).
        protocol: name or protocol; None for the task's default.
        tokenizer: the cutting tokenizer, which measures windows; None for the protocol's own (see `tokenizers`).
        limit: most items.
        seed: of the choice of reference pages and of examples.
        data: mirror folder of the published datasets, or folder of the passages (see `data`).

    Raises:
        ValueError: unknown names, a protocol with several windows for the task, a limit below 1, missing data (the
            message says how to get it), or no item left.
    """
    name = task_named(task)
    if limit is not None and limit < 1:
        raise ValueError(f"a limit is at least 1, got {limit}")
    chosen = strategy_named(strategy)
    actual, cutter = protocol_and_tokenizer(protocol_named(protocol, task), tokenizer, data)
    asked = ONCE if chosen.shots else chosen
    if name.startswith(PAGES):
        result = _page_items(asked, actual, cutter, limit, seed)
    else:
        documents = (load_passages if name in PASSAGES else load)(name, data)
        result = _asked(name, documents, asked, actual, cutter, limit)
    if not result.items:
        reasons = f"; the first reason: {result.invalid[0]}" if result.invalid else ""
        raise ValueError(
            f"{task}: no item is left of {result.documents} documents ({result.dropped} dropped by the published rule, "
            f"{len(result.invalid)} invalid){reasons}"
        )
    for reason in result.invalid:
        logger.warning("left out: %s", reason)
    return _with_examples(result, chosen, seed) if chosen.shots else result


def _with_examples(run: TaskItems, strategy: Strategy, seed: int) -> TaskItems:
    """Puts examples, other items of the run with their answers, in front of each prompt (the paper's Table 14).

    The examples have other contexts, and depend on the seed and the item. As in lm-eval, a blank joins prompt and
    answer, and an empty line ends an example. The paper does not say how it cut long examples. Here, with a long
    window, the prompt can exceed the protocol's limit; then the beginning of the first example is cut off, and results
    count such prompts."""
    of_pages = run.task.startswith(PAGES)
    column = document_task(run.task).context
    blank = "" if of_pages else " "
    asked = []
    for number, item in enumerate(run.items):
        shuffled = random.Random(f"{seed}/{number}").sample(run.items, len(run.items))
        others = [other for other in shuffled if other.doc[column] != item.doc[column]][: strategy.shots]
        if len(others) < strategy.shots:
            raise ValueError(
                f"{strategy.shots} examples before each question come from other documents of the run; item {number} "
                f"has {len(others)} of them: raise the limit, or give more documents"
            )
        shown = "".join(f"{other.prompt}{blank}{other.answers[0]}\n\n" for other in others)
        asked.append(item._replace(prompt=shown + item.prompt))
    return replace(run, strategy=strategy.name, items=tuple(asked), seed=seed)


def _page_items(
    strategy: Strategy, protocol: Protocol, tokenizer: PreTrainedTokenizerBase | None, limit: int | None, seed: int
) -> TaskItems:
    assert protocol.window is not None and tokenizer is not None  # true of every pages-* protocol
    count = reference_pages.DEFAULT_ITEMS if limit is None else limit
    selection = reference_pages.select(protocol.window, tokenizer, count, seed)
    python = platform.python_version()
    rows, source = selection.documents, f"standard library of Python {python}"
    found = _asked(f"{PAGES}_{protocol.window}", Documents(rows, source, digest(rows)), strategy, protocol)
    return replace(found, documents=selection.facts, dropped=selection.left_out, seed=seed, python=python)


def _asked(
    task: str,
    documents: Documents,
    strategy: Strategy,
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
) -> TaskItems:
    """Asks the documents until `limit` items are found. tokenizer: cuts them to the protocol's window; None: whole."""
    prefix = "" if task.startswith(PAGES) else f"{document_task(task).name}/"
    found: list[Item] = []
    invalid: list[str] = []
    taken: set[str] = set()
    looked_at = 0
    for number, row in enumerate(documents.rows):
        if len(found) == limit:
            break
        looked_at += 1
        # Resumed runs and comparisons between models find an item again by its id.
        item_id = f"{prefix}{number if row.get('id') is None else row['id']}"
        while item_id in taken:
            item_id += f"#{number}"
        taken.add(item_id)
        try:
            item = _item(task, row, item_id, strategy, protocol, tokenizer)
        except ValueError as error:
            invalid.append(f"document {number} of {documents.source}: {error}")
            continue
        if item is not None:
            found.append(item)
    return TaskItems(
        task=task,
        strategy=strategy.name,
        protocol=protocol,
        items=tuple(found),
        documents=looked_at,
        dropped=looked_at - len(found) - len(invalid),
        invalid=tuple(invalid),
        source=documents.source,
        sha256=documents.sha256,
    )


def _item(
    task: str,
    row: dict,
    item_id: str,
    strategy: Strategy,
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Item | None:
    """Returns the question of one document; None if the published rule drops it.

    Raises ValueError if the document cannot be asked or scored."""
    of_lm_eval = protocol.name in LM_EVAL
    doc = row if of_lm_eval and task not in PASSAGES else _as_read(task, row)  # lm-eval reads a dataset's own text
    answers = answers_of(task, doc)
    if of_lm_eval:
        answers = tuple(map(LM_EVAL[protocol.name], answers))
        if not all(answers):
            raise ValueError(f"{task}: an answer is empty once it is stripped, and every prediction contains that")
    kept: dict | None = doc
    if tokenizer is not None and protocol.window is not None:
        kept = cut(task, doc, tokenizer, protocol.window, protocol.answer_room)
    if kept is None:
        return None
    column = document_task(task).context
    text = prompt(task, kept, strategy, protocol)
    position = _position(answers, kept[column])
    return Item(item_id, kept, text, answers, position, lost=position is None and contains(doc[column], answers))


def _as_read(task: str, row: dict) -> dict:
    """Returns the row as the task uses it, before anything is cut.

    A swde page ends before its summary. The `text` of a squad-like passage is the passage followed by its question. The
    answer to a reference page has the closing bracket of the arguments, so that a longer list is wrong.

    Raises ValueError if the row has a PROBLEM, which `data` sets for rows that cannot be read, or a blank question."""
    if PROBLEM in row:
        raise ValueError(f"{task}: {row[PROBLEM]}")
    form = document_task(task).form
    if form == "passage":
        passage, question = (text_field(task, row, field) for field in ("context", "question"))
        if is_blank(question):
            raise ValueError(f"{task}: field 'question' is empty: there is nothing to ask for")
        return {**row, "text": passage + passage_ending(question)}
    if form == "page":
        return {**row, "answers": row["arguments"] + ")"}
    if form == "swde" and isinstance(row.get("text"), str):
        return {**row, "text": row["text"].split(SWDE_SUMMARY)[0]}
    return row


def _position(answers: tuple[str, ...], text: str) -> float | None:
    """Where the first answer stands in a text, from 0 (start) to 1 (end), found by the metric's own search."""
    first = min(hits(answers, text), default=None)
    return None if first is None else first / max(1, len(text))
