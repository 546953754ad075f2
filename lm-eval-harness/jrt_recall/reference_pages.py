"""Reference pages: recall on real documents that every machine has, the API text of Python's standard library.

One item is a window of a module's page (see `api_text`), a function's name in it, and the argument list that follows the
name there. The model sees the window and `name(`; a right generation contains `arguments)`. Windows end at line borders and
are measured in the shipped vocabulary, so that every model reads the same text.
"""

from __future__ import annotations

import random
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import api_text
from .prompts import Strategy, strategy_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARGUMENT_CHARACTERS = (4, 60)
DEFAULT_ITEMS = 512
MIN_FILL = 0.75  # least part of a window that is filled: without it many windows of 2048 tokens would hold 300
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Page(NamedTuple):
    """A module's rendered page."""

    module: str
    text: str


class Window(NamedTuple):
    """Lines of one page, joined by line feeds (no last one), and their tokens in the vocabulary that measured them."""

    module: str
    first_line: int
    text: str
    tokens: int


class Selection(NamedTuple):
    """Chosen documents, the windows they came from, and how many facts each rule left out."""

    documents: list[dict]
    windows: int
    facts: int
    left_out: dict[str, int]


def python_version() -> str:
    """The version whose standard library is read: part of a result, since pages change with it."""
    return ".".join(map(str, sys.version_info[:3]))


@cache
def library_pages() -> tuple[Page, ...]:
    """Pages of the running Python's standard library, sorted by module; tests and empty pages are left out.

    Sources are read, never imported. Files that are not Python of this version (templates) are left out too."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pages = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _NOT_LIBRARY.isdisjoint(parts) and (text := _rendered(file)):
            pages.append(Page(".".join(parts).removesuffix(".__init__"), text))
    if not pages:
        raise ValueError(f"the standard library of this Python has no readable sources at {root}")
    return tuple(sorted(pages))


def _rendered(file: Path) -> str:
    try:
        with tokenize.open(file) as stream:
            return api_text.render(stream.read())
    except (SyntaxError, ValueError):
        return ""


def windows(page: Page, size: int, tokenizer: PreTrainedTokenizerBase) -> list[Window]:
    """A page cut at line borders into consecutive windows of at most `size` tokens; a longer line ends a window and is
    left out, and so are windows filled to less than three quarters."""
    lines = page.text.split("\n")
    counts = [len(ids) for ids in tokenizer([line + "\n" for line in lines], add_special_tokens=False)["input_ids"]]
    cuts, start, total = [], 0, 0
    for number, count in enumerate(counts):
        if total + count > size:
            cuts.append((start, number, total))
            start, total = (number + 1, 0) if count > size else (number, 0)
        if count <= size:
            total += count
    cuts.append((start, len(lines), total))
    return [
        Window(page.module, start, "\n".join(lines[start:end]), tokens)
        for start, end, tokens in cuts
        if tokens >= MIN_FILL * size
    ]


def askable(window: Window) -> tuple[list[api_text.Fact], Counter[str]]:
    """Facts of a window that can be asked, and how many each rule left out.

    Left out: argument lists outside 4 to 60 characters; names headed twice; arguments that stand in the question or
    elsewhere in the window (in any letter case, as the metric compares)."""
    found = api_text.facts(window.text)
    headed = Counter(fact.name for fact in found)
    lowered = window.text.lower()
    low, high = ARGUMENT_CHARACTERS
    kept: list[api_text.Fact] = []
    left_out: Counter[str] = Counter()
    for fact in found:
        arguments = fact.arguments.lower()
        if not low <= len(arguments) <= high:
            left_out["length"] += 1
        elif headed[fact.name] > 1:
            left_out["name headed twice"] += 1
        elif _occurrences(arguments, lowered) > 1:  # the name stands in the window too: this covers the question
            left_out["answer elsewhere"] += 1
        else:
            kept.append(fact)
    return kept, left_out


def _occurrences(needle: str, text: str) -> int:
    """Occurrences of needle in text, overlapping ones included; stops at two."""
    first = text.find(needle)
    return (first >= 0) + (first >= 0 and text.find(needle, first + 1) >= 0)


def select(
    size: int,
    tokenizer: PreTrainedTokenizerBase,
    count: int = DEFAULT_ITEMS,
    seed: int = 0,
    pages: Sequence[Page] | None = None,
) -> Selection:
    """`count` items (fewer if there are no more) spread over all windows, the same for equal arguments and Python.

    Windows are taken in a shuffled order, one fact from each before a second from any; a smaller count gives the
    beginning of a larger one. A document has window, name, arguments, module, line and tokens."""
    chosen = [w for page in (library_pages() if pages is None else pages) for w in windows(page, size, tokenizer)]
    generator = random.Random(f"reference_pages/{size}/{seed}")
    generator.shuffle(chosen)
    left_out: Counter[str] = Counter()
    queues: list[list[dict]] = []
    facts = 0
    for window in chosen:
        kept, dropped = askable(window)
        left_out += dropped
        facts += len(kept) + dropped.total()
        generator.shuffle(kept)
        queues.append([_document(window, fact) for fact in kept])
    rounds = max(map(len, queues), default=0)
    documents = [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]
    return Selection(documents[:count], len(chosen), facts, dict(left_out))


def _document(window: Window, fact: api_text.Fact) -> dict:
    return {
        "id": f"{window.module}:{window.first_line + fact.line}:{fact.name}",
        "module": window.module,
        "line": window.first_line + fact.line,
        "name": fact.name,
        "arguments": fact.arguments,
        "tokens": window.tokens,
        "window": window.text,
    }


def answer(doc: dict) -> str:
    """What a right generation contains: the arguments and the bracket that ends them, so a longer list is no hit."""
    return doc["arguments"] + ")"


def prompt(doc: dict, strategy: str | Strategy = "once") -> str:
    """The prompt of one document: [`name ?`] window ... window `name(`, each on lines of its own."""
    chosen = strategy_named(strategy)
    announcement = api_text.announcement(doc["name"]) + "\n" if chosen.announced else ""
    return announcement + f"{doc['window']}\n" * chosen.copies + api_text.question(doc["name"])
