"""The generator of set disjointness as in the authors' released code, which draws one example at a time.

It is kept for comparison in tests. Training uses `synthetics.set_disjointness`, which has the same distribution and is
much faster.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthetics.data import IGNORED, PREFIX, SEPARATE_ANSWER, SEPARATE_LISTS, SPECIAL_TOKENS
from synthetics.set_disjointness import check_lengths


def disjoint_sets(vocab_size: int, examples: int, first: int, second: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the same examples as the released generator for the same seed.

    Args:
        vocab_size: number of ids, including the four special ones.
        examples: N.
        first, second: lengths of the lists. Each list is drawn without repeats from its own half of the vocabulary.
        seed: of NumPy's legacy generator.

    Returns:
        inputs (N, first + second + 3) int64, and labels of the same shape. The last label is the shared token, all
        others are IGNORED.

    Raises:
        ValueError: a list is empty or longer than its half of the vocabulary.
    """
    check_lengths(vocab_size, first, second)
    half = vocab_size // 2
    random = np.random.RandomState(seed)
    rows, answers = [], []
    for _ in range(examples):
        tokens = random.permutation(np.arange(SPECIAL_TOKENS, vocab_size))
        own = random.choice(tokens[:half], first, replace=False)
        other = random.choice(tokens[half:], second, replace=False)
        shared = own[random.randint(first)]
        other[random.randint(second)] = shared
        rows.append([PREFIX, *own, SEPARATE_LISTS, *other, SEPARATE_ANSWER])
        answers.append(int(shared))
    inputs = torch.tensor(np.array(rows), dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1] = torch.tensor(answers)
    return inputs, labels
