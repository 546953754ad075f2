"""Reads documents from text, JSONL, Parquet and token files and Hugging Face datasets, always in the same order."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from train.data.files import read_ids, sampled_sha256
from train.data.indexed import read_index

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)
TEXT = (".txt", ".text", ".md", ".rst")
ROWS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst", ".parquet")  # a document each row
SAVED = ("dataset_dict.json", "state.json")  # what a folder has that `datasets` saved
HUB = "hub:"
UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Documents:
    """A source of documents: its files, and a function that reads its documents from a given number on."""

    inputs: list[dict]  # name, bytes and sampled_sha256 of each file, for the manifest
    start: Callable[[int], Iterator[Any]]  # documents from number n on: text, or (tokens,) ids

    holds_ids: bool = False


def find_documents(
    source: str, column: str = "text", split: str = "train", suffixes: tuple[str, ...] | None = None
) -> Documents:
    """Finds the documents of a source.

    Args:
        source: a file, a folder, or `hub:NAME` or `hub:NAME:CONFIGURATION` for a dataset of the Hugging Face hub. A
            text file is one document; a JSONL or Parquet file holds one document in each row. A folder may also be a
            dataset that `datasets` saved.
        column: the column that holds the text, in JSONL, Parquet and hub datasets.
        split: split of a dataset.
        suffixes: endings of the files in a folder that are read. None: those of ROWS if there are any, else those of
            TEXT.

    Raises:
        ValueError: nothing there, nothing that can be read, or a setting that this kind of source has no use for.
    """
    path = Path(source).expanduser()
    is_saved = any((path / name).is_file() for name in SAVED)
    if suffixes is not None and (source.startswith(HUB) or is_saved or not path.is_dir()):
        raise ValueError(f"--suffixes chooses files of a folder, and {source} is none: leave it out")
    if source.startswith(HUB):
        return _hub(source.removeprefix(HUB), column, split)
    if is_saved:
        return _saved(path, column, split)
    if split != "train":
        raise ValueError(f"--split chooses a part of a dataset, and {source} is none: leave it out")
    if not path.is_dir() and (path.suffix in (".bin", ".idx") or path.with_suffix(path.suffix + ".idx").is_file()):
        if column != "text":
            raise ValueError(f"--column names a field of JSONL, Parquet or a dataset, and {source} has token ids")
        return _indexed(path)
    if path.is_file():
        if not _is_rows(path):
            raise ValueError(
                f"{source} is one document, too few for training and validation text: expected a folder of text files, "
                f"or a file that ends in {', '.join(ROWS)} or .bin"
            )
        return _files([path], path.parent, column)
    if not path.is_dir():
        raise ValueError(f"nothing at {source}: expected a folder, a .jsonl, .parquet, text or .bin file, or hub:NAME")
    everything = sorted(file for file in path.rglob("*") if file.is_file())
    if suffixes is not None:
        endings = tuple(f".{each.lstrip('.')}".lower() for each in suffixes)
        chosen = [file for file in everything if file.name.lower().endswith(endings)]
    else:
        endings = (*TEXT, *ROWS)
        texts = [file for file in everything if file.name.lower().endswith(TEXT)]
        chosen = [file for file in everything if _is_rows(file)] or texts
        if texts and chosen is not texts:
            log.warning(
                "%s has files with a document in each row, such as %s: its %d text files are left out "
                "(--suffixes says which files are read)",
                *(source, chosen[0].name, len(texts)),
            )
    if not chosen:
        raise ValueError(
            f"{source} holds no text: expected files that end in {', '.join(endings)} (--suffixes for others)"
        )
    if column != "text" and not any(map(_is_rows, chosen)):
        raise ValueError(f"--column names a field of JSONL, Parquet or a dataset, and {source} has text files only")
    return _files(chosen, path, column)


def _is_rows(path: Path) -> bool:
    return path.name.lower().endswith(ROWS)


def _files(paths: list[Path], root: Path, column: str) -> Documents:
    inputs = [_input(path, str(path.relative_to(root))) for path in paths]

    def start(number: int) -> Iterator[str]:
        position = 0
        for path in paths:
            for text in _texts(path, column):
                if position >= number:
                    yield text
                position += 1

    return Documents(inputs, start)


def _input(path: Path, name: str) -> dict:
    return {"name": name, "bytes": path.stat().st_size, "sample": sampled_sha256(path)}


def _texts(path: Path, column: str) -> Iterator[str]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, column)
    elif _is_rows(path):
        try:
            with _opened(path) as file:
                for row, line in enumerate(file, start=1):
                    if line.strip():
                        yield _field(line, column, path, row)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged, or not in UTF-8: {error}") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    else:
        content = path.read_bytes()
        if b"\0" in content:  # no text in UTF-8 has this byte; files in other formats do
            log.warning("%s is left out: it has a zero byte, so it is not text in UTF-8", path)
            content = b""
        text = content.decode("utf-8-sig", errors="replace")
        if (wrong := text.count(UNREADABLE)) and not content.count(UNREADABLE.encode()):
            log.warning("%s is not all UTF-8: %d characters are replaced by %s", path, wrong, UNREADABLE)
        yield text.replace("\r\n", "\n").replace("\r", "\n")


def _opened(path: Path) -> IO[str]:
    """Opens a JSONL file that may be compressed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig")
        case ".zst":
            import pyarrow

            return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _field(line: str, column: str, path: Path, row: int) -> str:
    try:
        text = json.loads(line)[column]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
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
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, row {row}: {column!r} is not in UTF-8 ({error})") from error
            yield _text(text, column, str(path), row)


