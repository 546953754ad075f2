"""Turns text into token files: ``python train/prepare.py SOURCE OUT [--tokenizer NAME]``.

SOURCE is a folder of text, JSONL or Parquet files, one JSONL or Parquet file, NAME.bin with NAME.idx, ``hub:NAME`` for
a dataset of the Hugging Face hub, or a folder that the package datasets saved. OUT gets train.bin and validation.bin
(token ids; each text ends with the tokenizer's end-of-text id, and token files are copied as they are), their .idx
files in the format of GPT-NeoX and Megatron, the tokenizer, and manifest.json. If the command is stopped, the same
command continues the work. The tokens do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

# The package is found wherever this file is started from.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from jrt.system.files import write_json  # noqa: E402
from jrt.system.locks import only_writer  # noqa: E402
from jrt.system.processes import end_with  # noqa: E402
from jrt.system.provenance import versions  # noqa: E402
from train.data.documents import Documents, find_documents  # noqa: E402
from train.data.indexed import write_index  # noqa: E402
from train.data.sources import encode_documents  # noqa: E402
from train.data.vocabulary import load_tokenizer, tokenizer_sha256, vocabulary_size  # noqa: E402

log = logging.getLogger(__name__)
SPLITS = ("train", "validation")
BLOCK = 256  # documents that a worker encodes at a time
SAVED_EVERY = 64  # blocks between two writes of NOTE
PATIENCE = 10.0  # seconds to wait for the processes of a command that was killed
NOTE = "progress.json"  # how much is done, for a command that continues the work


def prepare(
    source: str,
    out: Path,
    tokenizer: str = "mini",
    validation: float = 0.005,
    workers: int = 1,
    column: str = "text",
    split: str = "train",
    suffixes: tuple[str, ...] | None = None,
    max_documents: int | None = None,
) -> dict:
    """Writes token files and returns their manifest. Continues work that was stopped.

    Args:
        source: as `train.data.documents.find_documents` takes it.
        out: folder for the files.
        tokenizer: as `train.data.vocabulary.load_tokenizer` takes it.
        validation: share of the documents that become validation text: the first one, and then one in every 1 / share.
            Empty documents do not count.
        workers: number of processes that encode.
        column, split, suffixes: as `find_documents` takes them.
        max_documents: most documents that are read; None: all.

    Raises:
        ValueError: nothing to read, no such tokenizer, `out` holds the work of other settings, or another process
            writes to it.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}: expected a share of the documents between 0 and 1")
    for name, value in (("workers", workers), ("max_documents", max_documents)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: expected a folder for the token files")
    documents = find_documents(source, column, split, suffixes)
    vocabulary = load_tokenizer(tokenizer)
    if vocabulary.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer} has no end-of-text token, which separates documents")
    fingerprint = tokenizer_sha256(vocabulary)
    settings = {
        "inputs": documents.inputs,
        "tokenizer": fingerprint,
        "validation": validation,
        "column": column,
        "max_documents": max_documents,
    }
    dtype = np.dtype(np.uint16 if vocabulary_size(vocabulary) <= 1 << 16 else np.int32)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out, PATIENCE):
        manifest = _finished(out, settings)
        if manifest is not None:
            return manifest
        writer = _Writer(out, settings, dtype)
        _write_all(writer, documents, tokenizer, validation, workers, max_documents)
        return writer.finish(source, tokenizer, vocabulary, fingerprint)


def _write_all(
    writer: _Writer, documents: Documents, tokenizer: str, validation: float, workers: int, limit: int | None
) -> None:
    first = writer.documents
    texts = documents.start(first) if limit is None else islice(documents.start(first), max(0, limit - first))
    with (
        tqdm(total=limit, initial=first, unit="document", desc="encoding", disable=None) as bar,
        _pool(tokenizer, workers) as pool,
    ):
        waiting: deque[tuple[int, Future]] = deque()
        blocks = _blocks(texts)
        while True:
            while len(waiting) < 4 * max(1, workers) and (block := next(blocks, None)) is not None:
                job = pool.submit(_as_ids, block) if documents.holds_ids else pool.submit(_encode, block)
                waiting.append((len(block), job))
            if not waiting:
                break
            count, job = waiting.popleft()
            writer.add(job.result(), validation)
            bar.update(count)
    writer.note()


