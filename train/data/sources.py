"""Where tokens come from. A source gives windows of consecutive tokens by number, and says where documents begin in them.

Shapes: T tokens of a training sequence; a window has T + 1, so that each of the first T has a following token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data.indexed import Index, read_index

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class TokenSource(Protocol):
    """Windows 0 to len() - 1; each token but the first is the last target of one window or read in the next."""

    length: int  # T

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """(T + 1,) int64 ids of window i."""
        ...

    def document_starts(self, i: int) -> np.ndarray:
        """Places in window i at which a document begins."""
        ...


class TokenFile:
    """A file of token ids, one document after the other, with the .idx file of GPT-NeoX and Megatron or without.

    Args:
        path: NAME.bin; NAME.idx beside it gives the ids' type and the documents.
        length: T.
        dtype: of the ids, where there is no .idx file.
        end_token: id that ends each document, where there is no .idx file.

    Raises:
        ValueError: the file is missing, damaged, or holds less than one window.
    """

    def __init__(self, path: Path | str, length: int, dtype: str = "uint16", end_token: int | None = None) -> None:
        self.path, self.length, self.end_token = Path(path), length, end_token
        if not self.path.is_file():
            raise ValueError(f"no token file at {self.path}: make it with `python train/prepare.py SOURCE OUT`")
        index_path = self.path.with_suffix(".idx")
        self.index: Index | None = read_index(index_path) if index_path.is_file() else None
        kind = np.dtype(dtype) if self.index is None else self.index.dtype
        size = self.path.stat().st_size
        if self.index is not None and self.index.documents:
            expected = int(self.index.ends[-1]) * kind.itemsize
            if size != expected:
                raise ValueError(
                    f"{self.path} has {size} bytes, but its index tells of {expected}: the file is cut or foreign"
                )
        if size % kind.itemsize:
            raise ValueError(
                f"{self.path} has {size} bytes: no whole number of {kind} ids; is it cut, or of another type?"
            )
        if size // kind.itemsize < length + 1:
            raise ValueError(f"{self.path} holds {size // kind.itemsize} tokens: a window needs {length + 1}")
        self.tokens = np.memmap(self.path, kind, mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def read(self, i: int) -> np.ndarray:
        start = _checked(i, len(self)) * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int64)

    def document_starts(self, i: int) -> np.ndarray:
        start = _checked(i, len(self)) * self.length
        if self.index is not None:
            ends = self.index.ends
            inside = (
                ends[np.searchsorted(ends, start) : np.searchsorted(ends, start + self.length, side="right")] - start
            )
            return np.append(0, inside) if start == 0 else inside
        if self.end_token is None:
            raise ValueError(f"{self.path} has no index, and no end_token was given: where documents end is unknown")
        before = self.tokens[max(start - 1, 0) : start + self.length]
        ends = np.flatnonzero(before == self.end_token) + (start == 0)
        return np.append(0, ends) if start == 0 else ends

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, out of a file with an index."""
        assert self.index is not None
        ends = self.index.ends
        return self.tokens[0 if number == 0 else ends[number - 1] : ends[number]]


