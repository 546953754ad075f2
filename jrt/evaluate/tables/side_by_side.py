"""Scores of the same task under several protocols, a column for each, and how often equal prompts got equal answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from jrt.evaluate.folder import Results, cell_of
from jrt.evaluate.tables.results import aligned, percent

Row = tuple[str, str, str]  # model, task, strategy


def protocols_side_by_side(results: Results) -> str:
    """The table as text; empty if no task was run under several protocols.

    Scores of two columns come from different prompts. So the lines below the table say for each pair of protocols how
    many items had the same prompt, and for how many of these the model gave the same answer."""
    scores: dict[Row, dict[str, float]] = {}
    for record in results.records:
        row = record["model"], record["task"], record["strategy"]
        scores.setdefault(row, {})[record["protocol"]] = record["score"]
    several = {row: found for row, found in scores.items() if len(found) > 1}
    if not several:
        return ""
    protocols = list(dict.fromkeys(protocol for found in several.values() for protocol in found))
    rows = [
        [" ".join(row), *(percent(found[name]) if name in found else "-" for name in protocols)]
        for row, found in several.items()
    ]
    table = aligned(("model, task and strategy, percent under", *protocols), rows)
    return "\n".join([table, *agreements(results.predictions)])


def agreements(predictions: Sequence[dict]) -> list[str]:
    """A line for each two protocols of one model, task and strategy that have items in common."""
    cells: dict[Row, dict[str, dict[str, dict]]] = {}
    for row in predictions:
        cell = cell_of(row)
        of_row = cells.setdefault((cell.model, cell.task, cell.strategy), {})
        of_row.setdefault(cell.protocol, {})[row["id"]] = row
    lines = []
    for (model, task, strategy), found in cells.items():
        for first, second in combinations(found, 2):
            pairs = [(row, found[second][item]) for item, row in found[first].items() if item in found[second]]
            equal = [(one, other) for one, other in pairs if one["prompt"] == other["prompt"]]
            same = sum(one["prediction"] == other["prediction"] for one, other in equal)
            if pairs:
                lines.append(
                    f"{model} {task} {strategy}, {first} and {second}: {len(equal)} of {len(pairs)} prompts are equal, "
                    f"{same} of these have the same answer"
                )
    return lines
