"""Batches for Lightning: each is a pure function of (seed, step), so a resumed run reads exactly what it would have
read.

Every source gives the same four tensors (shapes: R rows, T tokens), so that one loss serves all models:
input_ids (R, T), targets (R, T), weights (R, T) fp32 that scale each target's cross-entropy, prefix_length (R,).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from jrt_recall.tokenizers import shipped_tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from train.pages import Pages
from train.sequences import Batch, Recipe, Sequences


class Source(Protocol):
    """What a data module reads from."""

    def batch(self, step: int) -> Batch: ...


class Steps(IterableDataset):
    """Batches `start`, `start` + `stride`, ... without end, dealt out over the workers in order."""

    def __init__(self, source: Source, start: int, stride: int = 1) -> None:
        self.source, self.start, self.stride = source, start, stride

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            yield self.source.batch(self.start + turn * self.stride)
            turn += workers


class StepData(pl.LightningDataModule):
    """Endless training batches and a fixed list of validation batches; its state is the next batch of each device.

    Devices take turns: device r of w reads the batches r, r + w, ... Subclasses make the sources in ``setup``.
    """

    training: Source
    validation: list[Batch]

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers, self.start = workers, 0

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return _loader(Steps(self.training, self.start * world + rank, world), self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=None)

    def state_dict(self) -> dict:
        return {"next_batch": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict) -> None:
        self.start = state_dict["next_batch"]


def _loader(steps: Steps, workers: int) -> DataLoader:
    pinned = torch.cuda.is_available()
    return DataLoader(
        steps, batch_size=None, num_workers=workers, pin_memory=pinned, prefetch_factor=8 if workers else None
    )


class ApiTextData(StepData):
    """The mini models' text (``corpus.py``) as recall sequences (``sequences.py``)."""

    def __init__(
        self, folder: str, recipe: Recipe, seed: int, masks_prefix: bool, validation_batches: int, workers: int
    ) -> None:
        super().__init__(workers)
        self.folder, self.recipe, self.seed = Path(folder), recipe, seed
        self.masks_prefix, self.validation_batches = masks_prefix, validation_batches

    def setup(self, stage: str | None = None) -> None:
        tokenizer = shipped_tokenizer()
        train, held_out = (Pages.load(self.folder / f"{name}.bin", tokenizer) for name in ("train", "validation"))
        self.training = Sequences(train, self.recipe, self.seed, self.masks_prefix)
        questions = Sequences(held_out, self.recipe, self.seed, self.masks_prefix)
        self.validation = [questions.questions(step) for step in range(self.validation_batches)]


class FlatText:
    """Sequences of a token file cut at multiples of their length, in an order drawn anew for every epoch.

    ``prefix`` 0: the next token everywhere. Otherwise the released objective: the first `prefix` tokens are encoded,
    a share of them is hidden (always by the mask token) and recovered, and the tokens after the prefix are predicted,
    its own first one excepted (original_spec section 6; ``jrt.objective.prefix_loss`` is the same sum)."""

    def __init__(
        self, path: Path, length: int, rows: int, seed: int, prefix: int, mask_token: int, share: float = 0.15
    ) -> None:
        if not path.is_file():
            raise ValueError(f"no token file at {path}: expected uint16 ids, documents one after the other")
        self.tokens = np.memmap(path, np.uint16, mode="r")
        self.length, self.rows, self.seed, self.prefix = length, rows, seed, prefix
        self.mask_token, self.share, self.masked_weight = mask_token, share, 0.25
        self.count = (len(self.tokens) - 1) // length
        if self.count < rows:
            raise ValueError(f"{path} holds {self.count} sequences of {length} tokens; a batch needs {rows}")

    def batch(self, step: int) -> Batch:
        epoch, place = divmod(step * self.rows, self.count // self.rows * self.rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)[place : place + self.rows]
        ids = np.stack([self.tokens[i * self.length : (i + 1) * self.length + 1] for i in order]).astype(np.int64)
        inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
        weights = np.ones(inputs.shape, np.float32)
        weights[:, : self.prefix] = 0
        weights /= weights.sum()
        if self.prefix:
            hidden = np.random.default_rng([self.seed, step, 1]).random(inputs.shape) < self.share
            hidden[:, self.prefix :] = False
            targets[hidden] = inputs[hidden]
            inputs[hidden] = self.mask_token
            weights[hidden] = self.masked_weight / max(hidden.sum(), 1)
        prefixes = np.full(self.rows, self.prefix)
        arrays = {"input_ids": inputs, "targets": targets, "weights": weights, "prefix_length": prefixes}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class FlatTextData(StepData):
    """Token files train.bin and validation.bin of a folder, as the published models were trained."""

    def __init__(
        self,
        folder: str,
        length: int,
        rows: int,
        seed: int,
        prefix: int,
        mask_token: int,
        validation_batches: int,
        workers: int,
    ) -> None:
        super().__init__(workers)
        self.folder, self.validation_batches = Path(folder), validation_batches
        self.settings = dict(length=length, rows=rows, seed=seed, prefix=prefix, mask_token=mask_token)

    def setup(self, stage: str | None = None) -> None:
        self.training = FlatText(self.folder / "train.bin", **self.settings)
        validation = FlatText(self.folder / "validation.bin", **self.settings)
        self.validation = [validation.batch(step) for step in range(self.validation_batches)]
