"""What the training loop reads. A batch depends on (seed, step) alone, so a resumed run reads the same batches.

Shapes: G rows of a step's whole batch, R rows of a part of it, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jrt_recall.tokenizers import shipped_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jrt.training.settings import check_kind, check_seed, check_whole
from train.data.files import sampled_sha256
from train.data.order import Mixture, NeoxOrder, Shuffled, Straight, Stream
from train.data.pages import Pages
from train.data.sequences import Recipe, Sequences
from train.data.sources import DatasetTokens, Joined, StreamedTokens, StreamEnd, TokenFile, TokenSource
from train.data.vocabulary import load_tokenizer, tokenizer_sha256

Batch = dict[str, Tensor]
"""Tensors by name. Always: ids (R, T + 1) int64. Some data also has:

prefix_length (R,): tokens of each row that are its prefix. weights (R, T): of the next-token labels. answers (R, T): 1,
2, ... at the tokens of a row's first, second, ... answer, 0 elsewhere. resume: JSON as uint8, the place in a stream
after this batch."""
ORDERS = ("shuffle", "neox", "straight")
ID_TYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64")
"""Types that the ids of a token file without an index can have."""


class Data(Protocol):
    """The data that the loop trains on."""

    length: int  # T of the longest row
    seed: int  # of the order
    workers: int
    windows: int | None  # how many different rows there are; None: no limit
    validation_batches: int
    tells_prefix: bool  # whether batches have `prefix_length`

    def rows(self, step: int) -> int | None:
        """Returns G, or None if the loop decides."""
        ...

    def part(self, step: int, total: int, first: int, count: int) -> Batch:
        """Returns rows [first, first + count) of the step's batch, which has `total` rows."""
        ...

    def validation(self, number: int) -> Batch:
        """Returns validation batch `number`, which is the same during the whole run."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Returns the tokenizer that made the ids, or None if it is not known."""
        ...

    def identity(self) -> dict:
        """Returns what must be unchanged when a run is resumed."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """Data that needs more than the step to resume, such as a stream."""

    def go_on(self, state: dict) -> None:
        """Moves to the place after a batch, given the batch's `resume`."""
        ...


