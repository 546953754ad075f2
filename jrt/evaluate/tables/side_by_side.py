"""Two cells beside each other: paired differences between strategies or models, and scores of the same task under
several protocols, with how often equal prompts got equal answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from jrt_recall.scoring import paired_difference

from jrt.evaluate.folder import Cell, Results, by_item
from jrt.evaluate.tables.results import aligned, percent


class Pair(NamedTuple):
    """Two cells whose names differ in one place, and their predictions for the items that both have."""

    between: str
    first: Cell
    second: Cell
    shared: list[tuple[dict, dict]]


def pairs(predictions: Sequence[dict]) -> Iterator[Pair]:
    """All pairs of cells that differ in model, task, strategy or protocol alone and have items in common."""
    cells = by_item(predictions)
    for first, second in combinations(cells, 2):
        differing = [name for name in Cell._fields if getattr(first, name) != getattr(second, name)]
        if len(differing) == 1:
            shared = [(row, cells[second][item]) for item, row in cells[first].items() if item in cells[second]]
            if shared:
                yield Pair(differing[0], first, second, shared)


def comparisons(predictions: Sequence[dict], seed: int = 0) -> list[dict]:
    """Paired differences over the items that two cells share: two strategies of one model, or two models with one
    strategy.

    difference = second - first, in units of the score (0 to 1), with its 95% bootstrap interval."""
    found = []
    for between, first, second, shared in pairs(predictions):
        if between not in ("strategy", "model"):
            continue
        interval = paired_difference(
            [one["score"] for one, _ in shared], [two["score"] for _, two in shared], seed=seed
        )
        found.append(
            {
                "between": between,
                "first": first._asdict(),
                "second": second._asdict(),
                "difference": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n": len(shared),
            }
        )
    return found


def protocols_side_by_side(results: Results) -> str:
    """The table as text; empty if no task was run under several protocols.

    Scores of two columns come from different prompts. So the lines below the table say for each pair of protocols how
    many items had the same prompt, and for how many of these the model gave the same answer."""
    scores: dict[str, dict[str, str]] = {}
    for cell, record in results.by_cell.items():
        scores.setdefault(" ".join(cell[:3]), {})[cell.protocol] = percent(record["score"])
    several = {row: found for row, found in scores.items() if len(found) > 1}
    if not several:
        return ""
    protocols = list(dict.fromkeys(protocol for found in several.values() for protocol in found))
    rows = [[row, *(found.get(protocol, "-") for protocol in protocols)] for row, found in several.items()]
    table = aligned(("model, task and strategy, percent under", *protocols), rows)
    return "\n".join([table, *agreements(results.predictions)])


def agreements(predictions: Sequence[dict]) -> list[str]:
    """A line for each two protocols of one model, task and strategy that have items in common."""
    lines = []
    for between, first, second, shared in pairs(predictions):
        if between == "protocol":
            equal = [(one, other) for one, other in shared if one["prompt"] == other["prompt"]]
            same = sum(one["prediction"] == other["prediction"] for one, other in equal)
            lines.append(
                f"{' '.join(first[:3])}, {first.protocol} and {second.protocol}: {len(equal)} of {len(shared)} prompts "
                f"are equal, {same} of these have the same answer"
            )
    return lines
