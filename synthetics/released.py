"""The released generator of set disjointness, one example at a time, kept so that its examples can be compared with.

Training draws from `synthetics.set_disjointness`, which has the same distribution and is much faster.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthetics.data import IGNORED, PREFIX, SEPARATE_ANSWER, SEPARATE_LISTS, SPECIAL_TOKENS
from synthetics.set_disjointness import check_lengths


def disjoint_sets(vocab_size: int, examples: int, first: int, second: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws examples in the order of draws of the released generator.

    Args:
        vocab_size: ids, the four special ones included.
        examples: N.
        first, second: lengths of the lists; each list is drawn without repeats from its own part of the vocabulary.
        seed: of NumPy's legacy generator.

    Returns:
        inputs (N, first + second + 3) int64, and labels of the same shape: IGNORED but for the shared token, last.

    Raises:
        ValueError: a list longer than its part of the vocabulary, or an empty one.
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
