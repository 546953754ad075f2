"""The paper's tables of recall and of SuperGLUE (arXiv 2407.05483, version of July 9, 2024), as printed, in percent.

A row is named by the last part of the model's hub id where the authors released one (`hazyresearch/JRT-360M-30B`,
`fla-hub/gla-1.3B-100B`, `state-spaces/mamba-1.4b`), in lower case. Only the paper's own tasks, windows and metric may stand
beside these numbers: never `qa_*` tasks, generated documents, reference pages, or the mini models.
"""

from typing import NamedTuple


class Column(NamedTuple):
    """Where a column's number comes from. measure: "score", or an error kind of `jrt_recall.errors`."""

    label: str
    task: str
    strategy: str
    protocol: str
    measure: str = "score"


class Table(NamedTuple):
    """A table's columns, and its rows in the order of the columns, by model."""

    title: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float, ...]]


def _rows(text: str) -> dict[str, tuple[float, ...]]:
    lines = (line.split() for line in text.strip().splitlines())
    return {model: tuple(map(float, values)) for model, *values in lines}


_TASKS1 = (
    ("FDA", "fda"),
    ("SWDE", "swde"),
    ("NQ", "nq_1024"),
    ("SQuAD", "squad"),
    ("TriviaQA", "triviaqa"),
    ("DROP", "drop"),
)
_ERROR_TASKS = (("FDA", "fda"), ("SWDE", "swde"), ("SQuAD", "squad"))

TABLE1 = Table(
    "Table 1: default and JRT-Prompt",
    tuple(Column(f"{label} {s}", task, s, "jrt-table1") for label, task in _TASKS1 for s in ("once", "twice")),
    _rows("""
transformer++-1.3b-10b 74.4 86.1 41.4 52.5 28.2 31.9 39.0 53.1 49.5 49.3 22.3 33.6
mamba-1.3b-10b         23.3 40.3 15.5 31.8 19.4 25.8 26.6 48.5 46.4 51.1 21.3 32.1
based-1.3b-10b         48.6 58.9 27.6 44.7 19.7 28.4 31.0 46.7 44.1 51.9 19.5 34.6
attn-1b-50bn           83.7 89.2 50.8 65.0 32.8 37.5 41.1 58.1 56.6 58.8 21.5 37.9
mamba-1b-50b           41.9 55.7 32.6 45.4 26.9 33.9 31.5 53.5 54.9 56.7 20.4 33.8
based-1b-50b           60.2 68.3 37.1 54.0 29.4 35.2 38.9 56.3 54.5 57.6 21.7 39.1
gla-1.3b-100b          48.3 68.6 37.7 53.6 26.6 31.3 34.7 54.8 55.5 54.6 19.6 33.3
gla-2.7b-100b          47.1 65.8 43.6 54.5 27.1 32.9 37.2 55.7 57.9 57.0 22.2 34.0
mamba-130m             25.7 32.8 17.5 31.5 16.8 21.7 27.1 51.9 43.5 50.1 17.4 30.7
mamba-370m             41.9 58.3 27.6 42.2 23.8 31.1 34.9 51.0 53.6 51.7 19.3 33.2
mamba-1.4b             45.8 60.9 37.6 46.0 31.0 36.6 39.9 59.6 60.5 61.3 20.9 36.4
mamba-2.8b             54.3 66.6 38.9 48.9 33.5 40.1 43.9 59.4 66.2 63.9 19.8 36.9
mamba2-130m            32.2 50.9 29.5 43.3 20.6 28.9 30.4 47.0 43.7 47.2 18.0 34.0
mamba2-370m            60.8 76.7 38.3 52.1 26.6 33.6 35.3 51.8 54.6 54.7 22.4 36.3
mamba2-1.3b            66.8 74.7 50.0 59.6 33.6 40.5 42.9 59.6 63.8 62.4 23.2 36.6
mamba2-2.7b            68.7 81.6 55.2 60.8 34.4 41.7 45.4 59.4 66.4 66.5 23.0 42.5
"""),
)

