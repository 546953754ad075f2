"""Tasks and protocols: the two names that every recall score is reported with.

A *task* says which documents are asked. A *protocol* is everything else that a score depends on, besides the model and
the reading strategy. The most important part is the *window*: how many tokens of a long document are kept around the
answer. The same model on the same task can differ by tens of points between the windows in use. The *answer room* is
the part of a window that is left free for the answer.

    jrt-table1, jrt-table2-*   the settings of the paper's Tables 1 and 2
    full                       nothing is cut
    wW-aA                      any window W and answer room A, such as w1536-a64
    pages-*                    for the reference pages only
    lm-eval-v0, lm-eval-v1     the prompts of lm-eval's own swde, fda and squad_completion

`jrt-table2` and `pages` are families: several protocols with different windows. A window is measured with the cutting
tokenizer, which is part of the protocol, so every model reads the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

GPT2 = "gpt2"
SHIPPED = "shipped"
"""Names of the two cutting tokenizers: GPT-2's byte-level BPE (as published), and this package's of 4,096 entries."""
PREFIX = "recall_"
PAGES = "recall_reference_pages"
PAGE_WINDOWS = (512, 1024, 2048)
LM_EVAL: dict[str, Callable[[str], str]] = {"lm-eval-v0": str, "lm-eval-v1": str.strip}
"""The protocols of lm-eval's own tasks, and what each does to the columns `text` and `value`.

The numbers are the versions in lm-eval's tables. Version 1 strips both columns (lm-eval pull request 3795, in 0.4.13).
Version 0 takes them as they are in the dataset."""
_BY_NUMBER = re.compile(r"w([1-9]\d{0,8})-a(0|[1-9]\d{0,8})")
PASSAGES_VERSION = 2
"""Version of the protocols of the `qa_*` tasks. In version 2 any of a document's answers counts, and a window is cut
around the first one that is in the passage, and keeps the question. Version 1 used only the first answer, as the
published tasks do."""
LM_EVAL_TASKS = ("recall_swde", "recall_fda", "recall_squad", "qa_squad", "qa_nq", "qa_triviaqa", "qa_drop")
"""Tasks that can run under an lm-eval protocol, because their `text` ends with the question."""


@dataclass(frozen=True)
class Task:
    """A task on a published dataset, on passages of your own, or on reference pages.

    Args:
        name: of its files and items. The full name of a published task is `recall_NAME`.
        form: of its prompts (see `prompts`).
        columns: the columns that its file must have.
        context: the column that is cut around the answer, and in which answers are located. Where the question has a
            column of its own, it is not part of this one. squad has both in `text`, as published.
        answer_keys: columns whose value is searched for in the context to find the answer. A published task without
            them keeps the beginning of a document.
        labels: the column with the answers, once a document is read.
        dataset: name of the published dataset on the hub; None for the other tasks.
    """

    name: str
    form: str
    columns: tuple[str, ...]
    context: str
    answer_keys: tuple[str, ...]
    labels: str
    dataset: str | None = None


_ATTRIBUTE = ("text", "key", "value")
_SQUAD = ("text", "context", "question", "value")
_CLOZE = ("context", "question", "orig_question", "answers")
_PUBLISHED = (
    Task("swde", "swde", _ATTRIBUTE, "text", ("key", "value"), "value", "hazyresearch/based-swde-v2"),
    Task("fda", "fda", _ATTRIBUTE, "text", ("key", "value"), "value", "hazyresearch/based-fda"),
    Task("squad", "squad", _SQUAD, "text", ("value",), "value", "hazyresearch/based-squad"),
    Task("drop", "drop", _CLOZE, "context", (), "answers", "hazyresearch/based_drop"),
    Task("nq_512", "nq", _CLOZE, "context", ("answers",), "answers", "hazyresearch/based_nq_512"),
    Task("nq_1024", "nq", _CLOZE, "context", ("answers",), "answers", "hazyresearch/based_nq_1024"),
    Task("nq_2048", "nq", _CLOZE, "context", ("answers",), "answers", "hazyresearch/based_nq_2048"),
    Task("triviaqa", "triviaqa", (*_CLOZE, "doc_id"), "context", (), "answers", "hazyresearch/based_triviaqa"),
)
PUBLISHED = {task.name: task for task in _PUBLISHED}
"""The published datasets by name; the task on each is `recall_NAME`."""
_QA = ("context", "question", "answers")
_PASSAGES = (
    *(Task(name, "passage", _QA, "context", (), "answers") for name in ("qa_squad", "qa_nq", "qa_triviaqa", "qa_drop")),
    Task("qa_fda", "fda", ("text", "attributes"), "text", (), "answers"),
)
PASSAGES = {task.name: task for task in _PASSAGES}
"""Tasks on passages from a local folder."""
_PAGE = Task("reference_pages", "page", (), "window", (), "answers")
_BY_NAME = {**PUBLISHED, "nq": PUBLISHED["nq_1024"], **PASSAGES, "reference_pages": _PAGE}
_BY_NAME |= {f"reference_pages_{window}": _PAGE for window in PAGE_WINDOWS}
TASKS = (*(PREFIX + name for name in PUBLISHED), *(f"{PAGES}_{window}" for window in PAGE_WINDOWS), *PASSAGES)
"""The full names of all tasks, as they stand in results here and in lm-eval."""


def task_named(name: str) -> str:
    """Returns the full name of a task, as it stands in results: `recall_fda` for `fda` and for `recall_fda`.

    `reference_pages` may be named without a window, which the protocol then gives. Raises ValueError for unknown
    names."""
    plain = name.strip() if isinstance(name, str) else ""
    for found in (plain, PREFIX + plain):
        if found in TASKS or found == PAGES:
            return found
    raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")


def document_task(name: str) -> Task:
    """Returns the task of that name, with or without `recall_`. Raises ValueError for unknown names.

    `nq` gives `nq_1024`: the three NQ sizes share their rules."""
    task = _BY_NAME.get(name.removeprefix(PREFIX)) if isinstance(name, str) else None
    if task is None:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return task


def published_task(name: str) -> Task:
    """Returns the task of that name. Raises ValueError if it is not on a published dataset."""
    task = document_task(name)
    if task.dataset is None:
        raise ValueError(f"{name} has no published dataset: choose one of {', '.join(PUBLISHED)}")
    return task


@dataclass(frozen=True)
class Protocol:
    """One protocol. Window and answer room are in tokens of `cutting_tokenizer`, the other lengths in the model's
    tokens.

    Args:
        name: unique, such as `jrt-table1`.
        window: `window - answer_room` tokens of the context are kept. None leaves documents whole.
        answer_room: tokens of the window that are left free for the answer.
        max_prompt_tokens: longer prompts are cut to this length on `truncation_side`. None: to the model's own limit.
        cutting_tokenizer: name of the tokenizer that measures the window.
        padding_side: where shorter prompts of a batch are padded.
        truncation_side: the side that loses tokens.
        max_new_tokens: most tokens that are generated.
        stop: a generation ends before any of these strings.
        metric: name of the metric.
        version: raised when the same name gives other scores.
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
    # No answer room: these windows were made by cutting pages into pieces, not by cutting around an answer.
    *(Protocol(f"pages-{w}", w, 0, max_prompt_tokens=None, cutting_tokenizer=SHIPPED) for w in PAGE_WINDOWS),
    Protocol("lm-eval-v0", None, 0, max_prompt_tokens=None, cutting_tokenizer=None, version=0),
    Protocol("lm-eval-v1", None, 0, max_prompt_tokens=None, cutting_tokenizer=None),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
