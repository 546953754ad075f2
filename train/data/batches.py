"""Batches for the training loop. A batch depends on (seed, step) alone, so a resumed run reads the same batches.

Shapes: G rows of a step's whole batch, R rows of a part of it, T tokens of a row.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jrt_recall.tokenizers import shipped_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from train.data.order import Mixture, NeoxOrder, Shuffled, Straight, Stream
from train.data.pages import Pages
from train.data.sequences import Recipe, Sequences
from train.data.sources import DatasetTokens, Joined, StreamedTokens, TokenFile, TokenSource

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
            if set(part) != {"folder", "weight"} or not isinstance(part["weight"], int | float):
                raise ValueError(f"data.mixture has {part}: expected {{folder: A, weight: 0.7}}, the weight a number")
        self.length, self.seed, self.order, self.workers = length, seed, order, workers
        self.folders = [Path(part["folder"]).expanduser() for part in mixture] or [Path(str(folder)).expanduser()]
        self.weights = [float(part["weight"]) for part in mixture] or [1.0]
        self.neox_windows = neox_windows
        self.manifests = [_manifest(path) for path in self.folders]
        if len({str(manifest.get("tokenizer", {}).get("sha256")) for manifest in self.manifests}) > 1:
            raise ValueError("the folders of data.mixture were made with different tokenizers")
        least = {"length": (length, 1), "workers": (workers, 0)}
        least |= {"validation_windows": (validation_windows, 1), "validation_rows": (validation_rows, 1)}
        for name, (value, lowest) in least.items():
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"data.{name} is {value}: expected a whole number of at least {lowest}")
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
        paths = sorted(glob.glob(str(folder / f"{split}*.bin")))
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
        files = sorted(path for folder in self.folders for path in folder.glob("*.bin"))
        hashes = [
            m.get("splits", {}).get(s, {}).get("sha256", "") for m in self.manifests for s in ("train", "validation")
        ]
        sizes = [path.stat().st_size for path in files]
        return {"files": sizes, "sha256": hashes, "order": self.order, "length": self.length, "weights": self.weights}


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

        self.length, self.seed, self.workers = length, seed, 1
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._settings = [path, name, train_split, validation_split, column, streaming]

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
        count = min(validation_windows, len(held_out))
        # A stream can only be read forward, so its few validation windows are kept in memory.
        self._kept = [held_out.read(i) for i in range(count)] if streaming else None
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

        It is the first process's place, which comes before the other processes' next rows."""
        assert isinstance(self._training, StreamedTokens), "only a stream hands out its place"
        self._training.go_on(state)

    def validation(self, number: int) -> Batch:
        windows = range(number * self._rows, min((number + 1) * self._rows, self._count))
        read = self._held_out.read if self._kept is None else self._kept.__getitem__
        return {"ids": torch.from_numpy(np.stack([read(i) for i in windows]))}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def identity(self) -> dict:
        return {"dataset": self._settings, "length": self.length}


class RecallData:
    """The mini models' text (made by ``train/corpus.py``) as recall sequences (see ``sequences.py`` in this folder).

    The recipe says how many rows a step has."""

    tells_prefix = True
    windows = None  # rows are drawn

    def __init__(self, folder: str, recipe: Recipe, seed: int, validation_batches: int, workers: int) -> None:
        self.folder, self.recipe, self.seed, self.workers = Path(folder).expanduser(), recipe, seed, workers
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
        sizes = [(self.folder / f"{name}.bin").stat().st_size for name in ("train", "validation")]
        return {"files": sizes, "recipe": repr(self.recipe)}


class _Steps(IterableDataset):
    """One device's rows of the steps from `start` to before `stop`. The workers take turns, one step each."""

    def __init__(self, data: Data, start: int, stop: int, rank: int, world: int, global_batch: int | None) -> None:
        self.data, self.start, self.stop = data, start, stop
        self.rank, self.world, self.global_batch = rank, world, global_batch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            torch.set_num_threads(1)
        for step in range(self.start + turn, self.stop, workers):
            yield local_part(self.data, step, self.rank, self.world, self.global_batch)


def local_part(data: Data, step: int, rank: int, world: int, global_batch: int | None) -> Batch:
    """Returns the rows of a step that device `rank` of `world` reads: an equal, consecutive share.

    Raises:
        ValueError: the batch cannot be split evenly.
    """
    total = global_batch or data.rows(step)
    if total is None:
        raise ValueError("trainer.global_batch is not set, and this data does not say how many rows a step has")
    if total % world:
        raise ValueError(f"step {step} has {total} rows, which {world} devices cannot share evenly")
    own = total // world
    return data.part(step, total, rank * own, own)


def loader(data: Data, start: int, stop: int, rank: int, world: int, global_batch: int | None) -> DataLoader:
    """Returns a loader of this device's rows, one batch for each step from `start` to before `stop`."""
    steps = _Steps(data, start, stop, rank, world, global_batch)
    return DataLoader(
        steps,
        batch_size=None,
        num_workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if data.workers else None,
    )


def _manifest(folder: Path) -> dict:
    """Returns the content of manifest.json, {} if there is none. Raises ValueError if prepare.py cannot have written it."""
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
