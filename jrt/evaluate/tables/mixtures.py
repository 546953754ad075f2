"""Marks for the cells of a table that were not measured like the others: a letter in the cell, its reason below the
table.

Another protocol, package version or dtype can change a score by itself. So such scores stand side by side only with a
mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mode
from string import ascii_lowercase
from typing import NamedTuple, TypeVar

from jrt.evaluate.folder import ALL_ITEMS, Cell, Results
from jrt.evaluate.tables.published import Table

Settings = Mapping[str, str]  # dtype, items and the version of each package, as in `Results.settings`
Key = TypeVar("Key")


class Mixture(NamedTuple):
    """The marks of a table.

    Args:
        read: for each cell of the table that has a number, the cell of the results that it comes from: itself, or one
            under another protocol.
        letters: the mark of each cell of the table that differs.
        reasons: a line for each letter.
    """

    read: dict[Cell, Cell]
    letters: dict[Cell, str]
    reasons: list[str]


def mixture(table: Table, results: Results) -> Mixture:
    """Compares the cells of a table. A cell gets a mark if its settings are not those that most cells have."""
    run, own = results.by_cell, {column[1:4] for column in table.columns}
    read: dict[Cell, Cell] = {}
    for cell in (cell for model in results.models for cell in table.cells(model)):
        others = (other for other in run if other[:3] == cell[:3] and other[1:] not in own)
        if (found := cell if cell in run else next(others, None)) is not None:
            read[cell] = found
    said = _differing(read, results)
    for cell, other in read.items():
        if other != cell:
            said[cell].insert(0, f"measured under {other.protocol}, not {cell.protocol}: no published value beside it")
    return Mixture(read, *lettered(said))


def _differing(read: Mapping[Cell, Cell], results: Results) -> dict[Cell, list[str]]:
    """For each cell, a line for each of its settings, and for the version of its protocol, if most cells have another.

    read: as in `Mixture`. Versions are compared among the cells of one task and protocol."""
    said = differences({cell: results.settings.get(other, {}) for cell, other in read.items()})
    versions: dict[tuple[str, str], list[int]] = {}
    for record in results.records:
        versions.setdefault((record["task"], record["protocol"]), []).append(record["version"])
    run = results.by_cell
    for cell, other in read.items():
        version, most = run[other]["version"], mode(versions[other.task, other.protocol])
        if version != most:
            said[cell].append(f"{other.protocol} v{version}, the others v{most}")
    return said


def usual(settings: Mapping[Key, Settings]) -> dict[str, str]:
    """The settings that most cells have."""
    return dict(mode(tuple(sorted(found.items())) for found in settings.values())) if settings else {}


def limited(results: Results) -> list[str]:
    """A line if most cells were measured on a part of their task's items, which no mark says."""
    items = usual(results.settings).get("items", ALL_ITEMS)
    return [] if items == ALL_ITEMS else [f"measured on {items} items of each task (--limit)"]


def differences(settings: Mapping[Key, Settings]) -> dict[Key, list[str]]:
    """For each cell, a line for each setting that differs from the most common settings."""
    most = usual(settings)
    return {
        cell: [
            # 16 letters tell two hashes apart
            f"{name} {found.get(name, 'unknown')[:16]}, the others {most.get(name, 'unknown')[:16]}"
            for name in {**most, **found}
            if found.get(name) != most.get(name)
        ]
        for cell, found in settings.items()
    }


def lettered(said: Mapping[Key, Sequence[str]]) -> tuple[dict[Key, str], list[str]]:
    """A letter for each cell that has lines in `said`, and a line for each letter; equal reasons share a letter."""
    reasons = {key: "; ".join(lines) for key, lines in said.items() if lines}
    names = [*ascii_lowercase, *map(str, range(26, len(reasons)))]
    letters = dict(zip(dict.fromkeys(reasons.values()), names, strict=False))
    marks = {key: letters[reason] for key, reason in reasons.items()}
    return marks, [f"{letter}: {reason}" for reason, letter in letters.items()]


def unlike(results: Results) -> list[str]:
    """For tables without marks: a line for each group of cells that was not computed like most cells."""
    groups: dict[str, list[str]] = {}
    for cell, lines in _differing({cell: cell for cell in results.by_cell}, results).items():
        if lines:
            groups.setdefault("; ".join(lines), []).append(cell.model)
    return [f"not measured alike: {', '.join(dict.fromkeys(models))}: {reason}" for reason, models in groups.items()]
