"""Multi-query associative recall (MQAR): the model reads pairs of key and value, then gives the value of each key.

One example with two pairs and four columns of questions (arXiv 2312.04927, section 3):

    read      PREFIX  k1 v1 k2 v2  k2  x  x k1
    answer       -     -  -  -  -  v2  -  - v1

Keys come from the lower half of the vocabulary and values from the upper half. The x are random values: the model knows
a question because it is a key. Here questions stand at uniformly random columns; in the paper's code most stand soon
after the pairs (a power law).

Shapes: N examples, K pairs, Q columns of questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from jrt.training.settings import check_whole
from synthetics.data import PREFIX, SPECIAL_TOKENS, Examples, Split, check_examples, check_task, draw_split
from synthetics.permutations import draw_distinct


@dataclass(frozen=True)
class MQAR:
    """An MQAR task. `train` and `test` are numbers of pairs; the numbers of examples are for each of these sizes."""

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
        """Raises ValueError for more pairs than there are keys or values, too few columns for the questions, and too
        few different examples."""
        check_task(self, self.train, self.test)
        check_whole("columns for each pair", self.columns, 1)
        for pairs in (*self.train, *self.test):
            check_pairs(self.vocab_size, pairs)
        keys, values = self.vocab_size // 2 - SPECIAL_TOKENS, self.vocab_size - self.vocab_size // 2
        for pairs in set(self.train) & set(self.test):
            columns = pairs * self.columns
            different = math.perm(keys, pairs) * math.perm(values, pairs) * math.perm(columns, pairs)
            check_examples(str(pairs), different * values ** (columns - pairs), self.train_examples)

    def draw(self, seed: int, device: torch.device | str = "cpu") -> Split:
        """Draws training and test examples. No test example is a training example. Raises ValueError as `check`."""
        self.check()

        def draw(pairs: int, count: int, random: torch.Generator) -> Examples:
            return draw_pairs(self.vocab_size, count, pairs, pairs * self.columns, random, device)

        return draw_split(draw, self.train, self.train_examples, self.test, self.test_examples, seed)


def check_pairs(vocab_size: int, pairs: int) -> None:
    """Raises ValueError if the vocabulary has too few keys or values for so many pairs."""
    check_whole("number of pairs", pairs, 0)
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
    """Draws examples with K pairs. Each key is asked for once, at a random column of the question.

    Examples are the same on every device.

    Args:
        vocab_size: number of ids, including the special ones.
        examples: N.
        pairs: K.
        columns: Q, at least K.
        random: CPU generator.
        device: of the result.

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
