"""Sorts prompts into batches: prompts with a common beginning are neighbours, and lengths within a batch are similar.

The choice affects speed only. If padding changes a model's answers (as `jrt.probe` measures), a batch holds only prompts
of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHARE = 0.5  # the common beginning of a group is at least this share of its longest prompt


class Limits(NamedTuple):
    """Limits of one batch.

    Args:
        size: the most prompts.
        tokens: the most tokens to read in a batch of several prompts, padding included and common beginnings counted
            once; None: no limit.
        padding: the most tokens of padding in a batch; None: no limit.
        alone: a prompt of more tokens than this shares a batch only with prompts of its group; None: no such rule.
        together: a prompt of more tokens than this is a batch of its own; None: no such rule.
        shares: whether the model can read a common beginning once for several prompts.
        pads: whether a batch may hold prompts of unequal length.
    """

    size: int
    tokens: int | None = None
    padding: int | None = None
    alone: int | None = None
    together: int | None = None
    shares: bool = True
    pads: bool = True


class Group(NamedTuple):
    """Indices of rows whose first `common` tokens are the same; each row has at least one token after them."""

    rows: list[int]
    common: int


def batches(rows: Sequence[Sequence[int]], limits: Limits) -> list[list[int]]:
    """Batches as lists of indices into `rows` (token ids). Rows of one group are neighbours.

    The longest rows come first, so that a batch that does not fit on the GPU is met at the start of a run. A batch ends
    where one more row would exceed a limit."""
    found: list[list[int]] = []
    batch: list[Group] = []  # the batch being filled: for each group, those of its rows that are in the batch
    for group in groups(rows) if limits.shares else _groups_of_one(rows):
        batch.append(Group([], group.common))
        for index in group.rows:
            batch[-1].rows.append(index)
            if not _fits(rows, batch, limits):
                batch[-1].rows.pop()
                found.append([index for one in batch for index in one.rows])
                batch = [Group([index], group.common)]
    return [*found, [index for group in batch for index in group.rows]] if batch else []


def _fits(rows: Sequence[Sequence[int]], batch: list[Group], limits: Limits) -> bool:
    """Whether these rows may be one batch."""
    lengths = [len(rows[index]) for group in batch for index in group.rows]
    if len(lengths) == 1:
        return True
    if not limits.pads and min(lengths) < max(lengths):
        return False
    own = (len(rows[index]) - group.common for group in batch for index in group.rows[1:])
    padded = len(batch) * max(lengths)
    padding = padded - sum(max(len(rows[index]) for index in group.rows) for group in batch)
    return (
        len(lengths) <= limits.size
        and (limits.tokens is None or padded + sum(own) <= limits.tokens)
        and (limits.padding is None or padding <= limits.padding)
        and (limits.together is None or max(lengths) <= limits.together)
        and (limits.alone is None or len(batch) == 1 or max(lengths) <= limits.alone)
    )


def groups(rows: Sequence[Sequence[int]]) -> list[Group]:
    """Splits all rows into groups with a long common beginning (SHARE). A group may be a single row.

    The group with the longest row comes first."""
    found: list[Group] = []
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    for place, index in enumerate(order):
        if found:
            group, lengths = found[-1], [len(rows[member]) for member in (*found[-1].rows, index)]
            common = min(group.common, _common(rows[order[place - 1]], rows[index]), min(lengths) - 1)
            if common >= SHARE * max(lengths):
                found[-1] = Group([*group.rows, index], common)
                continue
        found.append(Group([index], len(rows[index]) - 1))
    return sorted(found, key=lambda group: -max(len(rows[index]) for index in group.rows))


def _groups_of_one(rows: Sequence[Sequence[int]]) -> list[Group]:
    """A group for each row, longest row first: for models that cannot read a common beginning once."""
    return [Group([index], len(rows[index]) - 1) for index in sorted(range(len(rows)), key=lambda i: -len(rows[i]))]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens the two rows have in common at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