def _pool(tokenizer: str, workers: int) -> Executor:
    if workers == 1:
        return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(tokenizer,))
    return ProcessPoolExecutor(workers, initializer=_start_process, initargs=(tokenizer, os.getpid()))


def _blocks(texts: Iterator[Any]) -> Iterator[list]:
    while block := list(islice(texts, BLOCK)):
        yield block


_tokenizer: PreTrainedTokenizerBase | None = None  # of a worker process
_vocabulary = 0  # its size


def _start_process(tokenizer: str, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    end_with(parent)
    _start_worker(tokenizer)


def _start_worker(tokenizer: str) -> None:
    global _tokenizer, _vocabulary  # noqa: PLW0603
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = load_tokenizer(tokenizer)
    _vocabulary = vocabulary_size(_tokenizer)


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    sound = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]  # halves of surrogate pairs become "?"
    filled = [(i, text) for i, text in enumerate(sound) if text]
    encoded = encode_documents([text for _, text in filled], _tokenizer) if filled else []
    found = [np.zeros(0, np.int64)] * len(texts)
    for (i, _), ids in zip(filled, encoded, strict=True):
        found[i] = np.asarray(ids, np.int64)
    return found


def _as_ids(documents: list[np.ndarray]) -> list[np.ndarray]:
    for ids in documents:
        for id in (ids.min(), ids.max()) if len(ids) else ():
            if not 0 <= id < _vocabulary:
                raise ValueError(
                    f"the token file has id {id}, outside the {_vocabulary} entries of the tokenizer: "
                    "name the one that made it (--tokenizer)"
                )
    return documents


