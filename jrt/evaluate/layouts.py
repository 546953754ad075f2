"""The paper's tables that are not a grid of recall scores: 5 (latency), 7 (datasets), 10 (padding) and the mean gain.

Published values are those of arXiv 2407.05483, version of July 9, 2024, in parentheses beside the measured ones.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from jrt_recall import data
from jrt_recall.fixtures import SOURCE as GENERATED
from jrt_recall.protocols import GPT2, PUBLISHED
from jrt_recall.tokenizers import cutting_tokenizer, token_ids

from jrt.evaluate.folder import Cell, cell_of
from jrt.evaluate.tables import Rows, Table, beside, mean, published_row, published_tables, super_glue_rows

TITLES = {
    "table5": "Table 5: prefill latency in ms on one H100",
    "table7": "Table 7: documents and their mean length in GPT-2 tokens",
    "table10": "Table 10: padding that linear attention does not mask, SuperGLUE 5-shot",
    "mean-gain": "Mean gain of JRT-Prompt over the default prompt, points of Table 1's average",
}
PROFILE = "lin_attn_profile.json"

# Table 7: examples, mean tokens of a document. The paper's NQ is whole articles; nq_512 ... are cut beforehand.
_DOCUMENTS = {
    "fda": (1102, 1999.9),
    "swde": (1111, 1036.1),
    "squad": (2984, 151.9),
    "triviaqa": (1698, 310.1),
    "drop": (2084, 236.6),
    **dict.fromkeys(("nq_512", "nq_1024", "nq_2048"), (3157, None)),
}
# Table 10, "+ no pad mask", in the order of Table 8's columns.
_NO_PAD_MASK = (49.1, 55.4, 38.2, 56.0, 56.3, 26.7, 25.8, 51.6, 49.7, 40.4)
_TABLE_10_NOTE = (
    "The JRT-RNN row that the paper prints in Table 10 repeats Table 8's Based row, so JRT-RNN has no published value here. "
    "No option of this package leaves pads of the encoder unmasked, so the row without mask is the paper's alone."
)


def latency(paths: Sequence[Path]) -> tuple[Rows, list[str]]:
    """Table 5 from the file that `benchmarks/lin_attn_profile.py` wrote, with notes.

    Raises ValueError for several files or none: timings of two runs do not stand in one table."""
    files = [path / PROFILE if path.is_dir() else path for path in paths]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(
            f"{TITLES['table5']} is made of one {PROFILE}: make it with `python benchmarks/lin_attn_profile.py` on a GPU"
        )
    content = json.loads(files[0].read_text(encoding="utf-8"))
    if content.get("benchmark") != "lin_attn_profile":
        raise ValueError(
            f"{files[0]} was not written by benchmarks/lin_attn_profile.py: its `benchmark` says otherwise"
        )
    with (Path(__file__).parent / "published_latency.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    published = {(line["method"], int(line["batch"]), int(line["length"])): line["ms"] for line in lines}
    names = {line["implementation"]: line["method"] for line in lines}
    measured = {(row["method"], row["shape"]["B"], row["shape"]["N"]): row for row in content["rows"]}
    shapes = [(16, length) for length in (2048, 4096, 8192, 16384, 32768)]
    shapes += [(batch, 16384) for batch in (2, 4, 8, 32, 64)]
    rows = []
    for implementation, method in names.items():
        cells = [measured.get((method, *shape)) for shape in shapes]
        texts = ["-" if cell is None or cell["ms"] is None else f"{cell['ms']:.2f}" for cell in cells]
        paper = [published.get((method, *shape)) for shape in shapes]
        beside_paper = [text if ms is None else f"{text} ({ms})" for text, ms in zip(texts, paper, strict=True)]
        rows.append([f"{implementation} [{method}]", *beside_paper])
    in_table = [row for row in content["rows"] if (row["shape"]["B"], row["shape"]["N"]) in shapes]
    absent = {row["method"]: row["reason"] for row in in_table if row["ms"] is None and row["method"] in names.values()}
    notes = [
        f"measured on {content['device']}, {content['date']}, commit {content['commit']}",
        *(f"missing: {method}: {reason}" for method, reason in absent.items()),
        *(
            f"missing: {m}: no row in the profile"
            for m in names.values()
            if all((m, *s) not in measured for s in shapes)
        ),
        "The paper's rows are its own implementations; the measured ones stand in brackets. Its FlashAttention-2 at batch 8 "
        "could not be read from the source.",
    ]
    return (("implementation [measured]", *(f"B {batch}, N {length}" for batch, length in shapes)), rows), notes


def datasets(paths: Sequence[Path]) -> tuple[Rows, list[str]]:
    """Table 7 from a mirror of the published datasets, with notes. Nothing published stands beside generated documents.

    Raises ValueError for no mirror, and for one without any dataset."""
    if len(paths) != 1 or not (paths[0] / data.MANIFEST).is_file():
        raise ValueError(
            f"{TITLES['table7']} is made of the datasets' mirror: name one folder that `jrt data fetch --folder FOLDER` made"
        )
    there = [name for name in PUBLISHED if (paths[0] / f"{name}.jsonl").is_file()]
    if not there:
        raise ValueError(f"{paths[0]} holds no dataset: `jrt data fetch --folder {paths[0]}` fills it")
    tokenizer = cutting_tokenizer(GPT2, paths[0])
    rows = []
    for name in there:
        documents = data.load(name, paths[0])
        lengths = [
            len(token_ids(tokenizer, row["context"] if "context" in row else row["text"])) for row in documents.rows
        ]
        count, tokens = (None, None) if documents.source.startswith(GENERATED) else _DOCUMENTS[name]
        examples = f"{len(lengths)}" if count is None else f"{len(lengths)} ({count})"
        rows.append([name, examples, beside(sum(lengths) / len(lengths), tokens)])
    missing = [f"missing: {name}.jsonl" for name in PUBLISHED if name not in there]
    return (("dataset", "examples", "mean tokens"), rows), missing


def padding(results: Sequence[dict]) -> tuple[Rows, list[str]]:
    """Table 10 from what lm-eval wrote of 5-shot runs, with notes. Raises ValueError where there is none."""
    table = published_tables()["table8"]
    unpublished = Table(TITLES["table10"], table.columns, {})
    header, rows = super_glue_rows(unpublished, results)
    kept = [row for row in rows if row[1] == "5"]
    if not kept:
        raise ValueError(
            f"{TITLES['table10']}: missing a run with 5 examples: architecture_scripts/super_glue.sh makes it"
        )
    published = ["JRT-RNN, no pad mask (the paper's)", "5", *(f"({value:.1f})" for value in _NO_PAD_MASK)]
    return (header, [*kept, published]), [_TABLE_10_NOTE]


def mean_gain(records: Sequence[dict]) -> tuple[Rows, list[str]]:
    """The paper's headline from runs of Table 1: mean and standard deviation over models, with notes.

    A model counts where all twelve cells of Table 1 were measured. Raises ValueError where none does, and says what is
    missing."""
    table = published_tables()["table1"]
    scores = {cell_of(record): 100 * record["score"] for record in records}
    generated = any(record["source"].startswith(GENERATED) for record in records)
    rows: list[list[str]] = []
    gains: list[float] = []
    published: list[float] = []
    missing = []
    for model in dict.fromkeys(record["model"] for record in records):
        cells = {(c.label, c.strategy): scores.get(Cell(model, c.task, c.strategy, c.protocol)) for c in table.columns}
        absent = [label for (label, _), score in cells.items() if score is None]
        if absent:
            missing.append(f"missing: {model}: {', '.join(absent)}")
            continue
        once, twice = (
            mean([s for (_, strategy), s in cells.items() if strategy == name]) for name in ("once", "twice")
        )
        assert once is not None and twice is not None
        paper = None if generated else published_row(table, model)
        before = after = None
        if paper is not None:
            before, after = sum(paper[::2]) / 6, sum(paper[1::2]) / 6
            published.append(after - before)
        gains.append(twice - once)
        known = None if before is None or after is None else after - before
        rows.append([model, beside(once, before), beside(twice, after), beside(gains[-1], known)])
    if not rows:
        raise ValueError(f"no run holds all of Table 1 for a model: {'; '.join(missing) or 'no cell at all'}")
    total = spread(gains) + (f" ({spread(published)})" if len(published) == len(gains) else "")
    rows.append([f"mean and standard deviation, models: {len(gains)}", "", "", total])
    every = [sum(row[1::2]) / 6 - sum(row[::2]) / 6 for row in table.rows.values()]
    notes = [f"The paper: {spread(every)} over the {len(every)} rows of its Table 1, the two of attention among them."]
    return (("model", "once", "twice", "gain"), rows), [*missing, *notes]


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; of one value, the value."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}"


def missing_runs(table: Table, records: Sequence[dict]) -> list[str]:
    """For each model of a table of recall, the cells that no run holds, with the command that makes them."""
    run = {cell_of(record) for record in records}
    lines = []
    for model in dict.fromkeys(record["model"] for record in records):
        wanted: dict[tuple[str, str], list[str]] = {}
        cells = {Cell(model, column.task, column.strategy, column.protocol) for column in table.columns}
        if not cells & run:
            continue
        for _, task, strategy, protocol in sorted(cells - run):
            wanted.setdefault((strategy, protocol), []).append(task)
        name = model.partition(" [")[0]
        lines += [
            f"missing: jrt eval --model {name} --tasks {','.join(tasks)} --strategy {strategy} --protocol {protocol}"
            for (strategy, protocol), tasks in wanted.items()
        ]
    return lines + _missing_rules(table, {record["model"] for record in records})


def _missing_rules(table: Table, models: set[str]) -> list[str]:
    """Of a table with a row for each rule for short prompts (Table 4): the rules that no run of the model has."""
    rules = dict.fromkeys(name.partition("[")[2].rstrip("]") for name, _ in table.rows if "[" in name)
    found: dict[str, set[str]] = {}
    for model in models if rules else ():
        name, _, label = model.partition(" [")
        found.setdefault(name, set()).update(label.rstrip("]").split(", "))
    return [
        f"missing: jrt eval --model {name} --short-prompt {rule} ..., into another folder"
        for name, seen in sorted(found.items())
        for rule in rules
        if rule not in seen
    ]
