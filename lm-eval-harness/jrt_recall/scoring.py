"""Scoring: the published metric, the kinds of wrong answers, and intervals for means over items."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 10_000
NO_ANSWER, REPETITION, IRRELEVANT = "no answer", "repetition", "irrelevant"
KINDS = (NO_ANSWER, REPETITION, IRRELEVANT)
_BLOCK = 2_000_000  # indices drawn at once: 16 MB
_LONGEST_PHRASE = 8
_COMES_BACK = 4
_WORD = re.compile(r"\w+")


def first_hit(answer: str, text: str) -> int:
    """Where `answer` first stands in `text`, -1 where it does not: literal and case-insensitive, as published.

    `re.IGNORECASE` on the escaped answer: no Unicode case folding, no trimming."""
    hit = re.search(re.escape(answer), text, re.IGNORECASE)
    return hit.start() if hit else -1


def contains(prediction: str, answers: str | Sequence[str]) -> bool:
    """The published metric: True if `prediction` contains any of `answers` (one string stands for a list of one).

    Raises ValueError for an empty list, which no prediction could ever satisfy."""
    labels = [answers] if isinstance(answers, str) else list(answers)
    if not labels:
        raise ValueError("contains needs at least one answer, got an empty list")
    return any(first_hit(label, prediction) >= 0 for label in labels)


def error_kind(prediction: str, answers: str | Sequence[str]) -> str | None:
    """How a generation is wrong, one of KINDS (the paper's Table 13); None for a right one.

    The paper prints shares but not its rule; this one is stated so that shares can be compared with each other. No letter
    or digit is no answer. A generation repeats itself where a phrase of up to eight words follows itself (a single word
    twice more), or a phrase of four words comes back anywhere. The rest is irrelevant."""
    if contains(prediction, answers):
        return None
    words = _WORD.findall(prediction.lower())
    if not words:
        return NO_ANSWER
    return REPETITION if _repeats(words) else IRRELEVANT


def _repeats(words: list[str]) -> bool:
    phrases = [tuple(words[start : start + _COMES_BACK]) for start in range(len(words) - _COMES_BACK + 1)]
    if len(set(phrases)) < len(phrases):
        return True
    for size in range(1, _LONGEST_PHRASE + 1):
        times = 3 if size == 1 else 2
        for start in range(len(words) - size * times + 1):
            if words[start : start + size * times] == words[start : start + size] * times:
                return True
    return False


class Interval(NamedTuple):
    """A mean and its 95% interval (or that of the level asked for)."""

    mean: float
    low: float
    high: float


def bootstrap(scores: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of `scores` (one an item) with its percentile bootstrap interval over items.

    Deterministic for equal scores and seed. Raises ValueError for no scores or one that is not finite."""
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"an interval needs a list of at least one score, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite numbers")
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // values.size)
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        means.append(values[generator.integers(values.size, size=(rows, values.size))].mean(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of `second - first` over the same items, with its interval: items are resampled in pairs.

    Raises ValueError if the lengths differ."""
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same items: got {len(first)} and {len(second)} scores")
    return bootstrap([b - a for a, b in zip(first, second, strict=True)], level, resamples, seed)
