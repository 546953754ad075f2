"""Cells of one table that were not measured alike: each gets a letter, and each letter a reason below the table.

Numbers from other protocols, versions or dtypes may differ for that reason alone, so they never stand side by side unmarked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import TypeVar

from jrt.evaluate.folder import Cell, cell_of
from jrt.evaluate.tables.published import Table

Settings = Mapping[str, str]  # dtype, and the version of each package
Key = TypeVar("Key")


@dataclass(frozen=True)
class Mixture:
    """What a table has to say about its cells.

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
    """By model, how the cells of a run were computed."""
    versions = {name: str(value) for name, value in manifest.get("versions", {}).items() if name != "platform"}
    return {model["name"]: {"dtype": model["dtype"], **versions} for model in manifest["identity"]["models"]}


def mixture(table: Table, records: Sequence[dict], settings: Mapping[Cell, Settings]) -> Mixture:
    """Compares the cells of a table with each other. The settings that most cells have are those the others differ from."""
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
    for cell, other in substitutes.items():
        said[cell].insert(0, f"measured under {other.protocol}, not {cell.protocol}: no published value beside it")
    reasons: dict[str, str] = {}
    letters = marked(said, reasons)
    return Mixture(substitutes, letters, explained(reasons))


def differences(settings: Mapping[Key, Settings]) -> dict[Key, list[str]]:
    """For each cell, what of its settings is not as in most cells."""
    counted = Counter(tuple(sorted(found.items())) for found in settings.values())
    usual = dict(counted.most_common(1)[0][0]) if counted else {}
    return {
        cell: [
            f"{name} {_short(found.get(name))}, the others {_short(usual.get(name))}"
            for name in {**usual, **found}
            if found.get(name) != usual.get(name)
        ]
        for cell, found in settings.items()
    }


def marked(said: Mapping[Key, Sequence[str]], reasons: dict[str, str]) -> dict[Key, str]:
    """The letter of each cell of which something is said. reasons: letters by reason, to which new ones are added."""
    return {cell: reasons.setdefault("; ".join(lines), _letter(len(reasons))) for cell, lines in said.items() if lines}


def explained(reasons: Mapping[str, str]) -> tuple[str, ...]:
    """The lines below a table: each letter with its reason."""
    return tuple(f"{letter}: {reason}" for reason, letter in reasons.items())


def unlike(settings: Mapping[Cell, Settings]) -> list[str]:
    """For tables of all that was measured: a line for each group of cells that was not computed as most were."""
    groups: dict[str, list[str]] = {}
    for cell, said in differences(settings).items():
        if said:
            groups.setdefault("; ".join(said), []).append(cell.model)
    return [f"not measured alike: {', '.join(dict.fromkeys(models))}: {reason}" for reason, models in groups.items()]


def _short(value: str | None) -> str:
    return "unknown" if value is None else value[:16]  # enough of a hash


def _letter(number: int) -> str:
    return ascii_lowercase[number] if number < len(ascii_lowercase) else str(number)
