"""Examples of recall tasks. All examples of one size are drawn at once, as tensors on the device.

An example is a context, then a question. Some columns of the question have an answer that the context holds:

    context   PREFIX  7  5  SEPARATE_LISTS  9  7  8
    question  SEPARATE_ANSWER
    answer    7

`synthetics.readings` says in which order the model reads context and question. Ids 0 to 3 are special in every task.

Shapes: N examples, C context tokens, Q question tokens, K answers of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from jrt.training.settings import check_whole
from synthetics.permutations import LARGEST

MASK, PREFIX, SEPARATE_LISTS, SEPARATE_ANSWER = range(4)
SPECIAL_TOKENS = 4
IGNORED = -100
TRAIN, TEST = 0, 1
ATTEMPTS = 100  # how often test examples that are also training examples are drawn again

Size = TypeVar("Size")  # what a task sets the size of its examples by, such as a pair of list lengths


@dataclass(frozen=True)
class Examples:
    """N examples of one size, all of one length."""

    name: str  # of the size: "4_16" for lists of 4 and 16 tokens
    context: Tensor  # (N, C) int64
    question: Tensor  # (N, Q) int64
    asked: Tensor  # (N, K) int64, columns of the question after which an answer is due
    answers: Tensor  # (N, K) int64
    other_order: Tensor  # (C,) int64, a permutation of the columns that puts the context's parts in reverse order

    def __len__(self) -> int:
        return len(self.context)

    def rows(self, index: Tensor | slice) -> Examples:
        """The examples with these numbers."""
        parts = (each[index] for each in (self.context, self.question, self.asked, self.answers))
        return Examples(self.name, *parts, self.other_order)


@dataclass(frozen=True)
class Split:
    """What one seed draws of a task."""

    train: list[Examples]
    test: list[Examples]


class Task(Protocol):
    """A recall task: sizes to train on and sizes to test on."""

    @property
    def name(self) -> str:
        """The task's name in results."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the special ones."""

    @property
    def train_examples(self) -> int:
        """Number of training examples of each size."""

    @property
    def test_examples(self) -> int:
        """Number of test examples of each size."""

    @property
    def longest(self) -> int:
        """C + Q of the longest example."""

    def check(self) -> None:
        """Raises ValueError, before anything is drawn, for sizes that cannot be drawn."""

    def draw(self, seed: int, device: torch.device | str = "cpu") -> Split:
        """Draws training and test examples. They depend on the seed alone."""


def check_task(task: Task, train: Sequence[object], test: Sequence[object]) -> None:
    """Raises ValueError for a task without sizes, with one size twice, without examples, or with ids that cannot be
    drawn."""
    check_whole(f"vocab_size of {task.name}", task.vocab_size, SPECIAL_TOKENS + 1, LARGEST)
    check_whole(f"train_examples of {task.name}", task.train_examples, 1)
    check_whole(f"test_examples of {task.name}", task.test_examples, 1)
    for split, sizes in (("train", train), ("test", test)):
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError(f"{task.name}, {split}: expected at least one size, and each size once, not {sizes}")


def check_examples(size: str, different: int, train_examples: int) -> None:
    """Raises ValueError if there are fewer different examples than training examples of a size that is tested, too.

    Training would hold nearly all of them, and none would be left to test on."""
    if different < train_examples:
        raise ValueError(
            f"{size}: there are {different} different examples, and {train_examples} are for training: expected fewer "
            "training examples or a larger vocabulary, so that some are left to test on"
        )


def generator(*key: int) -> torch.Generator:
    """Returns a CPU generator that is seeded with the whole key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def fingerprints(examples: Examples) -> Tensor:
    """Returns a hash of each example, (N,) int64. Two different examples collide with a probability of about 2^-63."""
    text = torch.cat([examples.context, examples.question], dim=1)  # (N, C + Q)
    weights = torch.randint(-(2**62), 2**62, (text.shape[1],), generator=torch.Generator().manual_seed(1)) | 1
    return (text * weights.to(text.device)).sum(1)  # wraps around


def draw_split(
    draw: Callable[[Size, int, torch.Generator], Examples],
    train: Sequence[Size],
    train_examples: int,
    test: Sequence[Size],
    test_examples: int,
    seed: int,
) -> Split:
    """Draws the training and test examples of a task.

    Args:
        draw: called with a size, a number of examples and a generator; returns the examples.
        train, test: sizes.
        train_examples, test_examples: number of examples of each size.
        seed: of all draws.

    Raises:
        ValueError: so few different examples of a size exist that the training data has nearly all of them.
    """
    drawn = [draw(size, train_examples, generator(seed, TRAIN, index)) for index, size in enumerate(train)]
    seen: dict[int, list[Tensor]] = {}  # by length: texts of two sizes can be equal
    for examples in drawn:
        seen.setdefault(examples.context.shape[1], []).append(fingerprints(examples))
    tests = []
    for index, size in enumerate(test):
        length = draw(size, 1, generator(seed, TEST, index)).context.shape[1]
        same_length = torch.cat(seen[length]) if length in seen else None
        random, same_size = generator(seed, TEST, index), partial(draw, size)
        if same_length is None:
            tests.append(same_size(test_examples, random))
        else:
            tests.append(draw_unseen(same_size, test_examples, random, same_length))
    return Split(drawn, tests)


def draw_unseen(
    draw: Callable[[int, torch.Generator], Examples], count: int, random: torch.Generator, seen: Tensor
) -> Examples:
    """Draws examples that are not among those already seen.

    Args:
        draw: called with a number of examples and a generator; returns the examples.
        count: N.
        random: generator for `draw`.
        seen: (S,) fingerprints of the examples already seen.

    Raises:
        ValueError: nearly all possible examples were seen.
    """
    examples = draw(count, random)
    for _ in range(ATTEMPTS):
        known = torch.isin(fingerprints(examples), seen)
        if not known.any():
            return examples
        fresh = draw(int(known.sum()), random)
        for old, new in zip(_tensors(examples), _tensors(fresh), strict=True):
            old[known] = new
    raise ValueError(
        f"{examples.name}: training holds nearly all examples there are, so none is left to test on; "
        "expected fewer training examples or a larger vocabulary"
    )


def _tensors(examples: Examples) -> tuple[Tensor, ...]:
    return examples.context, examples.question, examples.asked, examples.answers