FAMILIES = {
    "jrt-table2": ("jrt-table2-512", "jrt-table2-1024", "jrt-table2-2048", "jrt-table2-nq"),
    "pages": tuple(f"pages-{window}" for window in PAGE_WINDOWS),
}


def default(task: str) -> str:
    """Returns the name of the protocol or family that a task uses if none is named."""
    name = task_named(task)
    if name.startswith(PAGES):
        return "pages"
    return "full" if name in PASSAGES else "jrt-table1"


def cells(name: str | Protocol | None, task: str) -> tuple[Protocol, ...]:
    """Returns the protocols that `name` means for a task. Each is one cell of the results table.

    A family gives all its members that fit the task. NQ under `jrt-table2` is a single cell, because its documents are
    cut already in the dataset. Raises ValueError for an unknown name or a protocol that does not fit the task."""
    if isinstance(name, Protocol):
        chosen: tuple[Protocol, ...] = (name,)
    else:
        name = default(task) if name is None else name
        members = FAMILIES.get(name, (name,)) if isinstance(name, str) else (name,)
        chosen = tuple(map(_by_name, members))
    fitting = tuple(protocol for protocol in chosen if _fits(protocol, task_named(task)))
    if not fitting:
        allowed = ", ".join(protocol.name for protocol in _ALL if _fits(protocol, task_named(task)))
        raise ValueError(f"protocol {chosen[0].name} is not for {task}: choose one of {allowed}")
    if task_named(task) in PASSAGES:
        return tuple(replace(protocol, version=PASSAGES_VERSION) for protocol in fitting)
    return fitting


def _by_name(name: str) -> Protocol:
    """Returns the protocol of that name: one of PROTOCOLS, or `wW-aA`.

    Up to a window of 2048, prompts are cut to 2000 tokens, as in the authors' released code: 2048 positions, 48 of them
    for the answer. A longer window would not fit that limit, so its prompts are cut to the model's own limit."""
    if not isinstance(name, str):
        raise ValueError(f"a protocol is named by text such as 'w1536-a64', got {name!r}")
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    numbers = _BY_NUMBER.fullmatch(name)
    if numbers is None:
        raise ValueError(
            f"unknown protocol {name!r}: choose one of {', '.join((*PROTOCOLS, *FAMILIES))}; "
            "a window by number is w, its tokens (1 to 999999999), -a, and its answer room, such as w1536-a64"
        )
    window, answer_room = map(int, numbers.groups())
    if answer_room >= window:
        raise ValueError(
            f"unknown protocol {name!r}: an answer room of {answer_room} tokens leaves nothing of a window of {window}"
        )
    return Protocol(name, window, answer_room, max_prompt_tokens=2000 if window <= 2048 else None)


def protocol_named(name: str | Protocol | None, task: str) -> Protocol:
    """Returns the one protocol that `name` means for a task. Raises ValueError as `cells`, and if there are several."""
    fitting = cells(name, task)
    if len(fitting) > 1:
        members = ", ".join(protocol.name for protocol in fitting)
        raise ValueError(f"{name or default(task)} has several windows for {task}: name one of {members}")
    return fitting[0]


def _fits(protocol: Protocol, task: str) -> bool:
    """Whether a task, given by its full name, can be run under a protocol."""
    if protocol.name.startswith("pages-") or task.startswith(PAGES):
        return protocol.name.startswith("pages-") and task in (PAGES, f"{PAGES}_{protocol.window}")
    if protocol.name in LM_EVAL:
        return task in LM_EVAL_TASKS
    if protocol.name.startswith("jrt-table2-"):
        is_nq = task.removeprefix(PREFIX).removeprefix("qa_").startswith("nq")
        return is_nq == protocol.name.startswith("jrt-table2-nq")
    return True
