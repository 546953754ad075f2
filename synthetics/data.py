"""Set disjointness: two lists of tokens share exactly one; the model must name it after the second list.

One example with a first list of 2 and a second list of 3 (ids 0 to 3 are special):

    input   PREFIX  7  5  SEPARATE_LISTS  9  7  8  SEPARATE_ANSWER
    label     -     -  -        -         -  -  -         7

A recurrent model that reads once must keep the first list until the second comes: cheap if the first is the short one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MASK, PREFIX, SEPARATE_LISTS, SEPARATE_ANSWER = range(4)
SPECIAL_TOKENS = 4
IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """A segment: N examples of one pair of list lengths."""

    inputs: Tensor  # (N, first + second + 3) int64
    labels: Tensor  # the same shape: IGNORED but for the shared token, last
    first: int
    second: int

    def batches(self, size: int) -> Iterator[Examples]:
        """In order; a batch never mixes segments."""
        for start in range(0, len(self.inputs), size):
            part = slice(start, start + size)
            yield Examples(self.inputs[part], self.labels[part], self.first, self.second)


@dataclass(frozen=True)
class Task:
    """Which pairs of list lengths are trained on, and which are asked for."""

    vocab_size: int
    train: tuple[tuple[int, int], ...]
    train_examples: int
    test: tuple[tuple[int, int], ...]
    test_examples: int

    def draw(self, seed: int) -> tuple[list[Examples], list[Examples]]:
        """Training and test segments; their seeds come from two disjoint ranges, as the release drew them."""
        random = np.random.RandomState(seed)

        def segments(pairs: tuple[tuple[int, int], ...], examples: int, low: int, high: int) -> list[Examples]:
            seeds = random.randint(low, high, len(pairs), dtype=np.int64).tolist()
            return [
                disjoint_sets(self.vocab_size, examples, first, second, own)
                for (first, second), own in zip(pairs, seeds, strict=True)
            ]

        train = segments(self.train, self.train_examples, 0, 2**31)
        return train, segments(self.test, self.test_examples, 2**31, 2**32)


def read_twice(inputs: Tensor) -> Tensor:
    """PREFIX A SEPARATE_LISTS B, once more, then SEPARATE_ANSWER: (N, T) to (N, 2 T - 1). JRT-Prompt."""
    return torch.cat([inputs[:, :-1], inputs], dim=1)


def disjoint_sets(vocab_size: int, examples: int, first: int, second: int, seed: int) -> Examples:
    """Draws a segment, in the order of draws that the released generator has (original_spec section 9).

    Args:
        vocab_size: ids, the four special ones included.
        examples: N.
        first, second: lengths of the lists; each list is drawn without repeats from its own part of the vocabulary.
        seed: of NumPy's legacy generator.

    Raises:
        ValueError: a list longer than its part of the vocabulary, or an empty one.
    """
    parts = (vocab_size // 2, vocab_size - SPECIAL_TOKENS - vocab_size // 2)
    if not (0 < first <= parts[0] and 0 < second <= parts[1]):
        raise ValueError(f"lists of {first} and {second} tokens: expected 1 to {parts[0]} and 1 to {parts[1]}")
    random = np.random.RandomState(seed)
    rows, answers = [], []
    for _ in range(examples):
        tokens = random.permutation(np.arange(SPECIAL_TOKENS, vocab_size))
        own = random.choice(tokens[: parts[0]], first, replace=False)
        other = random.choice(tokens[parts[0] :], second, replace=False)
        shared = own[random.randint(first)]
        other[random.randint(second)] = shared
        rows.append([PREFIX, *own, SEPARATE_LISTS, *other, SEPARATE_ANSWER])
        answers.append(int(shared))
    inputs = torch.tensor(np.array(rows), dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1] = torch.tensor(answers)
    return Examples(inputs, labels, first, second)