def _indexed(path: Path) -> Documents:
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    tokens_path, index = stem.with_name(stem.name + ".bin"), read_index(stem.with_name(stem.name + ".idx"))
    if not tokens_path.is_file():
        raise ValueError(f"no token file at {tokens_path} beside its index")
    if not index.documents:
        raise ValueError(f"{tokens_path} holds no documents")
    expected = int(index.ends[-1]) * index.dtype.itemsize
    size = tokens_path.stat().st_size
    if size != expected:
        raise ValueError(
            f"{tokens_path} has {size} bytes, but its index tells of {expected}: the file is cut or foreign"
        )

    def start(number: int) -> Iterator[np.ndarray]:
        for i in range(number, index.documents):
            yield read_ids(tokens_path, index.dtype, 0 if i == 0 else int(index.ends[i - 1]), int(index.ends[i]))

    return Documents([_input(tokens_path, tokens_path.name)], start, holds_ids=True)


def _hub(name: str, column: str, split: str) -> Documents:
    import datasets

    path, _, configuration = name.partition(":")
    if not path:
        raise ValueError(f"{HUB}{name} names no dataset: expected {HUB}NAME or {HUB}NAME:CONFIGURATION")
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"dataset {path}: {error}") from error
    return _dataset(dataset, path, column, [{"name": f"{HUB}{name}", "split": split}])


def _saved(folder: Path, column: str, split: str) -> Documents:
    """A dataset that `datasets` saved, with or without splits."""
    import datasets
    import pyarrow

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"{folder} cannot be read as a dataset: {str(error).partition(chr(10))[0]}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{folder} has splits {', '.join(found)}: expected one of them for --split, not {split!r}")
        found, folder = found[split], folder / split
    elif split != "train":
        raise ValueError(f"{folder} has no splits: leave out --split")
    inputs = [_input(file, file.name) for file in sorted(folder.glob("*.arrow"))]
    return _dataset(found.to_iterable_dataset(), str(folder), column, inputs)


def _dataset(dataset: IterableDataset, name: str, column: str, inputs: list[dict]) -> Documents:
    def start(number: int) -> Iterator[str]:
        for place, row in enumerate(dataset.skip(number) if number else dataset, number + 1):
            if column not in row:
                raise ValueError(
                    f"dataset {name} has columns {list(row)}; expected {column!r} (--column names another)"
                )
            yield _text(row[column], column, f"dataset {name}", place)

    return Documents(inputs, start)