class DatasetTokens:
    """A Hugging Face dataset whose rows are documents: of ids (column `input_ids`), or of text, which is tokenised once and
    kept in the dataset's cache.

    Raises:
        ValueError: neither column exists, there is text but no tokenizer, or less than one window.
    """

    def __init__(
        self,
        dataset: Dataset,
        length: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        column: str = "text",
        processes: int | None = None,
    ) -> None:
        import pyarrow.compute

        self.length = length
        if "input_ids" not in dataset.column_names:
            if column not in dataset.column_names:
                raise ValueError(f"the dataset has columns {dataset.column_names}; expected input_ids or {column!r}")
            if tokenizer is None:
                raise ValueError("the dataset holds text: give a tokenizer")
            dataset = dataset.map(
                lambda rows: {"input_ids": encode_documents(rows[column], tokenizer)},
                batched=True,
                remove_columns=dataset.column_names,
                num_proc=processes,
                desc="encoding",
            )
        self.dataset = dataset.with_format("numpy", columns=["input_ids"])
        lists = dataset.with_format("arrow")
        sizes = [
            pyarrow.compute.list_value_length(lists[start : start + 10_000]["input_ids"]).to_numpy()
            for start in range(0, len(dataset), 10_000)
        ]
        self.ends = np.cumsum(np.concatenate(sizes) if sizes else np.zeros(0), dtype=np.int64)
        if not len(self.ends) or self.ends[-1] < length + 1:
            raise ValueError(
                f"the dataset holds {self.ends[-1] if len(self.ends) else 0} tokens: a window needs {length + 1}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1] - 1) // self.length

    def read(self, i: int) -> np.ndarray:
        start = _checked(i, len(self)) * self.length
        stop = start + self.length + 1
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        documents = [np.asarray(row) for row in self.dataset[int(first) : int(last) + 1]["input_ids"]]
        before = 0 if first == 0 else self.ends[first - 1]
        return np.concatenate(documents)[start - before : stop - before].astype(np.int64)

    def document_starts(self, i: int) -> np.ndarray:
        start = _checked(i, len(self)) * self.length
        starts = np.append(0, self.ends[:-1])
        return starts[np.searchsorted(starts, start) : np.searchsorted(starts, start + self.length + 1)] - start


class StreamedTokens:
    """A Hugging Face dataset that is streamed: its windows are made in the order of its documents.

    Only the next window is at hand. A later one is reached by reading up to it, an earlier one by starting again. A run
    that goes on from a checkpoint begins where `state` says, without reading what came before.

    Args:
        dataset: an `IterableDataset` of rows with text or with `input_ids`.
        length: T.
        windows: how many windows the run may ask for.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        length: int,
        windows: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        column: str = "text",
    ) -> None:
        self.dataset, self.length, self.windows = dataset, length, windows
        self.tokenizer, self.column = tokenizer, column
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self._first = dataset.state_dict()
        self._start_again()

    def __len__(self) -> int:
        return self.windows

    def read(self, i: int) -> np.ndarray:
        return self._window(i)[0]

    def document_starts(self, i: int) -> np.ndarray:
        return self._window(i)[1]

    def state(self) -> dict:
        """Where the stream stands, as JSON: the next window, the dataset's own place, and the tokens read ahead."""
        ahead = {"ids": self._ids.tolist(), "starts": self._starts.tolist()}
        return {"next": self._next, "dataset": self.dataset.state_dict()} | ahead

    def go_on(self, state: dict) -> None:
        """Stands where `state` was taken."""
        self.dataset.load_state_dict(state["dataset"])
        self._documents = self._encoded()
        self._ids, self._starts = (np.asarray(state[name], np.int64) for name in ("ids", "starts"))
        self._next, self._last = state["next"], None

    def _start_again(self) -> None:
        self.go_on({"next": 0, "dataset": self._first, "ids": [], "starts": []})

    def _encoded(self) -> Iterator[list[int]]:
        for row in self.dataset:
            if "input_ids" in row:
                yield row["input_ids"]
            elif self.tokenizer is not None and self.column in row:
                yield encode_documents([row[self.column]], self.tokenizer)[0]
            else:
                raise ValueError(
                    f"the stream has columns {list(row)}; expected input_ids, or {self.column!r} and a tokenizer"
                )

    def _window(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        _checked(i, self.windows)
        if i < self._next - (self._last is not None):
            self._start_again()
        while self._next <= i:
            while len(self._ids) < self.length + 1:
                document = next(self._documents, None)
                if document is None:
                    raise ValueError(f"the stream ended after {self._next} windows of {self.length} tokens")
                self._starts = np.append(self._starts, len(self._ids))
                self._ids = np.concatenate([self._ids, np.asarray(document, np.int64)])
            inside = self._starts[self._starts <= self.length]
            self._last = self._ids[: self.length + 1], inside
            self._ids = self._ids[self.length :]
            self._starts = self._starts[self._starts >= self.length] - self.length
            self._next += 1
        assert self._last is not None
        return self._last


class Joined:
    """Several sources, one after the other; windows never cross from one to the next."""

    def __init__(self, sources: Sequence[TokenSource]) -> None:
        if not sources:
            raise ValueError("nothing to read from: expected at least one token file")
        if len({source.length for source in sources}) > 1:
            raise ValueError("sources with windows of different lengths cannot be joined")
        self.sources, self.length = list(sources), sources[0].length
        self.stops = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def read(self, i: int) -> np.ndarray:
        source, own = self._place(i)
        return source.read(own)

    def document_starts(self, i: int) -> np.ndarray:
        source, own = self._place(i)
        return source.document_starts(own)

    def _place(self, i: int) -> tuple[TokenSource, int]:
        number = int(np.searchsorted(self.stops, _checked(i, len(self)), side="right"))
        return self.sources[number], i - (int(self.stops[number - 1]) if number else 0)


def encode_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, its end marked by the tokenizer's end-of-text id. The name of a special entry is plain text here.

    Raises:
        ValueError: the tokenizer has no end-of-text id.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-text token, which separates documents"
        )
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # documents may be longer than a model's context: they are cut into windows
    )
    return [list(chain(ids, [tokenizer.eos_token_id])) for ids in found["input_ids"]]


def _checked(i: int, count: int) -> int:
    if not 0 <= i < count:
        raise IndexError(f"window {i}: expected 0 to {count - 1}")
    return i
