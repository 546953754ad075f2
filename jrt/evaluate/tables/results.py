"""Records and paired differences as text: the tables that `jrt eval` and `jrt demo` print, and the rows of the HTML
page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jrt_recall import Protocol

from jrt.evaluate.folder import Cell

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


def protocols_of(manifest: dict) -> list[Protocol]:
    """The protocols that a run's manifest records."""
    return [Protocol(**{**known, "stop": tuple(known["stop"])}) for known in manifest["identity"]["protocols"]]


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


def sections(records: Sequence[dict], protocols: Sequence[Protocol], failed: Mapping[Cell, str]) -> list[Section]:
    """The sections of a report, sorted by task, protocol and version. failed: cells without a score, with the reason."""
    described = {(protocol.name, protocol.version): protocol.describe() for protocol in protocols}
    groups: dict[tuple[str, str], dict[int, dict[str, list[dict]]]] = {(c.task, c.protocol): {} for c in failed}
    for record in records:
        versions = groups.setdefault((record["task"], record["protocol"]), {})
        versions.setdefault(record.get("version", 1), {}).setdefault(record["model"], []).append(record)
    found = []
    for (task, protocol), versions in sorted(groups.items()):
        empty = not_run(failed, task, protocol)
        for version, models in sorted(versions.items()):
            members = [record for rows in models.values() for record in rows]
            above = [described[protocol, version], counts_line(members[0])]
            lacking = empty if version == max(versions) else {}
            found.append(Section(task, above, list(models.values()), lacking, notes(members)))
        if not versions:  # no model answered
            above = [text for (name, _), text in described.items() if name == protocol]
            found.append(Section(task, above, [], empty, []))
    return found


def results_text(
    records: Sequence[dict], protocols: Sequence[Protocol], failed: Mapping[Cell, str] | None = None
) -> str:
    """The sections of a report as text. failed: cells without a score; they are rows of their table, with their reason
    below it."""
    parts = []
    for section in sections(records, protocols, failed or {}):
        rows = [result_row(record) for members in section.models for record in members]
        rows += [[cell.model, cell.strategy, "not run", *["-"] * (len(HEADER) - 3)] for cell in section.empty]
        reasons = dict.fromkeys(f"{cell.model}: {why}" for cell, why in section.empty.items())
        first, *above = section.above
        parts += [f"{section.task} | {first}", *above, aligned(HEADER, rows), *section.below, *reasons, ""]
    return "\n".join(parts)


def not_run(failed: Mapping[Cell, str], task: str, protocol: str) -> dict[Cell, str]:
    """The cells of one task and protocol that have no score, each with `not run: ` and the reason on one line."""
    own = {cell: why for cell, why in failed.items() if (cell.task, cell.protocol) == (task, protocol)}
    return {cell: f"not run: {' '.join(why.split())}" for cell, why in own.items()}


def notes(records: Sequence[dict]) -> list[str]:
    """The lines below a table of one task and protocol: NaN logits, prompts beyond training, models run in a special
    way."""
    found = []
    if any(record["nan"] for record in records):
        counted = ", ".join(f"{r['model']} {r['strategy']}: {r['nan']}" for r in records if r["nan"])
        found.append(f"NaN logits, counted as wrong: {counted}")
    if any(record["beyond_training"] for record in records):
        found.append("* prompts longer than the model's training sequences")
    said = dict.fromkeys((record["model"], note) for record in records for note in record.get("notes", ()))
    return [*found, *(f"{model}: {note}" for model, note in said)]


def counts_line(record: dict) -> str:
    """One line on a task's documents: how many became items, and why others did not."""
    unreachable = record.get("unreachable", 0)
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


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in LaTeX; needs the package booktabs."""
    import pandas

    frame = pandas.DataFrame(rows, columns=list(header))
    return frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(header) - 1))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if any value is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def beside(measured: float | None, published: float | None, letter: str = "") -> str:
    """The text of a cell: the measured value ("-" for None), its mark, and the published value in parentheses."""
    text = "-" if measured is None else f"{measured:.1f}{letter and ' ' + letter}"
    return text if published is None else f"{text} ({published:.1f})"
