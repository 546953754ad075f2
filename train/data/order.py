"""The order in which windows are read, as functions of a position that counts up for the whole run.

A position is all the state there is: a run that goes on from a checkpoint asks for the next position. No list of a whole
epoch is made, except for the release's own order.

Shapes: R positions; T + 1 tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from train.data.sources import TokenFile, TokenSource

ROUNDS = 6
BLOCK = 1000  # windows in which a mixture keeps its shares


class Stream(Protocol):
    """Windows in the order of training."""

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """(R, T + 1) int64 windows at these (R,) positions; positions have no end."""
        ...


class Shuffle:
    """A permutation of 0 to count - 1 for each epoch, in constant memory and time an item.

    A Feistel network permutes the numbers below the next power of four; what falls beyond `count` is permuted again until it
    does not (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(R,) items at these (R,) positions; position p lies in epoch p // count."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.count)
        found = places.astype(np.uint64)
        key = _mixed(_mixed(np.uint64(self.seed % (1 << 63))) ^ epochs.astype(np.uint64))
        walking = np.arange(len(found))
        while len(walking):
            found[walking] = self._permuted(found[walking], key[walking])
            walking = walking[found[walking] >= self.count]
        return found.astype(np.int64)

    def _permuted(self, values: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_mixed(right ^ key ^ _mixed(np.uint64(number + 1))) & self.mask)
        return (left << self.half) | right


def _mixed(values: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input changes about half of the output."""
    with np.errstate(over="ignore"):
        values = np.asarray(values) + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


class Shuffled:
    """A source in a new random order each epoch."""

    def __init__(self, source: TokenSource, seed: int) -> None:
        self.source, self.shuffle = source, Shuffle(len(source), seed)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return np.stack([self.source.read(int(i)) for i in self.shuffle(positions)])


class Straight:
    """A source from its first window to its last, then from the first again."""

    def __init__(self, source: TokenSource) -> None:
        self.source = source

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return np.stack([self.source.read(int(i) % len(self.source)) for i in positions])


class Mixture:
    """Several streams, each with its share of every `BLOCK` windows.

    Raises:
        ValueError: not one positive weight for each stream, or a share of less than one window in `BLOCK`.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int) -> None:
        if len(streams) != len(weights) or not streams or min(weights) <= 0:
            raise ValueError(f"{len(streams)} sources and weights {list(weights)}: expected a positive weight for each")
        exact = np.asarray(weights, np.float64) / sum(weights) * BLOCK
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
        if counts.min() < 1:
            raise ValueError(f"weights {list(weights)}: the smallest share is below one window in {BLOCK}")
        self.streams, self.counts = list(streams), counts
        self.source_of = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(streams)), counts))  # (BLOCK,)
        self.rank_of = np.zeros(BLOCK, np.int64)  # how many windows of the same stream stand before, in the block
        for number, count in enumerate(counts):
            self.rank_of[self.source_of == number] = np.arange(count)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        blocks, slots = np.divmod(np.asarray(positions, np.int64), BLOCK)
        sources = self.source_of[slots]
        own = blocks * self.counts[sources] + self.rank_of[slots]
        found: list[np.ndarray] = [np.zeros(0)] * len(own)
        for number, stream in enumerate(self.streams):
            mine = np.flatnonzero(sources == number)
            if len(mine):
                for place, row in zip(mine, stream.rows(own[mine]), strict=True):
                    found[place] = row
        return np.stack(found)


class NeoxOrder:
    """The order in which the released models read the Pile: GPT-NeoX's, then a shuffling sampler's.

    Documents of all epochs are shuffled as one list, windows cut across them, and the windows shuffled. The lists are as
    long as the data has documents and the run has windows.

    Args:
        file: tokens with an index.
        windows: how many the run reads: batch size x steps.
        seed: of the two shuffles; the release's is 42.
        sampler_seed: of the sampler on top, which has one epoch; the release's is 1111. None: no sampler.
    """

    def __init__(self, file: TokenFile, windows: int, seed: int = 42, sampler_seed: int | None = 1111) -> None:
        if file.index is None:
            raise ValueError(
                f"the order 'neox' shuffles documents, and {file.path} has no .idx file that tells of them"
            )
        self.file, self.length = file, file.length
        sizes = file.index.sizes()
        tokens = int(sizes.sum())
        epochs = -(-(windows * file.length + 1) // tokens)  # the fewest with enough windows
        generator = np.random.RandomState(seed)
        documents = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
        generator.shuffle(documents)
        self.documents = documents
        ends = np.cumsum(sizes[documents])
        count = (epochs * tokens - 1) // file.length
        starts = np.arange(count + 1, dtype=np.int64) * file.length
        place = np.searchsorted(ends, starts, side="right")
        offsets = starts - (ends[place] - sizes[documents[place]])
        self.samples = np.stack([place, offsets], axis=1).astype(np.int32)  # (windows + 1, 2): document's place, offset
        self.order = np.arange(count, dtype=np.int64)
        generator.shuffle(self.order)
        self.sampled: np.ndarray | None = None
        if sampler_seed is not None:
            drawn = torch.randperm(count, generator=torch.Generator().manual_seed(sampler_seed))
            self.sampled = drawn.numpy()

    def rows(self, positions: np.ndarray) -> np.ndarray:
        items = np.asarray(positions) % len(self.order)
        return np.stack([self.window(int(i)) for i in (items if self.sampled is None else self.sampled[items])])

    def window(self, item: int) -> np.ndarray:
        """(T + 1,) int64: the release's sample of this number, across the borders of documents."""
        number = self.order[item]
        (first, start), (last, stop) = self.samples[number], self.samples[number + 1]
        pieces = [self.file.document(self.documents[place]) for place in range(first, last + 1)]
        pieces[-1] = pieces[-1][: stop + 1]
        pieces[0] = pieces[0][start:]
        return np.concatenate(pieces).astype(np.int64)
