"""Tables: results as text, and the paper's tables with published values beside measured ones.

`published.csv` holds the paper's values (arXiv 2407.05483, version of July 9, 2024) as printed, in percent. A model is named
there by the last part of its hub id where the authors released one (`hazyresearch/JRT-360M-30B`, `fla-hub/gla-1.3B-100B`,
`state-spaces/mamba-1.4b`), in lower case. Only the paper's own tasks, windows and metric may stand beside these values: never
`qa_*` tasks, generated documents, reference pages, or the mini models.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jrt_recall import Protocol
from jrt_recall.fixtures import SOURCE as GENERATED
from jrt_recall.scoring import error_kind

from jrt.evaluate.folder import Cell, cell_of
from jrt.evaluate.mixtures import NOTHING_MIXED, Mixture

HEADER = ("model", "strategy", "accuracy", "95% interval", "items", "prompt tokens", "truncated", "seconds", "state")
TITLES = {
    "table1": "Table 1: default and JRT-Prompt",
    "table2": "Table 2: JRT-RNN (the paper's length-512 cells fill short prompts by reading again: short_prompt='repeat')",
    "table3": "Table 3: prompts of 2k tokens, beyond the encoder",
    "table4": "Table 4: rules for prompts shorter than the encoder",
    "table8": "Table 8: SuperGLUE, 360M models",
    "table9": "Table 9: SuperGLUE, 1.3B models",
    "table13": "Table 13: error modes, percent of all items",
    "table14": "Table 14: default, 2-shot and JRT-Prompt",
}
SUPER_GLUE_TABLES = ("table8", "table9")
SUPER_GLUE_SIZES = {
    "boolq": 3270,
    "cb": 56,
    "copa": 100,
    "multirc": 4848,
    "recall_record": 10000,
    "sglue_rte": 277,
    "wic": 638,
    "wsc": 104,
}
"""Documents of SuperGLUE's validation splits."""
_WIDE = 9  # a table of more columns is printed with models as columns

Rows = tuple[tuple[str, ...], list[list[str]]]
"""A table's header and its rows."""


# As text


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right."""
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


def results_text(
    records: Sequence[dict], protocols: Sequence[Protocol], failed: Mapping[Cell, str] | None = None
) -> str:
    """One table for each task and protocol, with the protocol in words and the counts that the scores rest on.

    failed: cells without a number, which are rows with their reason below the table."""
    described = {(protocol.name, protocol.version): protocol.describe() for protocol in protocols}
    parts = []

    def group(record: dict) -> tuple[str, str]:
        return record["task"], record["protocol"]

    for (task, protocol), members in groupby(sorted(records, key=group), key=group):
        found = list(members)
        without = {cell: why for cell, why in (failed or {}).items() if (cell.task, cell.protocol) == (task, protocol)}
        empty = [[cell.model, cell.strategy, "not run", *["-"] * (len(HEADER) - 3)] for cell in without]
        table = aligned(HEADER, [*map(result_row, found), *empty])
        reasons = dict.fromkeys(f"{cell.model}: not run: {' '.join(why.split())}" for cell, why in without.items())
        parts += [
            f"{task} | {described[protocol, found[0].get('version', 1)]}",
            counts_line(found[0]),
            table,
            *notes(found),
            *reasons,
            "",
        ]
    shown = {(record["task"], record["protocol"]) for record in records}
    for cell, why in (failed or {}).items():
        if (cell.task, cell.protocol) not in shown:
            parts.append(f"{cell.model} {cell.task} {cell.strategy} {cell.protocol}: not run: {' '.join(why.split())}")
    return "\n".join(parts)


def notes(records: Sequence[dict]) -> list[str]:
    """What has to be said below a table of one task and protocol: NaN logits, long prompts, models run otherwise."""
    found = []
    if any(record["nan"] for record in records):
        counted = ", ".join(f"{r['model']} {r['strategy']}: {r['nan']}" for r in records if r["nan"])
        found.append(f"NaN logits, counted as wrong: {counted}")
    if any(record["beyond_training"] for record in records):
        found.append("* prompts longer than the model's training sequences")
    said = dict.fromkeys((record["model"], note) for record in records for note in record.get("notes", ()))
    return [*found, *(f"{model}: {note}" for model, note in said)]


def counts_line(record: dict) -> str:
    """What happened to a task's documents."""
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
    """A booktabs table."""
    import pandas

    frame = pandas.DataFrame(rows, columns=list(header))
    return frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(header) - 1))


# The paper's tables


class Column(NamedTuple):
    """Where a column's number comes from.

    measure: "score", an error kind of `jrt_recall.scoring`, or (SuperGLUE) a metric of lm-eval."""

    label: str
    task: str
    strategy: str
    protocol: str
    measure: str


class Table(NamedTuple):
    """A table of the paper: its columns, and percentages by model (SuperGLUE: by model and shots) in their order."""

    title: str
    columns: tuple[Column, ...]
    rows: dict[tuple[str, str], tuple[float, ...]]


