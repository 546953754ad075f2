"""Cells of one table that were not measured alike: each gets a letter, and each letter a reason below the table.

Numbers from other protocols, versions or dtypes may differ for that reason alone, so they never stand side by side unmarked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import TYPE_CHECKING

from jrt.evaluate.folder import Cell, cell_of

if TYPE_CHECKING:
    from jrt.evaluate.tables import Table

Settings = Mapping[str, str]  # dtype, and the version of each package


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
    found = {cell: settings.get(substitutes.get(cell, cell), {}) for cell in cells}
    usual = _usual(list(found.values()))
    reasons: dict[str, str] = {}  # reason -> letter
    letters = {}
    for cell in cells:
        said = _differences(found[cell], usual)
        if cell in substitutes:
            said.insert(
                0, f"measured under {substitutes[cell].protocol}, not {cell.protocol}: no published value beside it"
            )
        if said:
            letters[cell] = reasons.setdefault("; ".join(said), _letter(len(reasons)))
    return Mixture(substitutes, letters, tuple(f"{letter}: {reason}" for reason, letter in reasons.items()))


def unlike(settings: Mapping[Cell, Settings]) -> list[str]:
    """For tables of all that was measured: a line for each group of cells that was not computed as most were."""
    usual = _usual(list(settings.values()))
    groups: dict[str, list[str]] = {}
    for cell, found in settings.items():
        if said := _differences(found, usual):
            groups.setdefault("; ".join(said), []).append(cell.model)
    return [f"not measured alike: {', '.join(dict.fromkeys(models))}: {reason}" for reason, models in groups.items()]


def _usual(found: list[Settings]) -> Settings:
    counted = Counter(tuple(sorted(settings.items())) for settings in found)
    return dict(counted.most_common(1)[0][0]) if counted else {}


def _differences(found: Settings, usual: Settings) -> list[str]:
    names = [name for name in {**usual, **found} if found.get(name) != usual.get(name)]
    return [f"{name} {_short(found.get(name))}, the others {_short(usual.get(name))}" for name in names]


def _short(value: str | None) -> str:
    return "unknown" if value is None else value[:16]  # enough of a hash


def _letter(number: int) -> str:
    return ascii_lowercase[number] if number < len(ascii_lowercase) else str(number)
