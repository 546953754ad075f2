"""The paper's tables of SuperGLUE from what lm-eval wrote (`architecture_scripts/super_glue.sh`), published values beside.

Published values stand only beside a whole validation split: generated documents have other numbers of them.
"""

import csv
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from jrt.evaluate.collect import latex
from jrt.evaluate.files import write_text
from jrt.evaluate.published import SUPER_GLUE_TABLES, Choices, row_name
from jrt.evaluate.tables import aligned

FILES = ("super_glue.tex", "super_glue.csv")
SIZES = {
    "boolq": 3270,
    "cb": 56,
    "copa": 100,
    "multirc": 4848,
    "recall_record": 10000,
    "sglue_rte": 277,
    "wic": 638,
    "wsc": 104,
}
"""Documents of the validation splits."""


def collect(folders: Sequence[Path], output: Path, layout: str) -> str:
    """Writes FILES to `output` and returns the table as text. Raises ValueError where no result of SuperGLUE is found."""
    table = SUPER_GLUE_TABLES[layout]
    header, rows = table_rows(table, _results(folders))
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / FILES[0], latex(header, rows))
    stream = StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    write_text(output / FILES[1], stream.getvalue())
    return f"{table.title}\nmeasured (published), percent\n\n{aligned(header, rows)}\n"


def table_rows(table: Choices, results: Sequence[dict]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header, and a row for each model and number of examples."""
    rows = []
    for found in sorted(results, key=_key):
        model, shots, limit = _key(found)
        published = table.rows.get((row_name(model), shots))
        cells = []
        for place, (_, task, metric) in enumerate(table.columns):
            value = found["results"].get(task, {}).get(f"{metric},none")
            text = "-" if value is None else f"{100 * value:.1f}"
            whole = value is not None and found["n-samples"][task]["effective"] == SIZES[task]
            cells.append(f"{text} ({published[place]:.1f})" if published and whole else text)
        name = (
            model + (f" [{_settings(found)}]" if _settings(found) else "") + (f", first {limit:.0f}" if limit else "")
        )
        rows.append([name, str(shots), *cells])
    return ("model", "shots", *(label for label, _, _ in table.columns)), rows


def _results(folders: Sequence[Path]) -> list[dict]:
    found = []
    for folder in folders:
        for file in sorted(folder.rglob("results_*.json")):
            content = json.loads(file.read_text(encoding="utf-8"))
            if SIZES.keys() & content.get("results", {}).keys():
                found.append(content)
    if not found:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: no results of SuperGLUE; make some with architecture_scripts/super_glue.sh")
    return found


def _key(found: dict) -> tuple[str, int, float]:
    shots = next(shots for task, shots in found["n-shot"].items() if task in SIZES)
    return found["model_name"], shots, found["config"]["limit"] or 0


def _settings(found: dict) -> str:
    arguments = found["config"]["model_args"]
    return ", ".join(arguments[key] for key in ("short_prompt", "compat") if arguments.get(key))
