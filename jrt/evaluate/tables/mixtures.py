"""Marks for the cells of a table that were not measured like the others: a letter in the cell, its reason below the
table.

Another protocol, package version or dtype can change a score by itself. So such scores stand side by side only with a
mark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import TypeVar

from jrt.evaluate.folder import Cell, cell_of
from jrt.evaluate.tables.published import Table

WHOLE = "all"
Settings = Mapping[str, str]  # dtype, which items of a task (WHOLE or "the first N"), and the version of each package
Key = TypeVar("Key")


@dataclass(frozen=True)
class Mixture:
    """The marks of a table.

    Args:
        substitutes: for a cell of the table that was not run, the cell that was run under another protocol.
        letters: the mark of each cell of the table that differs.
        reasons: a line for each letter.
    """

    substitutes: Mapping[Cell, Cell] = field(default_factory=dict)
    letters: Mapping[Cell, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


NOTHING_MIXED = Mixture()


def settings_of(manifest: dict) -> dict[str, dict[str, str]]:
    """For each model of a run, the dtype, items and package versions with which its cells were computed."""
    versions = {name: str(value) for name, value in manifest.get("versions", {}).items() if name != "platform"}
    limit = manifest["identity"].get("limit")
    items = WHOLE if limit is None else f"the first {limit}"
    return {
        model["name"]: {"dtype": model["dtype"], "items": items, **versions} for model in manifest["identity"]["models"]
    }


def mixture(table: Table, records: Sequence[dict], settings: Mapping[Cell, Settings]) -> Mixture:
    """Compares the cells of a table. A cell gets a mark if its settings are not those that most cells have."""
    run = {cell_of(record) for record in records}
    own = {(column.task, column.strategy, column.protocol) for column in table.columns}
    substitutes: dict[Cell, Cell] = {}
    cells = []
    for model in dict.fromkeys(record["model"] for record in records):
        for column in table.columns:
            cell = Cell(model, column.task, column.strategy, column.protocol)
            others = (
                cell_of(record)
                for record in records
                if (record["model"], record["task"], record["strategy"]) == (model, column.task, column.strategy)
                and (record["task"], record["strategy"], record["protocol"]) not in own
            )
            if cell in run:
                cells.append(cell)
            elif other := next(others, None):
                substitutes[cell] = other
                cells.append(cell)
    said = differences({cell: settings.get(substitutes.get(cell, cell), {}) for cell in cells})
    versions = other_versions(records)
    for cell in cells:
        said[cell] += versions.get(substitutes.get(cell, cell), ())
    for cell, other in substitutes.items():
        said[cell].insert(0, f"measured under {other.protocol}, not {cell.protocol}: no published value beside it")
    reasons: dict[str, str] = {}
    letters = marked(said, reasons)
    return Mixture(substitutes, letters, explained(reasons))


def usual(settings: Mapping[Key, Settings]) -> dict[str, str]:
    """The settings that most cells have."""
    counted = Counter(tuple(sorted(found.items())) for found in settings.values())
    return dict(counted.most_common(1)[0][0]) if counted else {}


def limited(settings: Mapping[Key, Settings]) -> list[str]:
    """A line if most cells were measured on a part of their task's items, which no mark says."""
    items = usual(settings).get("items", WHOLE)
    return [] if items == WHOLE else [f"measured on {items} items of each task (--limit)"]


def differences(settings: Mapping[Key, Settings]) -> dict[Key, list[str]]:
    """For each cell, a line for each setting that differs from the most common settings."""
    most = usual(settings)
    return {
        cell: [
            f"{name} {_short(found.get(name))}, the others {_short(most.get(name))}"
            for name in {**most, **found}
            if found.get(name) != most.get(name)
        ]
        for cell, found in settings.items()
    }


def other_versions(records: Sequence[dict]) -> dict[Cell, list[str]]:
    """For each cell whose protocol has another version than most cells of that task and protocol, a line that says so."""
    counted: dict[tuple[str, str], Counter[int]] = {}
    for record in records:
        counted.setdefault((record["task"], record["protocol"]), Counter())[record.get("version", 1)] += 1
    found = {}
    for record in records:
        (most, _), *_ = counted[record["task"], record["protocol"]].most_common(1)
        version = record.get("version", 1)
        if version != most:
            found[cell_of(record)] = [f"{record['protocol']} v{version}, the others v{most}"]
    return found


def marked(said: Mapping[Key, Sequence[str]], reasons: dict[str, str]) -> dict[Key, str]:
    """A letter for each cell that has lines in `said`; equal lines share a letter.

    reasons: letters by reason; new ones are added to it."""
    return {cell: reasons.setdefault("; ".join(lines), _letter(len(reasons))) for cell, lines in said.items() if lines}


def explained(reasons: Mapping[str, str]) -> tuple[str, ...]:
    """The lines below a table: each letter with its reason."""
    return tuple(f"{letter}: {reason}" for reason, letter in reasons.items())


def unlike(settings: Mapping[Cell, Settings], records: Sequence[dict]) -> list[str]:
    """For tables without marks: a line for each group of cells that was not computed like most cells."""
    groups: dict[str, list[str]] = {}
    versions = other_versions(records)
    for cell, others in differences(settings).items():
        if said := [*others, *versions.get(cell, ())]:
            groups.setdefault("; ".join(said), []).append(cell.model)
    return [f"not measured alike: {', '.join(dict.fromkeys(models))}: {reason}" for reason, models in groups.items()]


def _short(value: str | None) -> str:
    return "unknown" if value is None else value[:16]  # 16 letters tell two hashes apart


def _letter(number: int) -> str:
    return ascii_lowercase[number] if number < len(ascii_lowercase) else str(number)
