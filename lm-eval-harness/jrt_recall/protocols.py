"""Tasks and protocols: the two names that stand beside every recall score.

A task names the documents that are asked. A protocol names everything else that a score depends on besides the model and
the strategy. Its window matters most: one model moves by tens of points on one task between the windows in use.

`jrt-table1` and `jrt-table2-*` are the settings of the paper's two tables, `full` cuts nothing, `wW-aA` are any window and
answer room, `pages-*` belong to the reference pages. `lm-eval-v0` and `lm-eval-v1` are lm-eval's own swde, fda and
squad_completion. `jrt-table2` and `pages` name families of protocols.
Windows are measured in the cutting tokenizer, which is part of the protocol, so that every model reads the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

GPT2 = "gpt2"
SHIPPED = "shipped"
"""Cutting tokenizers: GPT-2's byte-level BPE (as published), and the 4,096-entry vocabulary of this package."""
PREFIX = "recall_"
PAGES = "recall_reference_pages"
PAGE_WINDOWS = (512, 1024, 2048)
LM_EVAL: dict[str, Callable[[str], str]] = {"lm-eval-v0": str, "lm-eval-v1": str.strip}
"""The protocols of lm-eval's own tasks, by the version that its tables print, and what each does to `text` and `value`.

Version 1 strips both (lm-eval pull request 3795, in 0.4.13). Version 0 takes them as they are in the dataset."""
_BY_NUMBER = re.compile(r"w([1-9]\d{0,8})-a(0|[1-9]\d{0,8})")
PASSAGES = {"qa_squad": "squad", "qa_nq": "squad", "qa_triviaqa": "squad", "qa_drop": "squad", "qa_fda": "fda"}
"""Tasks on passages from a local folder, and the published task whose prompts each takes."""
PASSAGES_VERSION = 2
"""Of their protocols. Since version 2 any of a document's answers counts, and a window is cut around the first that stands
in the text; version 1 knew the first answer only, as the published tasks do."""
LM_EVAL_TASKS = (
    "recall_swde",
    "recall_fda",
    "recall_squad",
    *(task for task, form in PASSAGES.items() if form == "squad"),
)
"""Tasks whose `text` ends with the question, as lm-eval's own tasks assume. `qa_fda` is none: its text is the page alone."""


@dataclass(frozen=True)
class PublishedTask:
    """A published task: where its dataset lies on the hub and which columns its prompts and its score read.

    Args:
        context: the column that is cut around the answer.
        answer_keys: columns whose value locates the answer there; none: the window is the document's beginning.
        labels: the column that holds what a right generation contains.
    """

    name: str
    dataset: str
    columns: tuple[str, ...]
    context: str
    answer_keys: tuple[str, ...]
    labels: str
    split: str = "validation"


_PAGE_COLUMNS = ("text", "key", "value")
_SQUAD_COLUMNS = ("text", "context", "question", "value")
_CLOZE_COLUMNS = ("context", "question", "orig_question", "answers")
_PUBLISHED = (
    PublishedTask("swde", "hazyresearch/based-swde-v2", _PAGE_COLUMNS, "text", ("key", "value"), "value"),
    PublishedTask("fda", "hazyresearch/based-fda", _PAGE_COLUMNS, "text", ("key", "value"), "value"),
    PublishedTask("squad", "hazyresearch/based-squad", _SQUAD_COLUMNS, "text", ("value",), "value"),
    PublishedTask("drop", "hazyresearch/based_drop", _CLOZE_COLUMNS, "context", (), "answers"),
    PublishedTask("nq_512", "hazyresearch/based_nq_512", _CLOZE_COLUMNS, "context", ("answers",), "answers"),
    PublishedTask("nq_1024", "hazyresearch/based_nq_1024", _CLOZE_COLUMNS, "context", ("answers",), "answers"),
    PublishedTask("nq_2048", "hazyresearch/based_nq_2048", _CLOZE_COLUMNS, "context", ("answers",), "answers"),
    PublishedTask("triviaqa", "hazyresearch/based_triviaqa", (*_CLOZE_COLUMNS, "doc_id"), "context", (), "answers"),
)
PUBLISHED = {task.name: task for task in _PUBLISHED}
"""The published datasets by name; the task on each is `recall_NAME`."""
TASKS = (*(PREFIX + name for name in PUBLISHED), *(f"{PAGES}_{window}" for window in PAGE_WINDOWS), *PASSAGES)
"""All tasks, by the names that results carry here and in lm-eval."""


