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
from collections.abc import Callable, Iterable
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
_NEARLY_BY_NUMBER = re.compile(r"\s*w-?\d.*", re.IGNORECASE)
PASSAGES = {"qa_squad": "squad", "qa_nq": "squad", "qa_triviaqa": "squad", "qa_drop": "squad", "qa_fda": "fda"}
"""Tasks on passages from a local folder, and the published task whose prompts each takes."""
PASSAGES_VERSION = 2
"""Version of the protocols of these tasks. In version 2 any of a document's answers counts, and a window is cut around
the first one that is in the passage, and keeps the question. Version 1 used only the first answer, as the
published tasks do."""
LM_EVAL_TASKS = (
    "recall_swde",
    "recall_fda",
    "recall_squad",
    *(task for task, form in PASSAGES.items() if form == "squad"),
)
"""Tasks that can run under an lm-eval protocol, because their `text` ends with the question.

In `qa_fda` it does not."""


@dataclass(frozen=True)
class PublishedTask:
    """A published task: its dataset on the hub, and the columns that its prompts and its score use.

    Args:
        name: of the task, without `recall_`.
        dataset: name on the hub.
        columns: all columns that are used.
        context: the column that is cut around the answer.
        answer_keys: columns whose value is searched for in the context to find the answer. If there are none, the
            window is the beginning of the document.
        labels: the column with the answers.
        split: of the dataset.
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


def published_task(name: str) -> PublishedTask:
    """Returns the published task of that name, with or without `recall_`. For a `qa_*` task, the one whose prompts it
    uses.

    `nq` gives `nq_1024`: the three NQ sizes share their rules. Raises ValueError for unknown names."""
    plain = PASSAGES.get(name, name).removeprefix(PREFIX) if isinstance(name, str) else ""
    task = PUBLISHED.get("nq_1024" if plain == "nq" else plain)
    if task is None:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(PUBLISHED)}")
    return task


def context_column(task: str) -> str:
    """The column that a window cuts, and in which answers are located.

    Where a dataset keeps the question in a column of its own, it is not part of this one. recall_squad has both in
    `text`, as published."""
    return "context" if PASSAGES.get(task) == "squad" else published_task(task).context


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

    def can_hold(self, answers: Iterable[str]) -> bool:
        """Whether a generation can contain any of the answers. It cannot if each has a stop string in it."""
        return any(not any(stop in answer for stop in self.stop) for answer in answers)

    def cut_with(self, tokenizer_name: str) -> Protocol:
        """Returns this protocol with another cutting tokenizer. Its name says so, because its scores differ."""
        if self.window is None or tokenizer_name == self.cutting_tokenizer:
            return self
        return replace(self, name=f"{self.name}+cut-by-{tokenizer_name}", cutting_tokenizer=tokenizer_name)


def _pages(window: int) -> Protocol:
    # No answer room: these windows were made by cutting pages into pieces, not by cutting around an answer.
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
    if numbers is None and _NEARLY_BY_NUMBER.fullmatch(name):
        raise ValueError(
            f"unknown protocol {name!r}: a window by number is w, its tokens (1 to 999999999), -a, and its answer room, "
            "such as w1536-a64"
        )
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