TABLE2 = Table(
    "Table 2: JRT-RNN (the paper's length-512 cells fill short prompts by reading again: short_prompt='repeat')",
    (
        Column("FDA 512", "fda", "once", "jrt-table2-512"),
        Column("FDA 1024", "fda", "once", "jrt-table2-1024"),
        Column("SWDE 512", "swde", "once", "jrt-table2-512"),
        Column("SWDE 1024", "swde", "once", "jrt-table2-1024"),
        Column("NQ 512", "nq_512", "once", "jrt-table2-nq"),
        Column("NQ 1024", "nq_1024", "once", "jrt-table2-nq"),
        Column("SQuAD full", "squad", "once", "jrt-table2-2048"),
        Column("TriviaQA full", "triviaqa", "once", "jrt-table2-2048"),
        Column("DROP full", "drop", "once", "jrt-table2-2048"),
    ),
    _rows("""
attn-360m-30b          74.8 73.0 44.7 43.0 27.8 22.9 36.2 46.5 21.8
mamba-360m-30b         41.1 24.3 22.2 13.6 16.4 12.5 25.5 43.0 17.3
based-360m-30b         50.3 35.8 30.4 21.6 19.7 14.7 29.8 42.5 18.4
jrt-360m-30b           82.0 66.0 43.3 35.1 32.9 16.2 41.7 43.2 25.8
transformer++-1.3b-10b 75.3 71.5 41.6 41.0 29.6 25.8 38.7 48.8 22.6
mamba-1.3b-10b         37.4 23.3 23.0 15.1 19.6 16.1 26.1 45.7 20.9
based-1.3b-10b         66.3 49.0 32.3 26.3 19.7 15.7 30.7 44.2 19.1
jrt-1.3b-10b           78.5 60.6 38.5 32.7 26.5 16.7 51.6 44.8 28.4
attn-1b-50bn           85.6 83.5 55.7 56.0 33.4 29.9 40.1 56.6 21.4
mamba-1b-50b           55.4 40.1 44.0 33.7 27.6 23.2 32.2 54.5 20.7
based-1b-50b           69.3 58.8 47.6 40.4 29.1 24.4 38.5 54.3 20.8
jrt-1b-50b             86.7 67.7 49.4 45.7 38.3 25.4 50.4 53.0 29.3
"""),
)

TABLE3 = Table(
    "Table 3: prompts of 2k tokens, beyond the encoder",
    (
        Column("FDA 2k", "fda", "once", "jrt-table2-2048"),
        Column("SWDE 2k", "swde", "once", "jrt-table2-2048"),
        Column("NQ 2k", "nq_2048", "once", "jrt-table2-nq"),
    ),
    _rows("""
transformer++-360m-10b 65.2 41.0 23.0
mamba-360m-10b         12.4 13.4 12.4
based-360m-10b         19.1 18.9 13.9
jrt-360m-10b           28.4 26.1 15.4
attn-1b-50bn           79.7 55.5 30.2
mamba-1b-50b           21.0 29.9 23.1
based-1b-50b           36.1 37.7 23.4
jrt-1b-50b             55.2 41.4 26.2
"""),
)

TABLE4 = Table(
    "Table 4: rules for prompts shorter than the encoder",
    (
        Column("FDA 512", "fda", "once", "jrt-table2-512"),
        Column("SWDE 512", "swde", "once", "jrt-table2-512"),
        Column("NQ 512", "nq_512", "once", "jrt-table2-nq"),
    ),
    _rows("""
jrt-360m-30b[pad]      61.9 38.1 24.6
jrt-360m-30b[repeat]   82.0 43.3 32.9
jrt-360m-30b[iterate]  76.3 40.7 29.2
jrt-1b-50b[pad]        75.8 49.3 30.9
jrt-1b-50b[repeat]     86.7 49.4 38.3
jrt-1b-50b[iterate]    80.2 43.3 34.2
"""),
)

TABLE13 = Table(
    "Table 13: error modes, percent of all items",
    tuple(
        Column(f"{label} {strategy} {kind}", task, strategy, "jrt-table1", kind)
        for label, task in _ERROR_TASKS
        for strategy in ("once", "twice")
        for kind in ("no answer", "repetition", "irrelevant")
    ),
    _rows("""
mamba-370m 0.2 35.4 22.7 0.0 29.4 12.3 39.1 20.2 13.1 23.6 17.0 17.2 0.0 6.6 58.6 0.0 12.2 37.0
mamba-1.4b 0.1 31.1 23.0 0.1 29.2 9.8 37.3 17.3 7.8 28.0 15.0 11.1 0.0 5.9 54.2 0.1 10.7 30.0
mamba-2.8b 0.2 27.5 18.3 0.0 23.3 9.8 32.3 18.9 9.7 26.9 14.7 9.6 0.0 5.5 51.3 1.6 32.9 13.8
"""),
)

TABLE14 = Table(
    "Table 14: default, 2-shot and JRT-Prompt",
    tuple(
        Column(f"{label} {s}", task, s, "jrt-table1")
        for label, task in _ERROR_TASKS
        for s in ("once", "2shot", "twice")
    ),
    _rows("""
mamba-130m 25.7 22.0 32.8 17.5 19.7 31.5 27.1 25.2 51.9
mamba-370m 41.9 35.3 58.3 27.6 35.0 42.2 34.9 36.0 51.0
mamba-1.4b 45.8 46.0 60.9 37.6 47.1 46.0 39.9 45.5 59.6
mamba-2.8b 54.3 54.8 66.6 38.9 51.9 48.9 43.9 53.2 59.4
"""),
)