def task_named(name: str) -> str:
    """The task's one name, as results carry it: `fda` and `recall_fda` are both `recall_fda`.

    `reference_pages` without a window stays without one: its protocol says which. Raises ValueError for other names."""
    plain = name.strip()
    for found in (plain, PREFIX + plain):
        if found in TASKS or found == PAGES:
            return found
    raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")


def published_task(name: str) -> PublishedTask:
    """The published task of that name, or the one whose form a `qa_*` task takes. Both spellings are understood.

    `nq` stands for any of the three NQ sizes, which share their rules. Raises ValueError for other names."""
    plain = PASSAGES.get(name, name).removeprefix(PREFIX)
    task = PUBLISHED.get("nq_1024" if plain == "nq" else plain)
    if task is None:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(PUBLISHED)}")
    return task


@dataclass(frozen=True)
class Protocol:
    """One setting. Lengths are in tokens: those of `cutting_tokenizer` for the window, the model's for the rest.

    Args:
        window: None leaves documents whole; otherwise `window - answer_room` tokens of the context are kept.
        max_prompt_tokens: prompts are cut to it on `truncation_side`; None: to the model's own limit.
    """

    name: str
    window: int | None
    answer_room: int
    max_prompt_tokens: int | None = 2000
    cutting_tokenizer: str | None = GPT2
    padding_side: str = "left"
    truncation_side: str = "left"
    max_new_tokens: int = 48
    stop: tuple[str, ...] = ("\n",)
    metric: str = "contains"
    version: int = 1

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {**asdict(self), "stop": list(self.stop)}

    def describe(self) -> str:
        """One line that can stand beside a score."""
        if self.window is None:
            cut = "documents whole"
        else:
            cut = f"window {self.window}, answer room {self.answer_room} ({self.cutting_tokenizer} tokens)"
        limit = "the model's limit" if self.max_prompt_tokens is None else f"{self.max_prompt_tokens} tokens"
        stop = ", ".join(repr(text) for text in self.stop)
        return (
            f"{self.name} v{self.version}: {cut}; {self.padding_side} padding, {self.truncation_side} truncation to "
            f"{limit}; at most {self.max_new_tokens} new tokens, stop at {stop}; metric {self.metric}"
        )

    def label(self) -> str:
        """Name, version and numbers, short enough for a cell of a table."""
        cut = "documents whole" if self.window is None else f"{self.window}/{self.answer_room}"
        return f"{self.name} v{self.version} ({cut})"

    def can_hold(self, answers: Iterable[str]) -> bool:
        """Whether a generation can hold any of the answers: it ends before a stop string."""
        return any(not any(stop in answer for stop in self.stop) for answer in answers)

    def cut_with(self, tokenizer_name: str) -> Protocol:
        """This protocol with another cutting tokenizer, under a name that says so: its scores are not the same."""
        if self.window is None or tokenizer_name == self.cutting_tokenizer:
            return self
        return replace(self, name=f"{self.name}+cut-by-{tokenizer_name}", cutting_tokenizer=tokenizer_name)


def _pages(window: int) -> Protocol:
    # No answer room: the answer stands in the window and the question follows it.
    return Protocol(f"pages-{window}", window, 0, max_prompt_tokens=None, cutting_tokenizer=SHIPPED)


