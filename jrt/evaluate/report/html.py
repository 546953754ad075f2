"""An HTML page for one run or several: tables, figures, and single items with the correct answer marked in their text.

The page needs no other file. Its template escapes all text that comes from a dataset or a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from jrt.evaluate.folder import Results
from jrt.evaluate.report import plots
from jrt.evaluate.tables.results import HEADER, Rows, comparison_row, result_row, sections
from jrt.system.files import write_text

SHOWN_ITEMS = 100
MEASURED_PUBLISHED = "measured (published), percent"


def write_page(title: str, output: Path, results: Results, paper: tuple[str, Rows] | None = None) -> None:
    """Writes report.html and the figures, each as PNG and SVG, to `output`.

    paper: title and rows of one of the paper's tables."""
    figures = plots.draw(results)
    plots.save(figures, output)
    write_text(output / "report.html", page(title, results, figures.values(), paper))


def page(title: str, results: Results, figures: Iterable[plots.Drawn], paper: tuple[str, Rows] | None = None) -> str:
    """The page's HTML. SHOWN_ITEMS questions are shown with all answers; other arguments as in `write_page`."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"marked": marked, "comparison_row": comparison_row, "result_row": result_row}
    shown, total, tasks = _chosen_items(results.predictions, SHOWN_ITEMS)
    return environment.get_template("report.html.jinja").render(
        title=title,
        header=HEADER,
        sections=sections(results),
        paper=paper,
        paper_note=MEASURED_PUBLISHED,
        figures=[(figure.heading, Markup(figure.svg)) for figure in figures],
        compared=results.comparisons,
        items=shown,
        total=total,
        tasks=tasks,
        manifest=json.dumps(results.manifest, indent=2, ensure_ascii=False),
    )


def _chosen_items(predictions: Sequence[dict], count: int) -> tuple[list[dict[str, Any]], int, list[str]]:
    """The first `count` items with all their answers, the number of all items, and the tasks.

    Tasks alternate. Within a task, the items on which the cells disagree come first."""
    tasks: dict[str, dict[tuple[str, str], list[dict]]] = {}
    for row in predictions:
        tasks.setdefault(row["task"], {}).setdefault((row["protocol"], row["id"]), []).append(row)
    queues = [sorted(items.values(), key=lambda rows: len({r["score"] for r in rows}) < 2) for items in tasks.values()]
    turns = [rows for turn in zip_longest(*queues) for rows in turn if rows is not None]
    return [_shown(rows) for rows in turns[:count]], len(turns), list(tasks)


def _shown(rows: list[dict]) -> dict[str, Any]:
    first, scores = rows[0], {row["score"] for row in rows}
    kind = "differ" if len(scores) > 1 else ("right" if scores == {1} else "wrong")
    context, question = split_question(first["prompt"])
    return {"first": first, "rows": rows, "kinds": f"{first['task']} {kind}", "context": context, "question": question}


def split_question(prompt: str) -> tuple[str, str]:
    """Splits a prompt into context and question: the question is the last line, or, if that is long, the last
    sentence."""
    context, line_end, last = prompt.rpartition("\n")
    if last == "Answer:":  # the format of the qa_ tasks: the question stands on the line before
        context, line_end, asked = context.rpartition("\n")
        last = f"{asked} {last}"
    if line_end and len(last) <= 300:
        return context, last
    context, stop, last = prompt.rpartition(". ")
    return (context + stop, last) if stop else ("", prompt)


def marked(text: str, answers: Sequence[str]) -> Markup:
    """`text` as escaped HTML. Of the first answer that occurs in it, every occurrence is marked."""
    for answer in answers:
        parts = re.split(f"({re.escape(answer)})", text, flags=re.IGNORECASE) if answer else [text]
        if len(parts) > 1:
            return Markup("").join(
                Markup("<mark>{}</mark>").format(p) if n % 2 else escape(p) for n, p in enumerate(parts)
            )
    return escape(text)
