"""Scoring: the published metric `contains`, the kinds of wrong answers, and confidence intervals of mean scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

RESAMPLES = 10_000
NO_ANSWER, REPETITION, IRRELEVANT = "no answer", "repetition", "irrelevant"
_BLOCK = 2_000_000  # most indices drawn at once: 16 MB
_WORD = re.compile(r"\w+")
# Of words with a blank between them: one word three times, two to eight words twice, or four words that come back.
_REPEATED = re.compile(r"\b(\w+) \1 \1\b|\b(\w+(?: \w+){1,7}) \2\b|\b(\w+(?: \w+){3})\b.* \3\b")


def hits(answers: Iterable[str], text: str) -> Iterator[int]:
    """Yields, for each answer that stands in `text`, the position of its first character there.

    The search is literal and ignores case, as in the published metric: `re.IGNORECASE` on the escaped answer, without
    Unicode case folding and without trimming."""
    for answer in answers:
        if hit := re.search(re.escape(answer), text, re.IGNORECASE):
            yield hit.start()


def contains(prediction: str, answers: str | Sequence[str]) -> bool:
    """The published metric: True if `prediction` contains any of `answers` (one string stands for a list of one).

    Raises ValueError for an empty list, which no prediction could ever satisfy."""
    labels = [answers] if isinstance(answers, str) else list(answers)
    if not labels:
        raise ValueError("contains needs at least one answer, got an empty list")
    return any(True for _ in hits(labels, prediction))


def error_kind(prediction: str, answers: str | Sequence[str]) -> str | None:
    """Sorts a wrong generation into one of three kinds (the paper's Table 13). Returns None for a right one.

    The paper prints the shares of the kinds but not the rule behind them, so these shares can be compared with each
    other and not with the paper's. The rule here:

    - "no answer": the generation has no letter or digit.
    - "repetition": a phrase of two to eight words stands twice in a row, one word stands three times in a row, or a
      phrase of four words occurs twice anywhere.
    - "irrelevant": everything else.
    """
    if contains(prediction, answers):
        return None
    words = _WORD.findall(prediction.lower())
    if not words:
        return NO_ANSWER
    return REPETITION if _REPEATED.search(" ".join(words)) else IRRELEVANT


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval (95% unless another level was asked for)."""

    mean: float
    low: float
    high: float


def bootstrap(scores: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Returns the mean of `scores` and its percentile bootstrap interval.

    The result is the same for equal arguments.

    Args:
        scores: one score for each item.
        level: of the interval, between 0 and 1.
        resamples: number of bootstrap samples, each drawn from the items with replacement.
        seed: of the random draws.

    Raises:
        ValueError: no scores, a score that is not finite, or an impossible level.
    """
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
    """Returns the mean of `second - first` over the same items and its bootstrap interval.

    Both lists hold the same items in the same order; the differences are resampled, so pairs stay together. The other
    arguments are those of `bootstrap`. Raises ValueError if the lengths differ."""
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same items: got {len(first)} and {len(second)} scores")
    return bootstrap([b - a for a, b in zip(first, second, strict=True)], level, resamples, seed)