_ALL = (
    Protocol("jrt-table1", 1000, 50),
    Protocol("jrt-table2-512", 512, 50),
    Protocol("jrt-table2-1024", 1024, 50),
    Protocol("jrt-table2-2048", 2048, 50),
    Protocol("jrt-table2-nq", 2000, 50),
    Protocol("full", None, 0, max_prompt_tokens=None, cutting_tokenizer=None),
    Protocol("w2000-a50", 2000, 50),
    Protocol("w2048-a48", 2048, 48),
    Protocol("w2048-a50", 2048, 50),
    *map(_pages, PAGE_WINDOWS),
    Protocol("lm-eval-v0", None, 0, max_prompt_tokens=None, cutting_tokenizer=None, version=0),
    Protocol("lm-eval-v1", None, 0, max_prompt_tokens=None, cutting_tokenizer=None),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
FAMILIES = {
    "jrt-table2": ("jrt-table2-512", "jrt-table2-1024", "jrt-table2-2048", "jrt-table2-nq"),
    "pages": tuple(f"pages-{window}" for window in PAGE_WINDOWS),
}


def default(task: str) -> str:
    """The protocol or family that a task is run under when none is named."""
    name = task_named(task)
    if name.startswith(PAGES):
        return "pages"
    return "full" if name in PASSAGES else "jrt-table1"


def cells(name: str | Protocol | None, task: str) -> tuple[Protocol, ...]:
    """The protocols that `name` means for a task: one, or one for each column of its family.

    NQ under `jrt-table2` is one cell (its documents are cut beforehand). Raises ValueError for an unknown name and for
    a protocol that contradicts the task."""
    if isinstance(name, Protocol):
        chosen: tuple[Protocol, ...] = (name,)
    else:
        name = default(task) if name is None else name
        chosen = tuple(map(_by_name, FAMILIES.get(name, (name,))))
    fitting = tuple(protocol for protocol in chosen if _fits(protocol, task_named(task)))
    if not fitting:
        allowed = ", ".join(protocol.name for protocol in _ALL if _fits(protocol, task_named(task)))
        raise ValueError(f"protocol {chosen[0].name} is not for {task}: choose one of {allowed}")
    if task_named(task) in PASSAGES:
        return tuple(replace(protocol, version=PASSAGES_VERSION) for protocol in fitting)
    return fitting


def _by_name(name: str) -> Protocol:
    """The protocol of that name: one of PROTOCOLS, or `wW-aA`.

    Up to a window of 2048, prompts are cut to 2000 tokens, as the release does for all its windows (2048 positions, 48 of them
    for the answer). That limit would contradict a longer window, whose prompts are cut to the model's own limit."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    numbers = _BY_NUMBER.fullmatch(name)
    if numbers is None:
        names = ", ".join((*PROTOCOLS, *FAMILIES))
        raise ValueError(f"unknown protocol {name!r}: choose one of {names}, or a window by number such as w1536-a64")
    window, answer_room = map(int, numbers.groups())
    if answer_room >= window:
        raise ValueError(
            f"unknown protocol {name!r}: an answer room of {answer_room} tokens leaves nothing of a window of {window}"
        )
    return Protocol(name, window, answer_room, max_prompt_tokens=2000 if window <= 2048 else None)


def protocol_named(name: str | Protocol | None, task: str) -> Protocol:
    """The one protocol that `name` means for a task. Raises ValueError as `cells`, and for a family of several."""
    fitting = cells(name, task)
    if len(fitting) > 1:
        members = ", ".join(protocol.name for protocol in fitting)
        raise ValueError(f"{name or default(task)} has several windows for {task}: name one of {members}")
    return fitting[0]


def _fits(protocol: Protocol, task: str) -> bool:
    """Whether a task (by its one name) can be run under a protocol."""
    if protocol.name.startswith("pages-") or task.startswith(PAGES):
        return protocol.name.startswith("pages-") and task in (PAGES, f"{PAGES}_{protocol.window}")
    if protocol.name in LM_EVAL:
        return task in LM_EVAL_TASKS
    if protocol.name.startswith("jrt-table2-"):
        is_nq = task.removeprefix(PREFIX).removeprefix("qa_").startswith("nq")
        return is_nq == protocol.name.startswith("jrt-table2-nq")
    return True
