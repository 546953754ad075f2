"""The columns and printed values of the paper's tables.

`published.csv` holds the values (arXiv 2407.05483, version of July 9, 2024) as printed, in percent. A model is named
there by the last part of its hub id, in lower case, if its authors released it (`hazyresearch/JRT-360M-30B`,
`fla-hub/gla-1.3B-100B`, `state-spaces/mamba-1.4b`). These values may be compared only with the paper's own tasks,
prompt lengths and metric: never with `qa_*` tasks, generated documents, reference pages, or the mini models.
"""

from __future__ import annotations

import csv
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from jrt.evaluate.folder import Cell

TITLES = {
    "table1": "Table 1: default and JRT-Prompt",
    "table2": "Table 2: JRT-RNN (the paper's length-512 cells fill short prompts by reading again: short_prompt='repeat')",
    "table3": "Table 3: prompts of 2k tokens, beyond the encoder",
    "table4": "Table 4: rules for prompts shorter than the encoder",
    "table5": "Table 5: prefill latency in ms on one H100",
    "table7": "Table 7: documents and their mean length in GPT-2 tokens",
    "table8": "Table 8: SuperGLUE, 360M models",
    "table9": "Table 9: SuperGLUE, 1.3B models",
    "table10": "Table 10: padding that linear attention does not mask, SuperGLUE 5-shot",
    "table13": "Table 13: error modes, percent of all items",
    "table14": "Table 14: default, 2-shot and JRT-Prompt",
    "mean-gain": "Mean gain of JRT-Prompt over the default prompt, points of Table 1's average",
}
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
"""Number of documents in the validation split of each SuperGLUE task."""


class Column(NamedTuple):
    """Where a column's number comes from.

    measure: "score", an error kind of `jrt_recall.scoring`, or (SuperGLUE) a metric of lm-eval."""

    label: str
    task: str
    strategy: str
    protocol: str
    measure: str


class Table(NamedTuple):
    """A table of the paper. rows: by (model, shots), the percentages in the order of `columns`; shots is "" for
    recall."""

    title: str
    columns: tuple[Column, ...]
    rows: dict[tuple[str, str], tuple[float, ...]]

    def cells(self, model: str) -> list[Cell]:
        """The cells of a model in a table of recall, in the order of the columns."""
        return [Cell(model, column.task, column.strategy, column.protocol) for column in self.columns]


def published_lines(file: str) -> list[dict[str, str]]:
    """The lines of one of the files of published values, by the names of its columns."""
    with (Path(__file__).parent / file).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@cache
def published_tables() -> dict[str, Table]:
    """All tables of `published.csv` by the names that `jrt report --layout` takes."""
    tables = {}
    for name, members in groupby(published_lines("published.csv"), key=lambda line: line["table"]):
        columns: dict[Column, None] = {}  # in their order, each once
        rows: dict[tuple[str, str], tuple[float, ...]] = {}
        for line in members:
            columns[Column(line["column"], *(line[key] for key in Column._fields[1:]))] = None
            key = line["model"], line["shots"]
            rows[key] = (*rows.get(key, ()), float(line["percent"]))
        tables[name] = Table(TITLES[name], tuple(columns), rows)
    return tables


def split_label(model: str) -> tuple[str, list[str]]:
    """A model's name and its settings, from its label in a report: `NAME [pad, bfloat16]`."""
    name, _, label = model.partition(" [")
    return name, label.rstrip("]").split(", ") if label else []


def published_row(table: Table, model: str, shots: str = "") -> tuple[float, ...] | None:
    """The paper's numbers for a model, in the order of the table's columns; None if the paper has none.

    model: its label; the name is a hub id or a folder. In a table with a row for each rule for short prompts, the rule
    among the settings selects the row."""
    name, settings = split_label(model)
    name = name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf")
    rows = [f"{name} [{word}]" for word in settings]
    return next((table.rows[row, shots] for row in (*rows, name) if (row, shots) in table.rows), None)
