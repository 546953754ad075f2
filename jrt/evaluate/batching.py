"""Which prompts are read together: those that begin alike, and those of like length, at as few decoding steps as that allows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jrt.evaluate.shared_prefix import groups, groups_of_one


class Limits(NamedTuple):
    """What a batch may hold.

    Args:
        size: prompts.
        tokens: to read in a batch of more than one prompt, padding included and common beginnings counted once.
        alone: a longer prompt only shares a batch with those that begin like it.
        overhead: tokens that take as long to read as one more batch takes to decode; None: as few batches as can be.
        shares: whether what prompts begin with is read once for all.
    """

    size: int
    tokens: int | None = None
    alone: int | None = None
    overhead: int | None = None
    shares: bool = True


def batches(rows: Sequence[Sequence[int]], limits: Limits) -> list[list[int]]:
    """Indices of `rows` in batches, longest first: a batch that does not fit shows at once.

    The rows are sorted, those that begin alike side by side, and cut where the fewest tokens are read, padding and
    `overhead` of each batch included: a shortest path over the places where one may cut."""
    order, group_of, common = [], [], []
    alike = groups(rows) if limits.shares else groups_of_one(rows)
    for number, group in enumerate(alike):
        order += group.rows
        group_of += [number] * len(group.rows)
        common += [group.common] * len(group.rows)
    lengths = [len(rows[index]) for index in order]
    overhead = limits.overhead
    if overhead is None:
        overhead = sum(lengths) * max(1, max(lengths, default=1))  # no padding outweighs a batch
    cost: list[float] = [0] + [math.inf] * len(order)  # of the rows up to here
    begun_at = [0] * (len(order) + 1)  # where their last batch begins
    for start in range(len(order)):
        longest, apart, rest = 0, 0, 0  # apart: beginnings that are read, each as wide as the longest row
        for place in range(start, min(start + limits.size, len(order))):
            longest = max(longest, lengths[place])
            if place > start and group_of[place] == group_of[place - 1]:
                rest += lengths[place] - common[place]
            else:
                apart += 1
            read = apart * longest + rest
            if place > start and (
                (limits.tokens is not None and read > limits.tokens)
                or (limits.alone is not None and apart > 1 and longest > limits.alone)
            ):
                break
            through = cost[start] + overhead + read
            if through < cost[place + 1]:
                cost[place + 1], begun_at[place + 1] = through, start
    found: list[list[int]] = []
    end = len(order)
    while end:
        found.append(order[begun_at[end] : end])
        end = begun_at[end]
    return found[::-1]
