"""Reads documents from text, JSONL, Parquet and token files and Hugging Face datasets, always in the same order."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.indexed import read_index

log = logging.getLogger(__name__)
TEXT = (".txt", ".text", ".md", ".rst")
HUB = "hub:"


@dataclass(frozen=True)
class Documents:
    """A source of documents: its files, and a function that reads its documents from a given number on."""

    inputs: list[dict]  # name and bytes of each file, for the manifest
    start: Callable[[int], Iterator[Any]]  # documents from number n on: text, or (tokens,) ids

    holds_ids: bool = False


def find_documents(
    source: str, column: str = "text", split: str = "train", suffixes: tuple[str, ...] = TEXT
) -> Documents:
    """Finds the documents of a source.

    Args:
        source: a file, a folder, or `hub:NAME` or `hub:NAME:CONFIGURATION` for a dataset of the Hugging Face hub. A
            text file is one document; a JSONL or Parquet file holds one document in each row. If a folder has JSONL or
            Parquet files, its text files are not read.
        column: the column that holds the text, in JSONL, Parquet and hub datasets.
        split: split of a hub dataset.
        suffixes: endings of the files in a folder that are text.

    Raises:
        ValueError: nothing there, or nothing that can be read.
    """
    if source.startswith(HUB):
        return _hub(source.removeprefix(HUB), column, split)
    path = Path(source).expanduser()
    if path.suffix in (".bin", ".idx") or path.with_suffix(path.suffix + ".idx").is_file():
        return _indexed(path)
    if path.is_file():
        return _files([path], path.parent, column)
    if not path.is_dir():
        raise ValueError(f"nothing at {source}: expected a folder, a .jsonl, .parquet, text or .bin file, or hub:NAME")
    everything = sorted(file for file in path.rglob("*") if file.is_file())
    rows = [file for file in everything if _is_rows(file)]
    chosen = rows or [file for file in everything if file.suffix in suffixes]
    if not chosen:
        expected = ", ".join((*suffixes, ".jsonl", ".jsonl.gz", ".parquet"))
        raise ValueError(f"{source} holds no text: expected files that end in {expected} (--suffixes for others)")
    return _files(chosen, path, column)


def _is_rows(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _files(paths: list[Path], root: Path, column: str) -> Documents:
    inputs = [{"name": str(path.relative_to(root)), "bytes": path.stat().st_size} for path in paths]

    def start(number: int) -> Iterator[str]:
        position = 0
        for path in paths:
            for text in _texts(path, column):
                if position >= number:
                    yield text
                position += 1

    return Documents(inputs, start)


def _texts(path: Path, column: str) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from _parquet(path, column)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig") as file:
                for row, line in enumerate(file, start=1):
                    if line.strip():
                        yield _field(line, column, path, row)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged, or not in UTF-8: {error}") from error
    else:
        content = path.read_bytes()
        if b"\0" in content:  # no text in UTF-8 has this byte; files in other formats do
            log.warning("%s is left out: it has a zero byte, so it is not text in UTF-8", path)
            content = b""
        yield content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _field(line: str, column: str, path: Path, row: int) -> str:
    try:
        text = json.loads(line)[column]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}, row {row}: expected a JSON object with the field {column!r} (--column names another)"
        ) from error
    return _text(text, column, str(path), row)


def _text(value: object, column: str, source: str, row: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{source}, row {row}: {column!r} is a {type(value).__name__}; expected text")
    return value


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file, or is cut short: {str(error).splitlines()[0]}") from error
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path} has columns {file.schema_arrow.names}; expected {column!r} (--column names another)")
    batches = file.iter_batches(batch_size=1000, columns=[column])
    row = 0
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged after row {row}: {str(error).splitlines()[0]}") from error
        if batch is None:
            return
        for value in batch.column(0):
            row += 1
            yield _text(value.as_py(), column, str(path), row)


def _indexed(path: Path) -> Documents:
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    tokens_path, index = stem.with_name(stem.name + ".bin"), read_index(stem.with_name(stem.name + ".idx"))
    if not tokens_path.is_file():
        raise ValueError(f"no token file at {tokens_path} beside its index")
    expected = int(index.ends[-1]) * index.dtype.itemsize if index.documents else 0
    size = tokens_path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{tokens_path} has {size} bytes, but its index tells of {expected}: the file is cut or foreign"
        )

    def start(number: int) -> Iterator[np.ndarray]:
        tokens = np.memmap(tokens_path, index.dtype, mode="r")
        for i in range(number, index.documents):
            yield np.asarray(tokens[0 if i == 0 else index.ends[i - 1] : index.ends[i]])

    return Documents([{"name": tokens_path.name, "bytes": size}], start, holds_ids=True)


def _hub(name: str, column: str, split: str) -> Documents:
    import datasets

    path, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"dataset {path}: {error}") from error

    def start(number: int) -> Iterator[str]:
        for place, row in enumerate(dataset.skip(number) if number else dataset, number + 1):
            if column not in row:
                raise ValueError(
                    f"dataset {path} has columns {list(row)}; expected {column!r} (--column names another)"
                )
            yield _text(row[column], column, f"dataset {path}", place)

    return Documents([{"name": f"{HUB}{name}", "split": split}], start)
