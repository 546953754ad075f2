"""Records and paired differences as text: the tables that `jrt eval` and `jrt demo` print, and the rows of the HTML
page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jrt.evaluate.folder import Cell, Results

HEADER = ("model", "strategy", "accuracy", "95% interval", "items", "prompt tokens", "truncated", "seconds", "state")
Rows = tuple[tuple[str, ...], list[list[str]]]
"""A table's header and its rows."""


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column is aligned to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = []
    for line in [header, ["-" * width for width in widths], *rows]:
        cells = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        texts.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(texts)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def size(count: float) -> str:
    """Bytes with a binary unit."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def result_row(record: dict) -> list[str]:
    """The cells under HEADER; a star marks prompts longer than the model's training sequences."""
    return [
        record["model"] + (" *" if record["beyond_training"] else ""),
        record["strategy"],
        percent(record["score"]),
        f"{percent(record['low'])} to {percent(record['high'])}",
        str(record["n"]),
        f"{record['prompt_tokens']:.0f}",
        str(record["truncated"]),
        f"{record['seconds']:.1f}",
        size(record["state_bytes"]),
    ]


class Section(NamedTuple):
    """The table of one task, protocol and version of it, with the lines above and below it.

    Args:
        models: the records, a list for each model.
        empty: cells without a score, with the reason. They stand with the newest version that was measured."""

    task: str
    above: list[str]
    models: list[list[dict]]
    empty: dict[Cell, str]
    below: list[str]


def sections(results: Results) -> list[Section]:
    """The sections of a report, sorted by task, protocol and version."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for record in results.records:
        groups.setdefault((record["task"], record["protocol"], record["version"]), []).append(record)
    newest = {(task, protocol): version for task, protocol, version in sorted(groups)}
    empty: dict[tuple[str, str, int], dict[Cell, str]] = {}
    for cell, why in results.failed.items():
        version = newest.get((cell.task, cell.protocol), 0)  # 0: no model answered
        empty.setdefault((cell.task, cell.protocol, version), {})[cell] = f"not run: {why}"
    found = []
    for key in sorted(groups.keys() | empty.keys()):
        task, name, version = key
        members = groups.get(key, [])
        described = [one.describe() for one in results.protocols if one.name == name and version in (one.version, 0)]
        above = [*described, *map(counts_line, members[:1])]
        models = [[r for r in members if r["model"] == model] for model in dict.fromkeys(r["model"] for r in members)]
        found.append(Section(task, above, models, empty.get(key, {}), notes(members)))
    return found


def results_text(results: Results) -> str:
    """The sections of a report as text. Cells without a score are rows of their table, with their reason below it."""
    parts = []
    for section in sections(results):
        rows = [result_row(record) for members in section.models for record in members]
        rows += [[cell.model, cell.strategy, "not run", *["-"] * (len(HEADER) - 3)] for cell in section.empty]
        reasons = dict.fromkeys(f"{cell.model}: {why}" for cell, why in section.empty.items())
        first, *above = section.above
        parts += [f"{section.task} | {first}", *above, aligned(HEADER, rows), *section.below, *reasons, ""]
    return "\n".join(parts)


def notes(records: Sequence[dict]) -> list[str]:
    """The lines below a table of one task and protocol: NaN logits, prompts beyond training, models run in a special
    way."""
    found = []
    if any(record["nan"] for record in records):
        counted = ", ".join(f"{r['model']} {r['strategy']}: {r['nan']}" for r in records if r["nan"])
        found.append(f"NaN logits, counted as wrong: {counted}")
    if any(record["beyond_training"] for record in records):
        found.append("* prompts longer than the model's training sequences")
    said = dict.fromkeys((record["model"], note) for record in records for note in record["notes"])
    return [*found, *(f"{model}: {note}" for model, note in said)]


def counts_line(record: dict) -> str:
    """One line on a task's documents: how many became items, and why others did not."""
    unreachable = record["unreachable"]
    told = f", {unreachable} unreachable (no generation of the model can hold an answer)" if unreachable else ""
    return (
        f"{record['n']} items of {record['documents']} documents ({record['source']}): {record['dropped']} dropped by the "
        f"task's rules, {record['invalid']} invalid, {record['lost']} with the answer cut away{told}"
    )


def comparison_row(found: dict) -> list[str]:
    """A paired difference: task and protocol, what is compared, points, their interval, items."""
    first, second = found["first"], found["second"]
    if found["between"] == "strategy":
        what = f"{first['model']}: {second['strategy']} - {first['strategy']}"
    else:
        what = f"{first['strategy']}: {second['model']} - {first['model']}"
    points, low, high = (f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high"))
    return [f"{first['task']} {first['protocol']}", what, points, f"{low} to {high}", str(found["n"])]


def comparisons_text(comparisons: Sequence[dict]) -> str:
    """Paired differences in points, one a line."""
    rows = [[f"{place} | {what}", *rest] for place, what, *rest in map(comparison_row, comparisons)]
    return aligned(("paired difference (points)", "mean", "95% interval", "items"), rows) if rows else ""


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if any value is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def beside(measured: float | None, published: float | None, letter: str = "") -> str:
    """The text of a cell: the measured value ("-" for None), its mark, and the published value in parentheses."""
    text = "-" if measured is None else f"{measured:.1f}{letter and ' ' + letter}"
    return text if published is None else f"{text} ({published:.1f})"
