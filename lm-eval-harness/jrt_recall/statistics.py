"""Intervals for means of per-item scores: percentile bootstrap, seeded, single and paired."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_BLOCK = 2_000_000  # indices drawn at once: 16 MB


class Interval(NamedTuple):
    """A mean and its 95% interval (or that of the level asked for)."""

    mean: float
    low: float
    high: float


def bootstrap(scores: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of `scores` (one per item) with its percentile bootstrap interval over items.

    Deterministic for equal scores and seed. Raises ValueError for no scores or one that is not finite."""
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
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return bootstrap(difference, level, resamples, seed)
