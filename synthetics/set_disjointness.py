"""Set disjointness: two lists of tokens share exactly one; the model must name it after the second list.

One example with a first list of 2 and a second list of 3 (paper section 3 and appendix B.1):

    read      PREFIX  7  5  SEPARATE_LISTS  9  7  8  SEPARATE_ANSWER
    answer       -    -  -        -         -  -  -         7

A recurrent model that reads once must remember the first list until it reads the second one. That takes less memory if
the first list is the shorter one.

Shapes: N examples, a and b tokens in the first and in the second list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from jrt.training.settings import check_whole
from synthetics.data import (
    PREFIX,
    SEPARATE_ANSWER,
    SEPARATE_LISTS,
    SPECIAL_TOKENS,
    Examples,
    Split,
    check_examples,
    check_task,
    draw_split,
)
from synthetics.permutations import draw_distinct

Pair = tuple[int, int]


@dataclass(frozen=True)
class SetDisjointness:
    """A set disjointness task. `train` and `test` hold pairs (length of the first list, length of the second).

    The numbers of examples are for each pair."""

    name: str
    vocab_size: int
    train: tuple[Pair, ...]
    train_examples: int
    test: tuple[Pair, ...]
    test_examples: int
    separator_last: bool = False  # whether SEPARATE_LISTS follows both lists, so that nothing stands between them

    @property
    def longest(self) -> int:
        return max(first + second for first, second in (*self.train, *self.test)) + 3

    def check(self) -> None:
        """Raises ValueError for lists that the vocabulary cannot fill, and for too few different examples."""
        check_task(self, self.train, self.test)
        for pair in (*self.train, *self.test):
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ValueError(f"{self.name}: {pair} is no pair of lengths")
            check_lengths(self.vocab_size, *pair)
        for first, second in set(self.train) & set(self.test):
            different = math.perm(self.vocab_size - SPECIAL_TOKENS, first + second - 1) * first * second
            check_examples(f"{first}_{second}", different, self.train_examples)

    def draw(self, seed: int, device: torch.device | str = "cpu") -> Split:
        """Draws training and test examples. No test example is a training example.

        Raises:
            ValueError: as `check`, or so few examples exist that training holds nearly all.
        """
        self.check()

        def draw(pair: Pair, count: int, random: torch.Generator) -> Examples:
            examples = draw_pair(self.vocab_size, count, pair, random, device)
            return with_separator_last(examples, pair) if self.separator_last else examples

        return draw_split(draw, self.train, self.train_examples, self.test, self.test_examples, seed)


def check_lengths(vocab_size: int, first: int, second: int) -> None:
    """Raises ValueError if a list is empty (it can share nothing) or longer than its half of the vocabulary."""
    check_whole("length of a list", first, 0)
    check_whole("length of a list", second, 0)
    halves = (vocab_size // 2, vocab_size - SPECIAL_TOKENS - vocab_size // 2)
    if not (0 < first <= halves[0] and 0 < second <= halves[1]):
        raise ValueError(
            f"lists of {first} and {second} tokens cannot share one token of {vocab_size} ids: "
            f"expected 1 to {halves[0]} and 1 to {halves[1]}"
        )


def draw_pair(
    vocab_size: int, examples: int, pair: Pair, random: torch.Generator, device: torch.device | str = "cpu"
) -> Examples:
    """Draws examples of one pair of lengths. They are the same on every device.

    The tokens of both lists are drawn together without repeats and then split. This gives the same distribution as the
    released code, which splits the vocabulary at random for each example and draws one list from each half.

    Args:
        vocab_size: number of ids, including the special ones.
        examples: N.
        pair: (a, b).
        random: CPU generator.
        device: of the result.

    Raises:
        ValueError: as `check_lengths`.
    """
    first, second = pair
    check_lengths(vocab_size, first, second)
    tokens = draw_distinct(examples, first + second, SPECIAL_TOKENS, vocab_size, random, device)  # (N, a + b)
    row = torch.arange(examples, device=device)
    place = torch.randint(first, (examples,), generator=random).to(device)
    other_place = torch.randint(second, (examples,), generator=random).to(device)
    answers = tokens[row, place]
    tokens[row, first + other_place] = answers
    context = tokens.new_empty(examples, first + second + 2)
    context[:, 0], context[:, 1 + first] = PREFIX, SEPARATE_LISTS
    context[:, 1 : 1 + first], context[:, 2 + first :] = tokens[:, :first], tokens[:, first:]
    columns = torch.arange(first + second + 2, device=device)
    other_order = torch.cat([columns[:1], columns[2 + first :], columns[1 + first : 2 + first], columns[1 : 1 + first]])
    return Examples(
        name=f"{first}_{second}",
        context=context,
        question=tokens.new_full((examples, 1), SEPARATE_ANSWER),
        asked=tokens.new_zeros(examples, 1),
        answers=answers[:, None],
        other_order=other_order,
    )


def with_separator_last(examples: Examples, pair: Pair) -> Examples:
    """The same examples with SEPARATE_LISTS behind the second list."""
    first, second = pair
    columns = torch.arange(first + second + 2, device=examples.context.device)
    moved = torch.cat([columns[: 1 + first], columns[2 + first :], columns[1 + first : 2 + first]])
    swapped = torch.cat([columns[:1], columns[1 + first : -1], columns[1 : 1 + first], columns[-1:]])
    return replace(examples, context=examples.context[:, moved], other_order=swapped)