class _Writer:
    """Writes the token files under temporary names, and NOTE, which says how much of them is complete."""

    def __init__(self, out: Path, settings: dict, dtype: np.dtype) -> None:
        self.out, self.settings, self.dtype = out, settings, dtype
        self.documents, self.blocks = 0, 0
        path = out / NOTE
        done = {split: [0, 0] for split in SPLITS}  # bytes, documents
        if path.is_file():
            note = _object_in(path)
            _compare(out, note.get("settings"), settings)
            self.documents, done = note["documents"], note["splits"]
        self.filled = sum(documents for _, documents in done.values())  # documents that are not empty
        if self.documents:
            log.info("going on after %d documents", self.documents)
        self.files, self.sizes = {}, {}
        for split in SPLITS:
            self.files[split] = _opened(out / f"{split}.bin.partial", done[split][0])
            self.sizes[split] = _opened(out / f"{split}.sizes.partial", 4 * done[split][1])

    def add(self, block: list[np.ndarray], validation: float) -> None:
        chosen: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for ids in block:
            self.documents += 1
            if len(ids):
                held_out = not self.filled or int(self.filled * validation) != int((self.filled - 1) * validation)
                chosen["validation" if held_out else "train"].append(ids)
                self.filled += 1
        for split, arrays in chosen.items():
            if arrays:
                self.files[split].write(np.concatenate(arrays).astype(self.dtype).tobytes())
                self.sizes[split].write(np.array([len(a) for a in arrays], np.int32).tobytes())
        self.blocks += 1
        if self.blocks % SAVED_EVERY == 0:
            self.note()

    def note(self) -> None:
        for file in (*self.files.values(), *self.sizes.values()):
            file.flush()
            os.fsync(file.fileno())
        splits = {split: [self.files[split].tell(), self.sizes[split].tell() // 4] for split in SPLITS}
        write_json(self.out / NOTE, {"settings": self.settings, "documents": self.documents, "splits": splits})

    def finish(self, source: str, name: str, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> dict:
        for file in (*self.files.values(), *self.sizes.values()):
            file.close()
        splits = {}
        for split in SPLITS:
            sizes = np.fromfile(self.out / f"{split}.sizes.partial", np.int32)
            if not len(sizes):
                raise ValueError(f"{source} has {self.documents} documents: too few for training and validation text")
            write_index(self.out / f"{split}.idx", sizes, self.dtype)
            partial = self.out / f"{split}.bin.partial"
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            splits[split] = {"tokens": int(sizes.sum()), "documents": len(sizes), "sha256": digest}
        tokenizer.save_pretrained(self.out / "tokenizer")
        for split in SPLITS:
            (self.out / f"{split}.bin.partial").replace(self.out / f"{split}.bin")
        manifest = {
            "source": source,
            "splits": splits,
            "dtype": str(self.dtype),
            "tokenizer": {
                "name": name,
                "sha256": fingerprint,
                "vocabulary": vocabulary_size(tokenizer),
                "end_token": tokenizer.eos_token_id,
            },
            "settings": self.settings,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }
        write_json(self.out / "manifest.json", manifest)
        for leftover in (NOTE, *(f"{split}.sizes.partial" for split in SPLITS)):
            (self.out / leftover).unlink()
        return manifest


def _opened(path: Path, size: int) -> Any:
    """Opens a file for appending, after cutting it to the size that is known to be complete."""
    named = path.with_suffix("")
    if size and not path.is_file() and named.is_file():  # stopped while the finished files were renamed
        named.replace(path)
    if size and (not path.is_file() or path.stat().st_size < size):
        raise ValueError(f"{path} is shorter than {path.parent / NOTE} says: remove the folder and start again")
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


def _finished(out: Path, settings: dict) -> dict | None:
    path = out / "manifest.json"
    if not path.is_file():
        for name in (f"{split}.bin" for split in SPLITS):
            if (out / name).is_file() and not (out / NOTE).is_file():
                raise ValueError(f"{out} holds a {name} that this command did not make: choose another folder")
        return None
    manifest = _object_in(path)
    _compare(out, manifest.get("settings"), settings)
    for split, facts in manifest["splits"].items():
        file, size = out / f"{split}.bin", facts["tokens"] * np.dtype(manifest["dtype"]).itemsize
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} is missing, or no longer has {size} bytes: remove {out} and start again")
    log.info("%s is finished already", out)
    return manifest


def _object_in(path: Path) -> dict:
    """The object in a JSON file; {} if it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _compare(out: Path, before: Any, now: dict) -> None:
    known = before if isinstance(before, dict) else {}
    changed = [name for name in now if known.get(name) != now[name]]
    if changed:
        raise ValueError(f"{out} was begun with other {', '.join(changed)}: choose another folder, or remove it")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, file, or hub:NAME[:CONFIGURATION]")
    parser.add_argument("out", type=Path, help="folder for the token files")
    parser.add_argument(
        "--tokenizer", default="mini", help="mini (4,096 entries, default), gpt2, or any name or folder"
    )
    parser.add_argument("--validation", type=float, default=0.005, help="share of the documents that is held out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--column", default="text", help="of JSONL, Parquet and datasets")
    parser.add_argument("--split", default="train", help="of datasets")
    parser.add_argument(
        "--suffixes", nargs="+", help="which files of a folder are read; default: JSONL and Parquet, else text"
    )
    parser.add_argument("--max-documents", type=int, help="read no more than so many")
    options = parser.parse_args()
    try:
        manifest = prepare(
            options.source,
            options.out,
            options.tokenizer,
            options.validation,
            options.workers,
            options.column,
            options.split,
            None if options.suffixes is None else tuple(options.suffixes),
            options.max_documents,
        )
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped; the same command goes on\n")
    except BrokenExecutor:
        parser.exit(2, f"{parser.prog}: a worker was killed, perhaps for want of memory: try fewer --workers\n")
    except (ValueError, OSError) as error:
        place = "" if getattr(error, "filename", options.out) else f"{options.out}: "  # a full disk has no name
        parser.exit(2, f"{parser.prog}: {place}{error}\n")
    for split, facts in manifest["splits"].items():
        log.info("%s: %s tokens in %s documents", split, f"{facts['tokens']:,}", f"{facts['documents']:,}")


if __name__ == "__main__":
    main()
