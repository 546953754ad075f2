"""The task `reference_pages`: recall on documents that every machine has, the API text of Python's standard library.

One item is a window of a module's page (see `api_text`), the name of a function in it, and the argument list that
follows the name there. Windows end at the end of a line. They are measured with the tokenizer that ships with this
package, so every model reads the same text.
"""

from __future__ import annotations

import random
import sysconfig
import tokenize
from collections import Counter
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import api_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARGUMENT_CHARACTERS = (4, 60)  # fewest and most characters of an argument list that is asked
DEFAULT_ITEMS = 512
MIN_FILL = 0.75  # windows filled to less than this are left out: many windows of 2048 tokens would hold only 300
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Page(NamedTuple):
    """A module's rendered page."""

    module: str
    text: str


class Window(NamedTuple):
    """Some consecutive lines of one page.

    text: the lines joined by line feeds, without one at the end. tokens: their number in the tokenizer that cut
    them."""

    module: str
    first_line: int
    text: str
    tokens: int


class Selection(NamedTuple):
    """The documents that are asked.

    facts: number of headings in the windows they were chosen from. left_out: how many of these `askable` left out."""

    documents: list[dict]
    facts: int
    left_out: int


@cache
def library_pages() -> tuple[Page, ...]:
    """Returns the pages of the running Python's standard library, sorted by module.

    Tests, empty pages and files that are not valid Python (templates) are left out. Sources are read, never
    imported."""
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
    """Cuts a page into consecutive windows of whole lines, each of at most `size` tokens.

    A single line of more than `size` tokens ends a window and is left out. Windows filled to less than three quarters
    are left out too."""
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
        elif lowered.find(arguments, lowered.find(arguments) + 1) >= 0:  # this covers the question, whose name is there
            left_out["answer elsewhere"] += 1
        else:
            kept.append(fact)
    return kept, left_out


def select(size: int, tokenizer: PreTrainedTokenizerBase, count: int = DEFAULT_ITEMS, seed: int = 0) -> Selection:
    """Chooses `count` documents (fewer if there are no more), spread over all windows.

    Windows are taken in a shuffled order. One heading of every window is chosen before a second one of any. A smaller
    count gives the beginning of a larger one. Equal arguments give equal results under the same Python version.

    Args:
        size: tokens of a window.
        tokenizer: measures the windows.
        count: most documents.
        seed: of the choice.

    Returns:
        Documents with the fields id, module, line, name, arguments, tokens and window.
    """
    chosen = [window for page in library_pages() for window in windows(page, size, tokenizer)]
    generator = random.Random(f"reference_pages/{size}/{seed}")
    generator.shuffle(chosen)
    queues: list[list[dict]] = []
    left_out = 0
    for window in chosen:
        kept, dropped = askable(window)
        left_out += dropped.total()
        generator.shuffle(kept)
        queues.append([_document(window, fact) for fact in kept])
    documents = [doc for turn in zip_longest(*queues) for doc in turn if doc is not None]
    return Selection(documents[:count], len(documents) + left_out, left_out)


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
