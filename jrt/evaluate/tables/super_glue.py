"""The paper's Tables 8, 9 and 10 (SuperGLUE), from the result files of lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jrt.evaluate.tables.mixtures import differences, lettered
from jrt.evaluate.tables.published import SUPER_GLUE_SIZES, TITLES, Column, Table, published_row, published_tables
from jrt.evaluate.tables.results import Rows, beside
from jrt.system.files import read_object

_TABLE_10_NOTE = (
    "The JRT-RNN row that the paper prints in Table 10 repeats Table 8's Based row, so JRT-RNN has no published value here. "
    "No option of this package leaves pads of the encoder unmasked, so the row without mask is the paper's alone."
)


def super_glue(table: Table, folders: Sequence[Path]) -> tuple[Rows, list[str]]:
    """Table 8 or 9, and the lines below it: the reason of each mark, and the commands of missing runs.

    folders: where lm-eval wrote its results. Raises ValueError if none of them holds results of SuperGLUE."""
    results = _results(folders)
    rows, reasons = super_glue_rows(table, results)
    return rows, [*reasons, *_missing(table, results)]


def padding(folders: Sequence[Path]) -> tuple[Rows, list[str]]:
    """Table 10: runs with 5 examples, and the lines below it. Raises ValueError if there is no such run."""
    results = [found for found in _results(folders) if _shots(found) == 5]
    if not results:
        raise ValueError(
            f"{TITLES['table10']}: missing a run with 5 examples: architecture_scripts/super_glue.sh makes it"
        )
    table = published_tables()["table10"]
    (header, rows), reasons = super_glue_rows(table, results)
    values = [f"({value:.1f})" for row in table.rows.values() for value in row]
    return (header, [*rows, ["JRT-RNN, no pad mask (the paper's)", "5", *values]]), [*reasons, _TABLE_10_NOTE]


def super_glue_rows(table: Table, results: Sequence[dict]) -> tuple[Rows, list[str]]:
    """A row for each model and number of examples, and the lines below the table.

    A published value stands only beside a score on the whole validation split. Generated documents have other sizes. A
    cell has a mark if its dtype, package or task version is not the most common one of its column."""
    results = sorted(results, key=_order)
    said: dict[tuple[int, int], list[str]] = {}
    for place, column in enumerate(table.columns):
        measured = [row for row, found in enumerate(results) if _score(found, column) is not None]
        said |= differences({(row, place): _settings(results[row], column.task) for row in measured})
    letters, reasons = lettered(said)
    rows = []
    for row, found in enumerate(results):
        paper = published_row(table, found["model_name"], str(_shots(found)))
        cells = []
        for place, column in enumerate(table.columns):
            score = _score(found, column)
            whole = score is not None and found["n-samples"][column.task]["effective"] == SUPER_GLUE_SIZES[column.task]
            published = paper[place] if paper and whole else None
            cells.append(beside(score, published, letters.get((row, place), "")))
        rows.append([_row_name(found), str(_shots(found)), *cells])
    return (("model", "shots", *(column.label for column in table.columns)), rows), reasons


def _results(folders: Sequence[Path]) -> list[dict]:
    """The contents of lm-eval's result files that hold SuperGLUE. Raises ValueError if there are none."""
    files = (file for folder in folders for file in sorted(folder.rglob("results_*.json")))
    results = [found for found in map(read_object, files) if SUPER_GLUE_SIZES.keys() & found.get("results", {}).keys()]
    if not results:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: no results of SuperGLUE; make some with architecture_scripts/super_glue_tables.sh")
    return results


def _score(found: dict, column: Column) -> float | None:
    """A cell's score in percent; None if the run does not have it."""
    value = found["results"].get(column.task, {}).get(f"{column.measure},none")
    return None if value is None else 100 * value


def _order(found: dict) -> tuple[str, int, float]:
    return found["model_name"], _shots(found), found["config"]["limit"] or 0


def _shots(found: dict) -> int:
    return next(shots for task, shots in found["n-shot"].items() if task in SUPER_GLUE_SIZES)


def _options(found: dict) -> dict[str, str]:
    """The options of a run that change a model's scores."""
    given = found["config"]["model_args"]
    return {name: given[name] for name in ("short_prompt", "compat") if given.get(name)}


def _row_name(found: dict) -> str:
    settings, limit = ", ".join(_options(found).values()), found["config"]["limit"] or 0
    return found["model_name"] + (f" [{settings}]" if settings else "") + (f", first {limit:.0f}" if limit else "")


def _settings(found: dict, task: str) -> dict[str, str]:
    """The dtype and versions with which a cell was computed, as far as lm-eval's file has them."""
    said = {
        "dtype": found["config"].get("model_dtype"),
        "lm-eval": found.get("lm_eval_version"),
        "transformers": found.get("transformers_version"),
        f"version of {task}": found.get("versions", {}).get(task),
    }
    return {name: str(value) for name, value in said.items() if value is not None}


def _missing(table: Table, results: Sequence[dict]) -> Iterator[str]:
    """For each model and its options, the command of each run that the table still lacks."""
    wanted = dict.fromkeys(column.task for column in table.columns)
    by_model: dict[str, dict[int, set[str]]] = {}
    for found in results:
        model = ",".join([found["model_name"], *(f"{name}={value}" for name, value in _options(found).items())])
        by_model.setdefault(model, {}).setdefault(_shots(found), set()).update(found["results"])
    for model, runs in sorted(by_model.items()):
        for shots in sorted({int(shots) for _, shots in table.rows}):
            lacking = [task for task in wanted if task not in runs.get(shots, ())]
            tasks = "recall_super_glue" if len(lacking) == len(wanted) else ",".join(lacking)
            if lacking:
                yield (
                    f"missing: jrt lm-eval --model jrt --model_args pretrained={model} --tasks {tasks} "
                    f"--num_fewshot {shots} --output_path FOLDER"
                )
