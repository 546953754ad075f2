"""From a task, a strategy and a protocol to the prompts and answers of a run, with the counts a result must state.

lm-eval's hooks and any other runner share this code, so both ask the same questions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from . import data as published_data
from . import passages, reference_pages
from .catalogue import PUBLISHED, answers_of, published_task
from .cutting import cut
from .fewshot import examples
from .metric import contains
from .prompts import SWDE_SUMMARY, prompt
from .protocols import Protocol, protocol_named
from .strategies import ONCE, Strategy, strategy_named
from .tokenizers import protocol_and_tokenizer

logger = logging.getLogger(__name__)

TASKS = (*PUBLISHED, "reference_pages", *passages.TASKS)
"""All task names."""


class Item(NamedTuple):
    """One question. position: where the first answer stands in the context read, 0 (start) to 1 (end); None: nowhere.

    lost: the answer stood in the whole document and was cut away."""

    id: str
    doc: dict
    prompt: str
    answers: tuple[str, ...]
    position: float | None
    lost: bool


@dataclass(frozen=True)
class TaskItems:
    """The items of one task, strategy and protocol.

    documents: those looked at; each is an item, dropped (published rule) or invalid (it cannot be asked or scored;
    the reason is kept). For reference_pages they are all facts of all windows, of which a selection is asked.
    lost: items whose answer was cut away; absent: items whose answer never stood in the document. sha256: of the
    documents; seed: of a selection of pages or of examples; python: the version whose library was read."""

    task: str
    strategy: str
    protocol: Protocol
    items: tuple[Item, ...]
    documents: int
    dropped: int
    invalid: tuple[str, ...]
    lost: int
    absent: int
    source: str
    sha256: str
    seed: int | None = None
    python: str | None = None

    def summary(self) -> dict:
        """The counts and settings as plain values, without the items."""
        return {
            "task": self.task,
            "strategy": self.strategy,
            "protocol": self.protocol.name,
            "items": len(self.items),
            "documents": self.documents,
            "dropped": self.dropped,
            "invalid": len(self.invalid),
            "lost": self.lost,
            "absent": self.absent,
            "source": self.source,
            "sha256": self.sha256,
            "seed": self.seed,
            "python": self.python,
        }


def items(
    task: str,
    strategy: str | Strategy = "once",
    protocol: str | Protocol | None = None,
    tokenizer=None,
    limit: int | None = None,
    seed: int = 0,
    data: str | Path | None = None,
) -> TaskItems:
    """The items of `task` under a protocol (None: the task's default).

    tokenizer: what measures windows, None for the protocol's own (see `tokenizers`); limit: at most that many items;
    seed: selection of reference_pages; data: mirror folder of the published datasets, or folder of the passages.
    Raises ValueError for unknown names, a protocol with several windows for the task, a limit below 1, missing data
    (the message says how to get it), and if no item is left."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit is at least 1, got {limit}")
    chosen = strategy_named(strategy)
    actual, cutter = protocol_and_tokenizer(protocol_named(protocol, task), tokenizer, data)
    asked = ONCE if chosen.shots else chosen
    if task == "reference_pages":
        result = _page_items(asked, actual, cutter, limit, seed)
    else:
        result = _document_items(task, asked, actual, cutter, limit, data)
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
    joint = "" if run.task == "reference_pages" else " "
    answered = [f"{item.prompt}{joint}{item.answers[0]}" for item in run.items]
    form = passages.TASKS.get(run.task, run.task)
    column = "window" if run.task == "reference_pages" else published_task(form).context
    chosen = examples([item.doc[column] for item in run.items], strategy.shots, seed)
    asked = (
        item._replace(prompt="".join(f"{answered[number]}\n\n" for number in numbers) + item.prompt)
        for item, numbers in zip(run.items, chosen, strict=True)
    )
    return replace(run, strategy=strategy.name, items=tuple(asked), seed=seed)


def _page_items(strategy: Strategy, protocol: Protocol, tokenizer, limit: int | None, seed: int) -> TaskItems:
    count = reference_pages.DEFAULT_ITEMS if limit is None else limit
    selection = reference_pages.select(protocol.window, tokenizer, count, seed)
    found = tuple(
        Item(
            doc["id"],
            doc,
            reference_pages.prompt(doc, strategy),
            (reference_pages.answer(doc),),
            _position((reference_pages.answer(doc),), doc["window"]),
            lost=False,
        )
        for doc in selection.documents
    )
    return TaskItems(
        task="reference_pages",
        strategy=strategy.name,
        protocol=protocol,
        items=found,
        documents=selection.facts,
        dropped=sum(selection.left_out.values()),
        invalid=(),
        lost=0,
        absent=0,
        source=f"standard library of Python {reference_pages.python_version()}",
        sha256=published_data.digest(selection.documents),
        seed=seed,
        python=reference_pages.python_version(),
    )


def _document_items(
    task: str, strategy: Strategy, protocol: Protocol, tokenizer, limit: int | None, data: str | Path | None
) -> TaskItems:
    form = passages.TASKS.get(task, task)
    read: Callable = passages.load if task in passages.TASKS else published_data.load
    documents = read(task, data)
    column = published_task(form).context
    found: list[Item] = []
    invalid: list[str] = []
    dropped = absent = looked_at = 0
    for number, row in enumerate(documents.rows):
        if len(found) == limit:
            break
        looked_at += 1
        try:
            doc = _as_read(form, row)
            answers = _scorable(form, doc)
            kept = doc if tokenizer is None else cut(form, doc, tokenizer, protocol.window, protocol.answer_room)
            text = None if kept is None else prompt(form, kept, strategy)
        except ValueError as error:
            invalid.append(f"document {number} of {documents.source}: {error}")
            continue
        if kept is None:
            dropped += 1
            continue
        whole, position = contains(doc[column], answers), _position(answers, kept[column])
        absent += not whole
        name = str(row.get("id", number))
        found.append(Item(f"{task}/{name}", kept, text, answers, position, lost=whole and position is None))
    return TaskItems(
        task=task,
        strategy=strategy.name,
        protocol=protocol,
        items=tuple(found),
        documents=looked_at,
        dropped=dropped,
        invalid=tuple(invalid),
        lost=sum(item.lost for item in found),
        absent=absent,
        source=documents.source,
        sha256=documents.sha256,
    )


def _as_read(form: str, row: dict) -> dict:
    """The row as the published task reads it: swde's pages end before their summary, before anything is cut."""
    if form == "swde" and isinstance(row.get("text"), str):
        return {**row, "text": row["text"].split(SWDE_SUMMARY)[0]}
    return row


def _scorable(form: str, doc: dict) -> tuple[str, ...]:
    answers = tuple(answers_of(form, doc))
    if not answers:
        raise ValueError(f"{form}: the list of answers is empty")
    if not all(answers):
        raise ValueError(f"{form}: an answer is the empty string, which every prediction contains")
    return answers


def _position(answers: tuple[str, ...], text: str) -> float | None:
    lowered = text.lower()
    hits = [hit for answer in answers if (hit := lowered.find(answer.lower())) >= 0]
    return min(hits) / max(1, len(text)) if hits else None
