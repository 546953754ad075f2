"""The paper's tables with measured values: recall (Tables 1 to 4, 13, 14), the mean gain, latency (5) and datasets (7).

The paper's own values (arXiv 2407.05483, version of July 9, 2024) stand in parentheses beside the measured ones. The
tables of SuperGLUE are in `super_glue`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from jrt_recall import data
from jrt_recall.fixtures import SOURCE as GENERATED
from jrt_recall.protocols import GPT2, PUBLISHED
from jrt_recall.scoring import error_kind
from jrt_recall.tokenizers import cutting_tokenizer, token_ids

from jrt.evaluate.folder import Results, by_item
from jrt.evaluate.shapes import Kinds, check
from jrt.evaluate.tables.mixtures import limited, mixture, unlike
from jrt.evaluate.tables.published import (
    TITLES,
    Column,
    Table,
    published_lines,
    published_row,
    published_tables,
    split_label,
)
from jrt.evaluate.tables.results import Rows, beside, mean
from jrt.evaluate.tables.super_glue import padding, super_glue
from jrt.short_prompts import SHORT_PROMPTS
from jrt.system.files import read_object

PROFILE = "lin_attn_profile.json"
PROFILE_FIELDS: Kinds = {"rows": list, "device": str, "date": str, "commit": str}
NO_ROW = {"ms": None, "reason": "no row in the profile"}
_WIDE = 9  # a table with more columns is printed transposed: a column for each model


def latency(paths: Sequence[Path]) -> tuple[Rows, list[str]]:
    """Table 5, from the file that `benchmarks/lin_attn_profile.py` wrote; and the notes below it.

    paths: that file, or its folder. Raises ValueError unless there is exactly one file: timings of two runs are not
    mixed."""
    files = [path / PROFILE if path.is_dir() else path for path in paths]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(
            f"{TITLES['table5']} is made of one {PROFILE}: make it with `python benchmarks/lin_attn_profile.py` on a GPU"
        )
    content = read_object(files[0])
    if content.get("benchmark") != "lin_attn_profile":
        raise ValueError(
            f"{files[0]} was not written by benchmarks/lin_attn_profile.py: its `benchmark` says otherwise"
        )
    check(str(files[0]), content, PROFILE_FIELDS, PROFILE_FIELDS)
    lines = published_lines("published_latency.csv")
    published = {(line["method"], int(line["batch"]), int(line["length"])): line["ms"] for line in lines}
    measured = {(row["method"], row["shape"]["B"], row["shape"]["N"]): row for row in content["rows"]}
    shapes = list(dict.fromkeys((int(line["batch"]), int(line["length"])) for line in lines))
    rows = []
    notes = [f"measured on {content['device']}, {content['date']}, commit {content['commit']}"]
    for implementation, method in {line["implementation"]: line["method"] for line in lines}.items():
        found = [measured.get((method, *shape), NO_ROW) for shape in shapes]
        texts = ["-" if row["ms"] is None else f"{row['ms']:.2f}" for row in found]
        paper = [published.get((method, *shape)) for shape in shapes]
        beside_paper = [text if ms is None else f"{text} ({ms})" for text, ms in zip(texts, paper, strict=True)]
        rows.append([f"{implementation} [{method}]", *beside_paper])
        reasons = [row["reason"] for row in found if row["ms"] is None and row is not NO_ROW]
        if reasons or all(row is NO_ROW for row in found):
            notes.append(f"missing: {method}: {[NO_ROW['reason'], *reasons][-1]}")
    notes.append(
        "The paper's rows are its own implementations; the measured ones stand in brackets. Its FlashAttention-2 at batch 8 "
        "could not be read from the source."
    )
    return (("implementation [measured]", *(f"B {batch}, N {length}" for batch, length in shapes)), rows), notes


def datasets(paths: Sequence[Path]) -> tuple[Rows, list[str]]:
    """Table 7, from a mirror folder of the published datasets; and the notes below it.

    Generated documents get no published value beside them, and nq_512 ... no mean: the paper's is that of whole
    articles. Raises ValueError if `paths` is not one mirror with a
    dataset."""
    if len(paths) != 1 or not (paths[0] / data.MANIFEST).is_file():
        raise ValueError(
            f"{TITLES['table7']} is made of the datasets' mirror: name one folder that `jrt data fetch --folder FOLDER` made"
        )
    there = [name for name in PUBLISHED if (paths[0] / f"{name}.jsonl").is_file()]
    if not there:
        raise ValueError(f"{paths[0]} holds no dataset: `jrt data fetch --folder {paths[0]}` fills it")
    tokenizer = cutting_tokenizer(GPT2, paths[0])
    published = {line["dataset"]: line for line in published_lines("published_datasets.csv")}
    rows = []
    for name in there:
        documents = data.load(name, paths[0])
        lengths = [
            len(token_ids(tokenizer, row["context"] if "context" in row else row["text"])) for row in documents.rows
        ]
        paper = {} if documents.source.startswith(GENERATED) else published[name]
        examples = f"{len(lengths)} ({paper['examples']})" if paper else f"{len(lengths)}"
        tokens = float(paper["tokens"]) if paper.get("tokens") else None
        rows.append([name, examples, beside(sum(lengths) / len(lengths), tokens)])
    missing = [f"missing: {name}.jsonl" for name in PUBLISHED if name not in there]
    return (("dataset", "examples", "mean tokens"), rows), missing


def mean_gain(results: Results) -> tuple[Rows, list[str]]:
    """The gain in accuracy from reading twice, averaged over the tasks of Table 1, for each model; and the notes below
    it.

    The last row has mean and standard deviation over models. A model counts if all twelve of its cells of Table 1 were
    measured. Raises ValueError, with the missing runs, if no model counts."""
    table = published_tables()["table1"]
    missing, run = missing_runs(table, results), results.by_cell
    generated = any(record["source"].startswith(GENERATED) for record in results.records)
    rows: list[list[str]] = []
    gains: list[float] = []
    published: list[float] = []
    for model in results.models:
        found = [run.get(cell) for cell in table.cells(model)]
        own = [100 * record["score"] for record in found if record is not None]
        if len(own) < len(found):
            continue
        paper = None if generated else published_row(table, model)
        measured, printed = _gain(own), (None, None, None) if paper is None else _gain(paper)
        rows.append([model, *map(beside, measured, printed)])
        gains.append(measured[-1])
        published += [] if printed[-1] is None else [printed[-1]]
    if not rows:
        raise ValueError(f"no run holds all of Table 1 for a model; {'; '.join(missing) or 'no cell of it at all'}")
    total = spread(gains) + (f" ({spread(published)})" if len(published) == len(gains) else "")
    rows.append([f"mean and standard deviation, models: {len(gains)}", "", "", total])
    every = [_gain(row)[-1] for row in table.rows.values()]
    note = f"The paper: {spread(every)} over the {len(every)} rows of its Table 1, the two of attention among them."
    return (("model", "once", "twice", "gain"), rows), [*missing, note, *_told(table, results), *unlike(results)]


def _gain(row: Sequence[float]) -> tuple[float, float, float]:
    """Of a row of Table 1, whose columns alternate between one reading and two: both means and their difference."""
    once, twice = statistics.fmean(row[::2]), statistics.fmean(row[1::2])
    return once, twice, twice - once


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation as text; for one value, the value alone."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}"


def layout_rows(table: Table, results: Results) -> tuple[Rows, list[str]]:
    """One of the paper's tables of recall, with measured values, and the notes below it; wide tables have a column for
    each model.

    Cells that were not measured like the others have a mark. A published value stands only beside a cell of the same
    protocol and of published documents."""
    mixed, run = mixture(table, results), results.by_cell
    answered = by_item(results.predictions)
    scores = table.columns[0].measure == "score"
    lines = []
    for model in results.models:
        cells = table.cells(model)
        read = [mixed.read.get(cell) for cell in cells]
        if not any(read):
            continue
        measured = [
            None if cell is None else _measured(column, run[cell], answered[cell].values())
            for column, cell in zip(table.columns, read, strict=True)
        ]
        generated = any(run[cell]["source"].startswith(GENERATED) for cell in read if cell is not None)
        known = None if generated else published_row(table, model)
        paper = [
            known[place] if known is not None and read[place] in (cell, None) else None
            for place, cell in enumerate(cells)
        ]
        letters = [mixed.letters.get(cell, "") for cell in cells]
        if scores:
            letters.append("" if None in measured else "".join(dict.fromkeys(letters)))
            measured.append(mean(measured))
            paper.append(mean(paper))
        lines.append([model, *map(beside, measured, paper, letters)])
    notes = [*mixed.reasons, *missing_runs(table, results), *_told(table, results)]
    labels = [column.label for column in table.columns] + ["average"] * scores
    if lines and len(labels) > _WIDE + 1:
        turned = [[label, *(line[place + 1] for line in lines)] for place, label in enumerate(labels)]
        return (("", *(line[0] for line in lines)), turned), notes
    return (("model", *labels), lines), notes


def _measured(column: Column, record: Mapping, rows: Collection[dict]) -> float:
    """A cell's value in percent: its score, or the share of its answers with the column's kind of error."""
    if column.measure == "score":
        return 100 * record["score"]
    return 100 * sum(error_kind(row["prediction"], row["answers"]) == column.measure for row in rows) / len(rows)


def made_of(table: Table) -> str:
    """The cells that a table of recall is made of, in words."""
    return ", ".join(
        dict.fromkeys(f"{column.task} {column.strategy} under {column.protocol}" for column in table.columns)
    )


def missing_runs(table: Table, results: Results) -> list[str]:
    """For each model in a table of recall, the commands that measure the cells that no run holds.

    A cell that was only measured under another protocol, and stands in the table with a mark, counts as missing."""
    asked = {(column.task, column.strategy) for column in table.columns}
    models = list(dict.fromkeys(cell.model for cell in results.by_cell if (cell.task, cell.strategy) in asked))
    # Table 4 has a row for each rule for short prompts.
    seen = {(name, word) for name, settings in map(split_label, models) for word in settings}
    rules = dict.fromkeys(rule for name, _ in table.rows for rule in split_label(name)[1])
    for name in dict.fromkeys(split_label(model)[0] for model in models):
        models += [f"{name} [{rule}]" for rule in rules if (name, rule) not in seen]
    lines = []
    for model in models:
        wanted: dict[tuple[str, str], list[str]] = {}
        for cell in sorted(set(table.cells(model)) - results.by_cell.keys()):
            wanted.setdefault((cell.strategy, cell.protocol), []).append(cell.task)
        lines += [
            f"missing: jrt eval --model {_options(model)} --tasks {','.join(tasks)} --strategy {strategy} "
            f"--protocol {protocol} --output FOLDER"
            for (strategy, protocol), tasks in wanted.items()
        ]
    return lines


def _told(table: Table, results: Results) -> list[str]:
    """A line for each model that could not be run in a cell of a table of recall, which no other run holds either; and
    a line if the cells were measured on a part of their tasks' items."""
    own = {column[1:4] for column in table.columns}
    lines = [
        f"missing: {cell.model}: could not be run: {why}"
        for cell, why in results.failed.items()
        if cell[1:] in own and cell not in results.by_cell
    ]
    return [*dict.fromkeys(lines), *limited(results)]


def _options(model: str) -> str:
    """Turns a model's label, `NAME [pad, bfloat16]`, into options: `NAME --short-prompt pad --dtype bfloat16`."""
    name, settings = split_label(model)
    options = {**dict.fromkeys(SHORT_PROMPTS, "--short-prompt"), "released": "--compat"}
    return " ".join([name, *(f"{options.get(word, '--dtype')} {word}" for word in settings)])


FROM_FILES: dict[str, Callable[[Sequence[Path]], tuple[Rows, list[str]]]] = {
    "table5": latency,
    "table7": datasets,
    "table8": lambda folders: super_glue(published_tables()["table8"], folders),
    "table9": lambda folders: super_glue(published_tables()["table9"], folders),
    "table10": padding,
}
"""The tables that are made from other files than runs of `jrt eval`: functions from paths to rows and lines below
them."""