@cache
def published_tables() -> dict[str, Table]:
    """All tables of `published.csv` by the names that `jrt report --layout` takes."""
    with (Path(__file__).parent / "published.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    tables = {}
    for name, members in groupby(lines, key=lambda line: line["table"]):
        columns: dict[Column, None] = {}  # in their order, each once
        rows: dict[tuple[str, str], tuple[float, ...]] = {}
        for line in members:
            columns[Column(line["column"], *(line[key] for key in Column._fields[1:]))] = None
            key = line["model"], line["shots"]
            rows[key] = (*rows.get(key, ()), float(line["percent"]))
        tables[name] = Table(TITLES[name], tuple(columns), rows)
    return tables


def published_row(table: Table, model: str, shots: str = "") -> tuple[float, ...] | None:
    """The paper's numbers for a model by hub id or folder, None where the paper has none.

    A label in brackets says how it was computed; the rule for short prompts in it chooses the row where a table has several."""
    name, _, label = model.partition(" [")
    name = name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf")
    for word in label.rstrip("]").split(", "):
        if (f"{name}[{word}]", shots) in table.rows:
            return table.rows[f"{name}[{word}]", shots]
    return table.rows.get((name, shots))


def layout_rows(
    table: Table, records: Sequence[dict], predictions: Sequence[dict], mixed: Mixture = NOTHING_MIXED
) -> Rows:
    """One of the paper's tables of recall from measured cells; wide tables have models as columns.

    mixed: marks for cells that were not measured as the others. Published values never stand beside generated documents, nor
    beside cells of another protocol."""
    of_cell = {cell_of(record): record for record in records}
    answered: dict[Cell, list[dict]] = {}
    for row in predictions:
        answered.setdefault(cell_of(row), []).append(row)
    scores = table.columns[0].measure == "score"
    lines = []
    for model in dict.fromkeys(record["model"] for record in records):
        cells = [Cell(model, column.task, column.strategy, column.protocol) for column in table.columns]
        if not any(cell in of_cell or cell in mixed.substitutes for cell in cells):
            continue
        read = [mixed.substitutes.get(cell, cell) for cell in cells]
        measured: list[float | None] = [
            _measured(column, of_cell.get(cell), answered.get(cell, []))
            for column, cell in zip(table.columns, read, strict=True)
        ]
        generated = any(of_cell[cell]["source"].startswith(GENERATED) for cell in read if cell in of_cell)
        known = None if generated else published_row(table, model)
        paper: list[float | None] = [None] * len(cells) if known is None else list(known)
        letters = [mixed.letters.get(cell, "") for cell in cells]
        if scores:
            measured.append(mean(measured))
            paper.append(mean(paper))
            letters.append("".join(dict.fromkeys(letters)) if measured[-1] is not None else "")
        other = [cell in mixed.substitutes for cell in cells] + [
            any(cell in mixed.substitutes for cell in cells)
        ] * scores
        paper = [None if substituted else value for value, substituted in zip(paper, other, strict=True)]
        texts = [
            beside(value, printed, letter) for value, printed, letter in zip(measured, paper, letters, strict=True)
        ]
        lines.append([model, *texts])
    labels = [column.label for column in table.columns] + ["average"] * scores
    if lines and len(labels) > _WIDE + 1:
        turned = [[label, *(line[place + 1] for line in lines)] for place, label in enumerate(labels)]
        return ("", *(line[0] for line in lines)), turned
    return ("model", *labels), lines


def super_glue_rows(table: Table, results: Sequence[dict]) -> Rows:
    """A table of SuperGLUE from what lm-eval wrote: a row for each model and number of examples.

    Published values stand only beside a whole validation split: generated documents have other numbers of them."""
    rows = []
    for found in sorted(results, key=_model_and_shots):
        model, shots, limit = _model_and_shots(found)
        paper = published_row(table, model, str(shots))
        cells = []
        for place, (_, task, _, _, metric) in enumerate(table.columns):
            value = found["results"].get(task, {}).get(f"{metric},none")
            whole = value is not None and found["n-samples"][task]["effective"] == SUPER_GLUE_SIZES[task]
            cells.append(beside(None if value is None else 100 * value, paper[place] if paper and whole else None))
        options = found["config"]["model_args"]
        settings = ", ".join(options[key] for key in ("short_prompt", "compat") if options.get(key))
        name = model + (f" [{settings}]" if settings else "") + (f", first {limit:.0f}" if limit else "")
        rows.append([name, str(shots), *cells])
    return ("model", "shots", *(column.label for column in table.columns)), rows


def _model_and_shots(found: dict) -> tuple[str, int, float]:
    shots = next(shots for task, shots in found["n-shot"].items() if task in SUPER_GLUE_SIZES)
    return found["model_name"], shots, found["config"]["limit"] or 0


def _measured(column: Column, record: Mapping | None, rows: Sequence[dict]) -> float | None:
    """Percent: a cell's score, or the share of its answers that are wrong in one way."""
    if record is None:
        return None
    if column.measure == "score":
        return 100 * record["score"]
    return 100 * sum(error_kind(row["prediction"], row["answers"]) == column.measure for row in rows) / len(rows)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, None where a value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def beside(measured: float | None, published: float | None, letter: str = "") -> str:
    """A cell: the measured value, its mark, and the published value in parentheses."""
    text = "-" if measured is None else f"{measured:.1f}{letter and ' ' + letter}"
    return text if published is None else f"{text} ({published:.1f})"
