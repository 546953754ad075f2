"""Evaluation protocols by name: everything that a score depends on besides the model, the task and the strategy.

A recall score means nothing without its window: the same model and task move by tens of points between the settings
in circulation. `jrt-table1` and `jrt-table2-*` are the paper's two tables, `full` cuts nothing, `wW-aA` are the window
and answer room that later papers used, `pages-*` belong to the reference pages. `jrt-table2` and `pages` name families
with one protocol per column; `cells` gives those that apply to a task. Windows are measured in the cutting tokenizer,
which is part of the protocol, so that every model reads the same text.
"""

from dataclasses import asdict, dataclass, replace

GPT2 = "gpt2"
SHIPPED = "shipped"
"""Cutting tokenizers: GPT-2's byte-level BPE (as published), and the 4,096-entry vocabulary of this package."""


@dataclass(frozen=True)
class Protocol:
    """One setting. Lengths are tokens: window, answer_room and the cut by `cutting_tokenizer`, the rest by the model's.

    window: None leaves documents whole; the context that is kept is `window - answer_room`.
    max_prompt_tokens: prompts are cut to it on `truncation_side`; None: only the model's own limit."""

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

    def cut_with(self, tokenizer_name: str) -> "Protocol":
        """This protocol with another cutting tokenizer, under a name that says so: its scores are not the same."""
        if self.window is None or tokenizer_name == self.cutting_tokenizer:
            return self
        return replace(self, name=f"{self.name}+cut-by-{tokenizer_name}", cutting_tokenizer=tokenizer_name)


def _pages(window: int) -> Protocol:
    # A window of a page has no answer room: the fact stands in it and the question follows it.
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
    _pages(512),
    _pages(1024),
    _pages(2048),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
FAMILIES = {
    "jrt-table2": ("jrt-table2-512", "jrt-table2-1024", "jrt-table2-2048", "jrt-table2-nq"),
    "pages": ("pages-512", "pages-1024", "pages-2048"),
}


def names() -> tuple[str, ...]:
    """All names that `cells` takes: protocols and families."""
    return (*PROTOCOLS, *FAMILIES)


def default(task: str) -> str:
    """The protocol or family a task is run under when none is named."""
    if task.startswith("reference_pages"):
        return "pages"
    return "full" if task.startswith("qa_") else "jrt-table1"


def cells(name: "str | Protocol | None", task: str) -> tuple[Protocol, ...]:
    """The protocols that `name` means for a task: one, or one per column of its family.

    NQ under `jrt-table2` is one cell (its documents are cut beforehand). Raises ValueError for an unknown name and for
    a protocol that contradicts the task."""
    if isinstance(name, Protocol):
        chosen = (name,)
    else:
        name = default(task) if name is None else name
        if name not in PROTOCOLS and name not in FAMILIES:
            raise ValueError(f"unknown protocol {name!r}: choose one of {', '.join(names())}")
        chosen = tuple(PROTOCOLS[member] for member in FAMILIES.get(name, (name,)))
    fitting = tuple(protocol for protocol in chosen if _fits(protocol, task))
    if not fitting:
        allowed = ", ".join(protocol.name for protocol in _ALL if _fits(protocol, task))
        raise ValueError(f"protocol {chosen[0].name} is not for {task}: choose one of {allowed}")
    return fitting


def protocol_named(name: "str | Protocol | None", task: str) -> Protocol:
    """The one protocol that `name` means for a task. Raises ValueError as `cells`, and for a family of several."""
    fitting = cells(name, task)
    if len(fitting) > 1:
        members = ", ".join(protocol.name for protocol in fitting)
        raise ValueError(f"{name or default(task)} has several windows for {task}: name one of {members}")
    return fitting[0]


def _fits(protocol: Protocol, task: str) -> bool:
    if protocol.name.startswith("pages-") or task.startswith("reference_pages"):
        return protocol.name.startswith("pages-") and task.startswith("reference_pages")
    if protocol.name.startswith("jrt-table2-"):
        is_nq = task.removeprefix("qa_").startswith("nq")
        return is_nq == protocol.name.startswith("jrt-table2-nq")
    return True