class TextData:
    """Token files of a folder, as train/prepare.py writes them: train*.bin and validation*.bin.

    Args:
        folder: where the files are.
        length: T.
        order: "shuffle", a new random order each epoch; "neox", the released models' order (needs one file with an
            index); "straight", from the first window to the last.
        seed: of the order.
        mixture: several folders instead of one: [{folder: A, weight: 0.7}, {folder: B, weight: 0.3}]. The validation
            text is that of all folders.
        validation_windows: most validation windows that are read, evenly spaced over the validation text.
        validation_rows: rows of a validation batch.
        neox_windows: for the order "neox", how many windows the whole run reads (batch size x steps).
        workers: number of processes that read ahead.

    Raises:
        ValueError: a missing, damaged or empty file.
    """

    tells_prefix = False

    def __init__(
        self,
        length: int,
        seed: int,
        folder: str | None = None,
        order: str = "shuffle",
        mixture: Sequence[dict] = (),
        validation_windows: int = 1000,
        validation_rows: int = 8,
        neox_windows: int | None = None,
        workers: int = 1,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order {order!r}: expected one of {', '.join(ORDERS)}")
        if bool(mixture) == bool(folder):
            raise ValueError("give data.folder or data.mixture, one of the two")
        for part in mixture:
            known = isinstance(part, dict) and set(part) == {"folder", "weight"}
            if not known or type(part["weight"]) not in (int, float) or not 0 < part["weight"] < math.inf:
                raise ValueError(
                    f"data.mixture has {part}: expected {{folder: A, weight: 0.7}}, the weight a positive number"
                )
        _check_sizes(length, validation_windows, validation_rows)
        check_whole("data.workers", workers, 0)
        check_seed("data.seed", seed)
        if neox_windows is not None:
            check_whole("data.neox_windows", neox_windows, 1)
            if order != "neox":
                raise ValueError(
                    f"data.neox_windows is for data.order=neox: leave it out, or change the order {order!r}"
                )
        self.length, self.seed, self.order, self.workers = length, seed, order, workers
        self.folders = [Path(str(part["folder"])).expanduser() for part in mixture] or [Path(str(folder)).expanduser()]
        self.weights = [float(part["weight"]) for part in mixture] or [1.0]
        self.neox_windows = neox_windows
        self.manifests = [_manifest(path) for path in self.folders]
        if len({str(manifest.get("tokenizer", {}).get("sha256")) for manifest in self.manifests}) > 1:
            raise ValueError("the folders of data.mixture were made with different tokenizers")
        self.windows = 0
        streams = [self._stream(path, manifest) for path, manifest in zip(self.folders, self.manifests, strict=True)]
        self.stream = streams[0] if len(streams) == 1 else Mixture(streams, self.weights, seed)
        parts = zip(self.folders, self.manifests, strict=True)
        held_out = Joined([self._files(path, "validation", manifest) for path, manifest in parts])
        self._held_out = held_out
        count = min(validation_windows, len(held_out))
        self._windows = np.arange(count) * len(held_out) // max(count, 1)
        self._validation_rows = validation_rows
        self.validation_batches = -(-count // validation_rows)

    def _files(self, folder: Path, split: str, manifest: dict) -> TokenSource:
        paths = sorted(folder.glob(f"{split}*.bin"))
        if not paths:
            raise ValueError(
                f"no {split}.bin in {folder}: make it with `python train/prepare.py SOURCE {folder}`"
                + (" (--validation says how much text is held out)" if split == "validation" else "")
            )
        end = manifest.get("tokenizer", {}).get("end_token")
        files = [TokenFile(path, self.length, manifest.get("dtype", "uint16"), end) for path in paths]
        return files[0] if len(files) == 1 else Joined(files)

    def _stream(self, folder: Path, manifest: dict) -> Stream:
        source = self._files(folder, "train", manifest)
        self.windows += len(source)
        if self.order == "straight":
            return Straight(source)
        if self.order == "shuffle":
            return Shuffled(source, self.seed)
        if not isinstance(source, TokenFile):
            raise ValueError(f"the order 'neox' reads one file: {folder} has several")
        if self.neox_windows is None:
            raise ValueError(
                "the order 'neox' depends on the run's length: give data.neox_windows (batch size x steps)"
            )
        return NeoxOrder(source, self.neox_windows)

    def rows(self, step: int) -> int | None:
        return None

    def part(self, step: int, total: int, first: int, count: int) -> Batch:
        positions = step * total + first + np.arange(count)
        return {"ids": torch.from_numpy(self.stream.rows(positions))}

    def validation(self, number: int) -> Batch:
        windows = self._windows[number * self._validation_rows : (number + 1) * self._validation_rows]
        return {"ids": torch.from_numpy(np.stack([self._held_out.read(int(i)) for i in windows]))}

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        folder = self.folders[0] / "tokenizer"
        if not folder.is_dir():
            return None
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no tokenizer that can be read ({str(error).splitlines()[0]}): prepare the text again"
            ) from error

    def identity(self) -> dict:
        files = [path for folder in self.folders for path in sorted(folder.glob("*.bin"))]
        found = {
            "files": [sampled_sha256(path) for path in files],
            "order": self.order,
            "length": self.length,
            "weights": self.weights,
        }
        return found if self.order != "neox" else found | {"neox_windows": self.neox_windows}


class HubData:
    """A dataset of the Hugging Face hub, or of a folder that `datasets` can load, tokenised here.

    With `streaming` it is not downloaded first; it is read in its own order, and a checkpoint holds the place in the
    stream.

    Raises:
        ValueError: no such dataset, column or split, or too little text.
    """

    tells_prefix = False

    def __init__(
        self,
        path: str,
        length: int,
        seed: int,
        tokenizer: str,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        column: str = "text",
        streaming: bool = False,
        stream_windows: int = 1 << 40,
        validation_windows: int = 1000,
        validation_rows: int = 8,
    ) -> None:
        import datasets

        _check_sizes(length, validation_windows, validation_rows)
        check_seed("data.seed", seed)
        check_kind("data.streaming", streaming, bool)
        check_whole("data.stream_windows", stream_windows, 1)
        self.length, self.seed, self.workers = length, seed, 1
        self._tokenizer = load_tokenizer(tokenizer)
        self._identity = {
            "dataset": [path, name, train_split, validation_split, column, streaming],
            "tokenizer": tokenizer_sha256(self._tokenizer),
            "length": length,
        }

        def source(split: str, streams: bool, windows: int) -> TokenSource:
            try:
                found = datasets.load_dataset(path, name, split=split, streaming=streams)
            except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
                raise ValueError(f"dataset {path}: {error}") from error
            if streams:
                return StreamedTokens(found, length, windows, self._tokenizer, column)
            return DatasetTokens(found, length, self._tokenizer, column)

        training = source(train_split, streaming, stream_windows)
        self.windows: int | None = None if streaming else len(training)
        self.stream: Stream = Straight(training) if streaming else Shuffled(training, seed)
        self._training = training
        held_out = source(validation_split, streaming, validation_windows)
        # A stream can only be read forward, so its few validation windows are kept in memory.
        self._kept = _first_windows(held_out, validation_windows) if streaming else None
        count = min(validation_windows, len(held_out)) if self._kept is None else len(self._kept)
        if not count:
            raise ValueError(f"the split {validation_split!r} of {path} holds less than one window of {length} tokens")
        self._held_out, self._count, self._rows = held_out, count, validation_rows
        self.validation_batches = -(-count // validation_rows)

    def rows(self, step: int) -> int | None:
        return None

    def part(self, step: int, total: int, first: int, count: int) -> Batch:
        batch = {"ids": torch.from_numpy(self.stream.rows(step * total + first + np.arange(count)))}
        if isinstance(self._training, StreamedTokens):
            state = json.dumps(self._training.state()).encode()
            batch["resume"] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        return batch

    def go_on(self, state: dict) -> None:
        """Moves to a saved place.

        It is the first process's place, which comes before the other processes' next rows.

        Raises ValueError if this dataset is not read as a stream."""
        if not isinstance(self._training, StreamedTokens):
            raise ValueError(
                "the checkpoint holds its place in a stream: leave data.streaming=true, or choose another output"
            )
        self._training.go_on(state)

    def validation(self, number: int) -> Batch:
        windows = range(number * self._rows, min((number + 1) * self._rows, self._count))
        read = self._held_out.read if self._kept is None else self._kept.__getitem__
        return {"ids": torch.from_numpy(np.stack([read(i) for i in windows]))}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def identity(self) -> dict:
        if isinstance(self._training, StreamedTokens):
            return self._identity
        places = sorted({0, len(self._training) // 2, len(self._training) - 1})
        windows = b"".join(self._training.read(i).tobytes() for i in places)
        return self._identity | {"windows": len(self._training), "sample": hashlib.sha256(windows).hexdigest()}


class RecallData:
    """The mini models' text (made by ``train/corpus.py``) as recall sequences (see ``sequences.py`` in this folder).

    The recipe says how many rows a step has."""

    tells_prefix = True
    windows = None  # rows are drawn

    def __init__(self, folder: str, recipe: Recipe, seed: int, validation_batches: int, workers: int) -> None:
        check_seed("data.seed", seed)
        check_whole("data.validation_batches", validation_batches, 1)
        check_whole("data.workers", workers, 0)
        self.folder, self.recipe, self.seed, self.workers = Path(str(folder)).expanduser(), recipe, seed, workers
        self.validation_batches = validation_batches
        self.length = max(length for length, _, _ in recipe.shapes)
        self._tokenizer = shipped_tokenizer()
        train, held_out = (Pages.load(self.folder / f"{name}.bin", self._tokenizer) for name in ("train", "validation"))
        self._training = Sequences(train, recipe, seed)
        self._questions = Sequences(held_out, recipe, seed)

    def rows(self, step: int) -> int:
        return self._training.shape(step)[1]

    def part(self, step: int, total: int, first: int, count: int) -> Batch:
        return {name: tensor[first : first + count] for name, tensor in self._training.batch(step).items()}

    def validation(self, number: int) -> Batch:
        return self._questions.questions(number)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def identity(self) -> dict:
        files = [sampled_sha256(self.folder / f"{name}.bin") for name in ("train", "validation")]
        return {"files": files, "recipe": repr(self.recipe)}


def _check_sizes(length: object, validation_windows: object, validation_rows: object) -> None:
    check_whole("data.length", length, 1)
    check_whole("data.validation_windows", validation_windows, 1)
    check_whole("data.validation_rows", validation_rows, 1)


def _first_windows(stream: TokenSource, most: int) -> list[np.ndarray]:
    """Returns the first windows of a stream, `most` or as many as it has."""
    found: list[np.ndarray] = []
    try:
        while len(found) < most:
            found.append(stream.read(len(found)))
    except StreamEnd:
        pass
    return found


def _manifest(folder: Path) -> dict:
    """Returns the content of manifest.json, {} if there is none.

    Raises ValueError if prepare.py cannot have written it."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): prepare the text again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds no object: prepare the text again")
    splits = manifest.get("splits", {})
    parts = {"tokenizer": manifest.get("tokenizer", {}), "splits": splits}
    if isinstance(splits, dict):
        parts |= {f"splits.{name}": value for name, value in splits.items()}
    for name, value in parts.items():
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected an object at {name!r}: prepare the text again")
    if (dtype := manifest.get("dtype", "uint16")) not in ID_TYPES:
        raise ValueError(f"{path}: dtype is {dtype!r}, expected one of {', '.join(ID_TYPES)}: prepare the text again")
    return manifest
