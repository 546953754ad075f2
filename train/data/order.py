"""The order in which training windows are read.

Each order is a function of a position, which counts the windows of the whole run. The order has no other state, so a
resumed run only has to ask for the next position. No list of a whole epoch is kept in memory, except for the release's
own order (`NeoxOrder`).

Shapes: R positions; T + 1 tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from train.data.sources import TokenFile, TokenSource

ROUNDS = 6
BLOCK = 1000  # windows of a mixture in which each source has its share


class Stream(Protocol):
    """Training windows in some order."""

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Returns the (R, T + 1) int64 windows at these (R,) positions. A position may be any number from 0 on."""
        ...


class Shuffle:
    """A pseudo-random permutation of 0 to count - 1 for each epoch, without a list of it.

    A Feistel network permutes the numbers below the next power of four. A result of `count` or more is permuted again
    until it is below `count` (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the (R,) items at these (R,) positions. Position p belongs to epoch p // count."""
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
    """A hash of 64-bit numbers, the finaliser of splitmix64: each input bit changes about half of the output bits."""
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
    """Mixes several streams by weight.

    In `BLOCK` windows each stream has its share of them, rounded to a window. What rounding leaves over is made up for
    in the blocks that follow, so in a long run the shares are exact.

    Args:
        streams: what is mixed.
        weights: one for each stream; they need not add up to 1.
        seed: of the order of the streams within a block.

    Raises:
        ValueError: the weights are not one positive number for each stream, or a stream's share is below one window.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], seed: int) -> None:
        if len(streams) != len(weights) or not streams or min(weights) <= 0:
            raise ValueError(f"{len(streams)} sources and weights {list(weights)}: expected a positive weight for each")
        shares = np.asarray(weights, np.float64) / sum(weights)
        if shares.min() * BLOCK < 1:
            raise ValueError(f"weights {list(weights)}: the smallest share is below one window in {BLOCK}")
        self.streams, self.shares_before = list(streams), np.append(0, np.cumsum(shares))
        self.shares_before[-1] = 1  # without the rounding of the sum
        self.permutation = np.random.default_rng(seed).permutation(BLOCK)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        sources, own = (np.zeros(len(positions), np.int64) for _ in range(2))
        blocks, slots = np.divmod(np.asarray(positions, np.int64), BLOCK)
        for block in np.unique(blocks):
            mine = blocks == block
            sources[mine], own[mine] = (values[slots[mine]] for values in self._block(int(block)))
        found: list[np.ndarray] = [np.zeros(0)] * len(own)
        for number, stream in enumerate(self.streams):
            mine = np.flatnonzero(sources == number)
            if len(mine):
                for place, row in zip(mine, stream.rows(own[mine]), strict=True):
                    found[place] = row
        return np.stack(found)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each window of a block, and the window's number in that stream: (BLOCK,) each."""
        begun, done = (
            np.diff(np.rint(self.shares_before * BLOCK * end).astype(np.int64)) for end in (block, block + 1)
        )
        sources = np.repeat(np.arange(len(begun)), done - begun)[self.permutation]
        numbers = np.concatenate([np.arange(first, stop) for first, stop in zip(begun, done, strict=True)])
        own = np.empty(BLOCK, np.int64)
        own[np.argsort(sources, kind="stable")] = numbers
        return sources, own


class NeoxOrder:
    """The order in which the released models read the Pile: GPT-NeoX's order, shuffled once more by PyTorch's sampler.

    The documents of all epochs are shuffled as one list. Then windows are cut across document ends, and the windows are
    shuffled. The lists of documents and windows are kept in memory.

    Args:
        file: tokens with an index.
        windows: number of windows that the run reads, batch size x steps.
        seed: of the two shuffles; the release used 42.
        sampler_seed: of the sampler, which shuffles the windows once for the whole run; the release used 1111. None: no
            sampler.
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
        """Returns GPT-NeoX's sample of this number, (T + 1,) int64. It may span several documents."""
        number = self.order[item]
        (first, start), (last, stop) = self.samples[number], self.samples[number + 1]
        pieces = [self.file.document(self.documents[place]) for place in range(first, last + 1)]
        pieces[-1] = pieces[-1][: stop + 1]
        pieces[0] = pieces[0][start:]
        return np.concatenate(pieces).astype(np.int64)
