"""API text as token arrays: finds the lines and facts of a corpus, and takes windows of whole lines from its pages.

A *page* is the API text of one module, a *fact* is a heading `name(arguments)` in it (see `jrt_recall.api_text`).

Shapes: N tokens, L lines, V entries of the vocabulary.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

WORD = re.compile(r"^(Ġ|_|=|\.)?[A-Za-z]{2,}$")  # Ġ: the byte-level spelling of a space


@dataclass(frozen=True)
class Alphabet:
    """The ids of special entries of the vocabulary, and which entries are identifiers, closings or words."""

    end: int
    pad: int
    mask: int
    newline: int
    opening: int  # "(", always an entry of its own after a name
    asks: np.ndarray  # (2,) " ?": what follows a name in an announcement, then the line end
    is_identifier: np.ndarray  # (V,) letters, digits, underscores only
    is_closing: np.ndarray  # (V,) ends with ")"
    word_classes: tuple[np.ndarray, ...]  # ids of words, one array for each kind of sign that leads them

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Alphabet":
        entries = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        leads: dict[str, list[int]] = {}
        for index, entry in enumerate(entries):
            if match := WORD.match(entry):
                leads.setdefault(match[1] or "", []).append(index)
        asks = tokenizer.encode(" ?\n", add_special_tokens=False)
        return cls(
            end=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            mask=tokenizer.mask_token_id,
            newline=tokenizer.convert_tokens_to_ids("Ċ"),
            opening=tokenizer.convert_tokens_to_ids("("),
            asks=np.array(asks, np.uint16),
            is_identifier=np.array([bool(re.fullmatch(r"\w+", e, re.ASCII)) for e in entries]),
            is_closing=np.array([e.endswith(")") for e in entries]),
            word_classes=tuple(np.array(ids) for ids in leads.values()),
        )


@dataclass(frozen=True)
class Fact:
    """One heading in an array of tokens.

    ``[start, opening)`` is the name, ``opening`` is the bracket, and ``[opening + 1, stop)`` is the answer with its
    line end."""

    start: int
    opening: int
    stop: int


class Pages:
    """The tokens of a corpus file with its lines and facts. Each document ends with a line end and the end-of-text id.

    Raises ``ValueError`` for a file that holds no fact in this vocabulary.
    """

    def __init__(self, tokens: np.ndarray, alphabet: Alphabet) -> None:
        self.tokens, self.alphabet = tokens, alphabet
        ends = np.flatnonzero(tokens == alphabet.newline) + 1  # (L,) one past each line end
        starts = np.concatenate([[0], ends[:-1]])
        starts += tokens[starts] == alphabet.end
        self.starts, self.stops = starts, ends
        document_ends = np.flatnonzero(tokens == alphabet.end)
        document = np.searchsorted(document_ends, starts)  # (L,) index of the document of each line
        edges = np.flatnonzero(np.diff(document, prepend=-1))
        counts = np.diff(np.append(edges, len(starts)))
        self.first_line = np.repeat(edges, counts)  # (L,) of the line's document
        self.last_line = np.repeat(edges + counts, counts)  # one past
        foreign = np.flatnonzero(~alphabet.is_identifier[tokens])
        opening = foreign[np.searchsorted(foreign, starts)]
        heads = (tokens[opening] == alphabet.opening) & (opening > starts) & alphabet.is_closing[tokens[ends - 2]]
        heads &= ends - 2 > opening + 1  # a function without arguments makes no question
        self.openings = np.where(heads, opening, 0)  # (L,) 0: no fact
        self.fact_lines = np.flatnonzero(heads)
        if not len(self.fact_lines):
            raise ValueError("no line `name(arguments)` in the corpus: was it made with this vocabulary?")

    @classmethod
    def load(cls, path: Path | str, tokenizer: PreTrainedTokenizerBase) -> "Pages":
        """Reads a corpus. Raises ValueError if it is missing, cut, or of another vocabulary."""
        if not Path(path).is_file():
            raise ValueError(f"no corpus at {path}: make it with train/corpus.py")
        size = Path(path).stat().st_size
        if not size or size % 2:
            raise ValueError(f"{path} has {size} bytes: expected ids of two bytes each; is it cut?")
        tokens = np.fromfile(path, np.uint16)
        if (largest := int(tokens.max())) >= len(tokenizer):
            raise ValueError(
                f"{path} has id {largest}, outside the vocabulary of {len(tokenizer)} entries: was it made with another one?"
            )
        return cls(tokens, Alphabet.of(tokenizer))

    def window(self, generator: np.random.Generator, size: int) -> tuple[int, int]:
        """Returns the lines [first, last) of a window of one page: at most `size` tokens around a randomly drawn fact.

        A line of more than `size` tokens is a window of its own."""
        line = self.fact_lines[generator.integers(len(self.fact_lines))]
        low, high = self.first_line[line], self.last_line[line]
        earliest = self.stops[line] - int(size * generator.random())
        first = min(max(low, np.searchsorted(self.starts, earliest)), line)
        last = np.searchsorted(self.stops, self.starts[first] + size, side="right")
        return int(first), int(min(max(last, first + 1), high))

    def facts(self, first: int, last: int) -> list[Fact]:
        """The facts in the lines [first, last). Positions count from the start of line `first`."""
        origin = self.starts[first]
        return [
            Fact(int(self.starts[i] - origin), int(self.openings[i] - origin), int(self.stops[i] - origin))
            for i in (np.flatnonzero(self.openings[first:last]) + first)
        ]

    def text(self, first: int, last: int) -> np.ndarray:
        """Tokens of the lines [first, last) of one page."""
        return self.tokens[self.starts[first] : self.stops[last - 1]]
