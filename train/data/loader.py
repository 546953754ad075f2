"""Reads the batches of one device ahead, in other processes if the data asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from train.data.batches import Batch, Data


@dataclass(frozen=True)
class Problem:
    """Takes the place of a batch that could not be read.

    An error raised in a reader's process would reach the user with the traces of two processes."""

    message: str


class _Steps(IterableDataset):
    """One device's rows of the steps from `start` to before `stop`. The workers take turns, one step each."""

    def __init__(self, data: Data, start: int, stop: int, rank: int, world: int, global_batch: int | None) -> None:
        self.data, self.start, self.stop = data, start, stop
        self.rank, self.world, self.global_batch = rank, world, global_batch

    def __iter__(self) -> Iterator[Batch | Problem]:
        worker = get_worker_info()
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            torch.set_num_threads(1)
        for step in range(self.start + turn, self.stop, workers):
            try:
                yield local_part(self.data, step, self.rank, self.world, self.global_batch)
            except (ValueError, OSError) as error:
                yield Problem(f"step {step}: {error}")
                return


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


def loader(data: Data, start: int, stop: int, rank: int, world: int, global_batch: int | None) -> Iterator[Batch]:
    """Yields this device's rows, one batch for each step from `start` to before `stop`.

    Raises:
        ValueError: a batch could not be read.
    """
    steps = _Steps(data, start, stop, rank, world, global_batch)
    batches = DataLoader(
        steps,
        batch_size=None,
        num_workers=data.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if data.workers else None,
    )
    for batch in batches:
        if isinstance(batch, Problem):
            raise ValueError(batch.message)
        yield batch
