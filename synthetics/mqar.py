"""Multi-query associative recall (MQAR): pairs of key and value, then some of the keys again, one by one.

One example with two pairs and four columns of questions (arXiv 2312.04927, section 3):

    read      PREFIX  k1 v1 k2 v2  k2  x  x k1
    answer       -     -  -  -  -  v2  -  - v1

Keys come from the lower half of the vocabulary and values from the upper one; x are random values, so that a question
stands out by being a key.

Shapes: N examples, K pairs, Q columns of questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from synthetics.data import PREFIX, SPECIAL_TOKENS, Examples, Split, draw_split
from synthetics.permutations import draw_distinct


@dataclass(frozen=True)
class MQAR:
    """How many pairs an example has, in training and in tests."""

    name: str
    vocab_size: int
    train: tuple[int, ...]
    train_examples: int
    test: tuple[int, ...]
    test_examples: int
    columns: int = 2  # of questions, for each pair

    @property
    def longest(self) -> int:
        return max((*self.train, *self.test)) * (2 + self.columns) + 1

    def check(self) -> None:
        """Raises ValueError for more pairs than there are keys or values, or too few columns for the questions."""
        for pairs in (*self.train, *self.test):
            check_pairs(self.vocab_size, pairs)
        if self.columns < 1:
            raise ValueError(f"{self.columns} columns for each pair: expected at least 1, every key is asked for once")

    def draw(self, seed: int, device: torch.device | str = "cpu") -> Split:
        """No test example is a training example; raises ValueError as `check`."""
        self.check()

        def draw(pairs: int, count: int, random: torch.Generator) -> Examples:
            return draw_pairs(self.vocab_size, count, pairs, pairs * self.columns, random, device)

        return draw_split(draw, self.train, self.train_examples, self.test, self.test_examples, seed)


def check_pairs(vocab_size: int, pairs: int) -> None:
    """Raises ValueError where keys or values run out."""
    most = min(vocab_size // 2 - SPECIAL_TOKENS, vocab_size - vocab_size // 2)
    if not 0 < pairs <= most:
        raise ValueError(f"{pairs} pairs of key and value of {vocab_size} ids: expected 1 to {most}")


def draw_pairs(
    vocab_size: int,
    examples: int,
    pairs: int,
    columns: int,
    random: torch.Generator,
    device: torch.device | str = "cpu",
) -> Examples:
    """Draws N examples with K pairs, each asked for once, at places drawn uniformly out of the columns.

    The same on every device for the same CPU generator.

    Raises:
        ValueError: as `check_pairs`, or fewer columns than pairs.
    """
    check_pairs(vocab_size, pairs)
    if columns < pairs:
        raise ValueError(f"{columns} columns of questions for {pairs} pairs: expected at least {pairs}")
    half = vocab_size // 2
    keys = draw_distinct(examples, pairs, SPECIAL_TOKENS, half, random, device)  # (N, K)
    values = draw_distinct(examples, pairs, half, vocab_size, random, device)
    context = keys.new_full((examples, 1 + 2 * pairs), PREFIX)
    context[:, 1::2], context[:, 2::2] = keys, values
    asked = draw_distinct(examples, pairs, 0, columns, random, device)  # (N, K), a column for each key
    question = torch.randint(half, vocab_size, (examples, columns), generator=random).to(device)
    question.scatter_(1, asked, keys)
    columns_of_pairs = 1 + torch.arange(2 * pairs, device=device).view(pairs, 2)
    other_order = torch.cat([columns_of_pairs.new_zeros(1), columns_of_pairs.flip(0).flatten()])
    return Examples(str(pairs), context, question, asked, values, other_order)
