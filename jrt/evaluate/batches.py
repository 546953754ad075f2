"""Which prompts are read together: those that begin alike stand side by side, and lengths differ little within a batch.

A row's answer does not depend on its batch, so only speed is at stake. Where padding changes a model's answers (`jrt.probe`),
prompts of equal length alone meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SHARE = 0.5  # the least part of a prompt that all prompts of its group begin with


class Limits(NamedTuple):
    """What a batch may hold.

    Args:
        size: prompts.
        tokens: to read in a batch of more than one prompt, padding included and common beginnings counted once.
        alone: a longer prompt only shares a batch with those that begin like it.
        shares: whether the model can read common beginnings once.
        pads: whether prompts of unequal length may meet.
    """

    size: int
    tokens: int | None = None
    alone: int | None = None
    shares: bool = True
    pads: bool = True


class Group(NamedTuple):
    """Rows (their indices) that begin with the same `common` tokens, and go on with at least one of their own."""

    rows: list[int]
    common: int


def batches(rows: Sequence[Sequence[int]], limits: Limits) -> list[list[int]]:
    """Indices of `rows` in batches, longest first: a batch that does not fit on the GPU shows at once.

    Rows that begin alike stand side by side. A batch ends where the next row would go over a limit."""
    found: list[list[int]] = []
    batch: list[Group] = []  # the open batch: of each group the rows that are in it
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
    tokens = len(batch) * max(lengths) + sum(own)
    return (
        len(lengths) <= limits.size
        and (limits.tokens is None or tokens <= limits.tokens)
        and (limits.alone is None or len(batch) == 1 or max(lengths) <= limits.alone)
    )


def groups(rows: Sequence[Sequence[int]]) -> list[Group]:
    """All rows in groups with a long common beginning; a group may be a single row. Longest rows first."""
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
    """Each row by itself, longest first: for models that cannot read a common beginning once."""
    return [Group([index], len(rows[index]) - 1) for index in sorted(range(len(rows)), key=lambda i: -len(rows[i]))]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
