"""Sources of tokens. A source returns window number i of its tokens, and says where documents begin in that window.

Shapes: T tokens of a training sequence. A window has T + 1 tokens, so that each of the first T has a next token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data.files import read_ids
from train.data.indexed import Index, read_index

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class TokenSource(Protocol):
    """Windows 0 to len() - 1.

    The last token of a window, which is only a target, is the first token of the next one."""

    length: int  # T

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """(T + 1,) int64 ids of window i."""
        ...

    def document_starts(self, i: int) -> np.ndarray:
        """Positions in window i at which a document begins."""
        ...


class TokenFile:
    """A file of token ids, one document after the other. An .idx file as GPT-NeoX and Megatron write it may lie beside
    it.

    Args:
        path: NAME.bin. If there is a NAME.idx in the same folder, it gives the type of the ids and the ends of
            documents.
        length: T.
        dtype: of the ids; only used without an .idx file.
        end_token: id that ends each document; only used without an .idx file.

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
        if self.index is not None:
            expected = int(self.index.ends[-1]) * kind.itemsize if self.index.documents else 0
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
        self.dtype, self.count = kind, size // kind.itemsize

    def __len__(self) -> int:
        return (self.count - 1) // self.length

    def read(self, i: int) -> np.ndarray:
        start = _checked(i, len(self)) * self.length
        return read_ids(self.path, self.dtype, start, start + self.length + 1).astype(np.int64)

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
        before = read_ids(self.path, self.dtype, max(start - 1, 0), start + self.length)
        ends = np.flatnonzero(before == self.end_token) + (start == 0)
        return np.append(0, ends) if start == 0 else ends

    def document(self, number: int) -> np.ndarray:
        """Returns the ids of one document. The file must have an .idx file."""
        assert self.index is not None
        ends = self.index.ends
        return read_ids(self.path, self.dtype, 0 if number == 0 else int(ends[number - 1]), int(ends[number]))


class DatasetTokens:
    """A Hugging Face dataset with one document in each row.

    A row holds token ids (column `input_ids`) or text. Text is tokenised once and kept in the dataset's cache.

    Args:
        dataset: a `datasets.Dataset`.
        length: T.
        tokenizer: for text.
        column: of the text.
        processes: that tokenise; None: one.

    Raises:
        ValueError: neither column exists, there is text but no tokenizer, or the dataset is shorter than one window.
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


class StreamEnd(ValueError):
    """A stream has fewer windows than were asked for."""


class StreamedTokens:
    """A Hugging Face dataset that is streamed. Windows are made in the order of its documents.

    Windows are best read in order: a later one is reached by reading all in between, an earlier one by starting the
    stream again. A resumed run continues at the place that `state` saved, without reading what came before.

    Args:
        dataset: an `IterableDataset` of rows with text or with `input_ids`.
        length: T.
        windows: how many windows the run may ask for.
        tokenizer: for text.
        column: of the text.
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
        """Returns the place in the stream, as plain values for JSON.

        It holds the number of the next window, the dataset's own state, and the tokens that were read ahead."""
        ahead = {"ids": self._ids.tolist(), "starts": self._starts.tolist()}
        return {"next": self._next, "dataset": self.dataset.state_dict()} | ahead

    def go_on(self, state: dict) -> None:
        """Moves to the place at which `state` was taken."""
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
                    raise StreamEnd(
                        f"the stream ended after {self._next} windows of {self.length} tokens: there is no more text"
                    )
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
    """Several sources, one after the other. No window spans two of them."""

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
    """Returns the ids of each text, followed by the tokenizer's end-of-text id.

    The name of a special entry inside a text is read as plain text. Unigram vocabularies cannot do so: there the name
    of the end-of-text entry is left out, because that id means the end of a document.

    Raises:
        ValueError: the tokenizer has no end-of-text id, or a document is no text.
    """
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a document is a {type(text).__name__}: expected text")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-text token, which separates documents"
        )
    found = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # documents may be longer than a model's context: they are cut into windows
    )
    return [[*((id for id in ids if id != end) if end in ids else ids), end] for ids in found["input_ids"]]


def _checked(i: int, count: int) -> int:
    if not 0 <= i < count:
        raise IndexError(f"window {i}: expected 0 to {count - 1}")
    return i