TABLES = {
    "table1": TABLE1,
    "table2": TABLE2,
    "table3": TABLE3,
    "table4": TABLE4,
    "table13": TABLE13,
    "table14": TABLE14,
}
"""All tables by the names that `jrt report --layout` takes."""


class Choices(NamedTuple):
    """A table of SuperGLUE: columns as (label, task, metric) of lm-eval; rows by model and number of examples."""

    title: str
    columns: tuple[tuple[str, str, str], ...]
    rows: dict[tuple[str, int], tuple[float, ...]]


def _choices(text: str) -> dict[tuple[str, int], tuple[float, ...]]:
    lines = (line.split() for line in text.strip().splitlines())
    return {(model, int(shots)): tuple(map(float, values)) for model, shots, *values in lines}


_RECORD = (("ReCoRD F1", "recall_record", "f1"), ("ReCoRD EM", "recall_record", "em"))
_SUPER_GLUE = (
    ("BoolQ", "boolq", "acc"),
    ("CB acc", "cb", "acc"),
    ("CB F1", "cb", "f1"),
    ("COPA", "copa", "acc"),
    ("MultiRC", "multirc", "acc"),
    *_RECORD,
    ("RTE", "sglue_rte", "acc"),
    ("WiC", "wic", "acc"),
    ("WSC", "wsc", "acc"),
)

TABLE8 = Choices(
    "Table 8: SuperGLUE, 360M models",
    _SUPER_GLUE,
    _choices("""
jrt-360m-30b   0 49.2 33.9 17.4 65.0 57.2 16.5 15.8 53.1 50.0 37.5
jrt-360m-30b   1 46.5 37.5 26.9 65.0 51.9 18.9 18.1 46.2 46.6 55.8
jrt-360m-30b   5 49.1 44.6 30.5 71.0 56.3 26.7 25.8 48.0 50.5 50.0
based-360m-30b 0 57.6 32.1 21.7 65.0 57.2 17.4 17.0 54.5 50.0 36.5
based-360m-30b 1 54.9 35.7 25.7 70.0 55.3 21.8 21.1 48.0 48.1 55.8
based-360m-30b 5 53.5 53.6 36.7 76.0 56.4 25.3 24.4 50.5 53.6 51.0
attn-360m-30b  0 59.3 41.1 24.1 68.0 57.2 14.6 14.2 54.9 50.0 36.5
attn-360m-30b  1 54.9 37.5 26.9 70.0 54.2 21.1 20.4 43.7 46.4 53.8
attn-360m-30b  5 49.1 46.4 30.9 68.0 55.2 23.7 23.0 52.7 51.1 52.9
mamba-360m-30b 0 56.4 35.7 25.8 68.0 57.2 27.2 26.6 53.4 50.0 36.5
mamba-360m-30b 1 51.1 41.1 28.5 70.0 52.3 25.8 25.1 50.2 46.4 55.8
mamba-360m-30b 5 50.0 51.8 34.8 70.0 54.5 23.2 22.5 46.9 50.3 51.0
"""),
)

TABLE9 = Choices(
    "Table 9: SuperGLUE, 1.3B models",
    tuple(column for column in _SUPER_GLUE if column not in _RECORD),
    _choices("""
jrt-1b-50b   0 57.4 33.9 22.4 74.0 57.2 52.7 50.0 36.5
jrt-1b-50b   5 52.1 50.0 34.5 75.0 53.9 49.8 50.0 55.8
based-1b-50b 0 55.1 41.1 19.4 71.0 56.8 53.1 50.0 53.8
based-1b-50b 5 52.5 50.0 33.7 75.0 51.4 49.1 53.1 53.8
attn-1b-50bn 0 57.6 41.1 28.8 72.0 56.0 54.2 50.0 53.8
attn-1b-50bn 5 54.8 41.1 26.2 73.0 51.7 57.4 50.3 47.1
mamba-1b-50b 0 54.8 25.0 25.2 73.0 56.4 51.3 50.0 40.4
mamba-1b-50b 5 55.6 53.6 45.5 75.0 53.7 53.8 51.7 56.7
"""),
)

SUPER_GLUE_TABLES = {"table8": TABLE8, "table9": TABLE9}
"""Tables whose measured values come from lm-eval's own results (`jrt report --layout table8`)."""


def published_row(table: Table, model: str) -> tuple[float, ...] | None:
    """The paper's numbers for a model by hub id or folder, None where the paper has none.

    A label in brackets says how it was computed; the rule for short prompts in it chooses the row where a table has several."""
    name, _, label = model.partition(" [")
    name = row_name(name)
    for word in label.rstrip("]").split(", "):
        if f"{name}[{word}]" in table.rows:
            return table.rows[f"{name}[{word}]"]
    return table.rows.get(name)


def row_name(model: str) -> str:
    """How the tables here name a model that is given by hub id or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf")
