"""`jrt report`: from finished runs to the paper's tables, figures and one HTML page; or SuperGLUE's tables from lm-eval's files.

The page needs no other file: tables, figures, and items to read with the found answer marked. The template escapes all text
that came from a dataset or a model.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from jrt.evaluate import layouts, mixtures, plots
from jrt.evaluate.folder import RESULTS, Cell, cell_of, read_run
from jrt.evaluate.run import comparisons
from jrt.evaluate.side_by_side import protocols_side_by_side
from jrt.evaluate.tables import (
    HEADER,
    SUPER_GLUE_SIZES,
    SUPER_GLUE_TABLES,
    TITLES,
    Rows,
    aligned,
    comparison_row,
    counts_line,
    latex,
    layout_rows,
    notes,
    percent,
    protocols_of,
    published_tables,
    result_row,
    results_text,
    super_glue_rows,
)
from jrt.files import write_bytes, write_text

FILES = (
    "results.csv",
    "table.tex",
    "predictions.parquet",
    *(f"{name}.{kind}" for name in ("accuracy", "state", "position") for kind in ("png", "svg")),
    "report.html",
)
SUPER_GLUE_FILES = ("super_glue.tex", "super_glue.csv")
SHOWN_ITEMS = 100
MEASURED_PUBLISHED = "measured (published), percent"


class Collected:
    """Records and predictions of several runs, as one. Raises ValueError where two runs hold the same cell."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.records: list[dict] = []
        self.predictions: list[dict] = []
        self.failed: dict[Cell, str] = {}  # cells without a number, and why
        protocols: dict[tuple[str, int], dict] = {}
        manifests: dict[str, dict] = {}
        self.settings: dict[Cell, mixtures.Settings] = {}
        """How each cell was computed."""
        for folder in folders:
            records, predictions, manifest = read_run(folder)
            labels = {model["name"]: _label(model) for model in manifest["identity"]["models"]}
            self.records += [{**record, "model": labels[record["model"]]} for record in records]
            settings = mixtures.settings_of(manifest)
            self.settings |= {
                cell_of(record)._replace(model=labels[record["model"]]): settings[record["model"]] for record in records
            }
            self.predictions += [{**row, "model": labels[row["model"]]} for row in predictions]
            known = manifest["identity"]["protocols"]
            protocols |= {(one["name"], one["version"]): one for one in known}
            manifests[folder.name] = manifest
            for cell in manifest.get("failed", ()):
                self.failed[cell_of(cell)._replace(model=labels[cell["model"]])] = cell["reason"]
        cells = [cell_of(record) for record in self.records]
        if repeated := sorted({cell for cell in cells if cells.count(cell) > 1}):
            raise ValueError(f"two runs hold {', '.join(repeated[0])}: collect one of them")
        self.manifest = {"identity": {"protocols": list(protocols.values())}, "runs": manifests}
        """All manifests, and the protocols that the tables name."""


def _label(model: dict) -> str:
    """A model's name with what else decides its scores."""
    extras = [model[key] for key in ("short_prompt", "compat") if model[key]]
    if model["dtype"] != "float32":
        extras.append(model["dtype"])
    return f"{model['name']} [{', '.join(extras)}]" if extras else model["name"]


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The folders themselves where they hold results, else the runs below them."""
    found = []
    for folder in folders:
        below = [folder] if (folder / RESULTS).is_file() else sorted(file.parent for file in folder.rglob(RESULTS))
        if not below:
            raise ValueError(
                f"{folder} holds no finished run ({RESULTS} absent): make one with `jrt eval --output {folder}`"
            )
        found += below
    return found


def collect(folders: Sequence[Path], output: Path, layout: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Writes tables, figures and a page to `output`; returns the tables as text, and the files' names.

    folders: runs, or folders that hold runs. layout: one of the paper's tables; None: tables of what was measured.
    Raises ValueError where a folder holds no finished run, or two runs the same cell."""
    titles = {**TITLES, **layouts.TITLES}
    if layout is not None and layout not in titles:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(titles)}")
    if layout == "table5":
        return _written_table(titles[layout], "measured (published)", layouts.latency(folders), output, layout)
    if layout == "table7":
        return _written_table(titles[layout], "measured (published)", layouts.datasets(folders), output, layout)
    if layout == "table10":
        found_rows = layouts.padding(_super_glue_results(folders))
        return _written_table(titles[layout], MEASURED_PUBLISHED, found_rows, output, layout)
    if layout in SUPER_GLUE_TABLES:
        return _collect_super_glue(folders, output, layout), SUPER_GLUE_FILES
    found = Collected(runs_in(folders))
    text = results_text(found.records, protocols_of(found.manifest), found.failed)
    if layout is None:
        title, (header, rows) = None, _plain_rows(found.records)
        more = [protocols_side_by_side(found.records, found.predictions), *mixtures.unlike(found.settings)]
        text = "\n".join([text, *filter(None, more)]).rstrip("\n") + "\n"
    else:
        title, (header, rows), notes_below = paper_table(layout, found)
        below = "".join(f"{line}\n" for line in notes_below)
        text = f"{title}\n{MEASURED_PUBLISHED}\n\n{aligned(header, rows)}\n{below}\n{text}"
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.csv", _csv(found.records))
    write_text(output / "table.tex", latex(header, rows))
    write_bytes(output / "predictions.parquet", _parquet(found.predictions))
    paper = None if title is None else (title, (header, rows))
    write_page(
        "Recall report", output, found.records, comparisons(found.predictions), found.predictions, found.manifest, paper
    )
    return text, FILES


def paper_table(layout: str, found: Collected) -> tuple[str, Rows, list[str]]:
    """Title, rows, and what stands below: the reason of each mark, and the runs that are missing.

    Raises ValueError where no run holds a cell of the table."""
    if layout == "mean-gain":
        rows, below = layouts.mean_gain(found.records)
        return layouts.TITLES[layout], rows, [*below, *mixtures.unlike(found.settings)]
    table = published_tables()[layout]
    mixed = mixtures.mixture(table, found.records, found.settings)
    header, lines = layout_rows(table, found.records, found.predictions, mixed)
    if not lines:
        cells = dict.fromkeys(f"{column.task} {column.strategy} under {column.protocol}" for column in table.columns)
        raise ValueError(f"no run holds a cell of {table.title}; it is made of {', '.join(cells)}")
    return table.title, (header, lines), [*mixed.reasons, *layouts.missing_runs(table, found.records)]


def _written_table(
    title: str, note: str, found: tuple[Rows, list[str]], output: Path, name: str
) -> tuple[str, tuple[str, ...]]:
    """A table that is made of no run of `jrt eval`, as text; written as LaTeX and CSV."""
    (header, rows), below = found
    folder = output.parent if output.is_file() else output
    folder.mkdir(parents=True, exist_ok=True)
    files = (f"{name}.tex", f"{name}.csv")
    write_text(folder / files[0], latex(header, rows))
    write_text(folder / files[1], _csv([dict(zip(header, row, strict=True)) for row in rows]))
    lines = "".join(f"{line}\n" for line in below)
    return f"{title}\n{note}\n\n{aligned(header, rows)}\n{lines}", files


def _plain_rows(records: Sequence[dict]) -> Rows:
    header = ("model", "task", "strategy", "protocol", "accuracy")
    rows = [
        [
            *(record[name] for name in header[:4]),
            f"{percent(record['score'])} ({percent(record['low'])} to {percent(record['high'])})",
        ]
        for record in records
    ]
    return header, rows


def _super_glue_results(folders: Sequence[Path]) -> list[dict]:
    """What lm-eval wrote of SuperGLUE. Raises ValueError where it wrote none."""
    results = []
    for file in (file for folder in folders for file in sorted(folder.rglob("results_*.json"))):
        content = json.loads(file.read_text(encoding="utf-8"))
        if SUPER_GLUE_SIZES.keys() & content.get("results", {}).keys():
            results.append(content)
    if not results:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: no results of SuperGLUE; make some with architecture_scripts/super_glue.sh")
    return results


def _collect_super_glue(folders: Sequence[Path], output: Path, layout: str) -> str:
    results = _super_glue_results(folders)
    header, rows = super_glue_rows(published_tables()[layout], results)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / SUPER_GLUE_FILES[0], latex(header, rows))
    write_text(output / SUPER_GLUE_FILES[1], _csv([dict(zip(header, row, strict=True)) for row in rows]))
    return f"{TITLES[layout]}\n{MEASURED_PUBLISHED}\n\n{aligned(header, rows)}\n"


def _csv(rows: Sequence[dict]) -> str:
    import pandas

    return pandas.DataFrame(list(rows)).to_csv(index=False, lineterminator="\n")


def _parquet(rows: Sequence[dict]) -> bytes:
    import pandas

    stream = io.BytesIO()
    pandas.DataFrame(list(rows)).to_parquet(stream)
    return stream.getvalue()


# The page


def write_page(
    title: str,
    output: Path,
    records: Sequence[dict],
    compared: Sequence[dict],
    predictions: Sequence[dict],
    manifest: dict,
    paper: tuple[str, Rows] | None = None,
) -> None:
    """Writes report.html and the figures, each as PNG and SVG, to `output`. paper: a table of the paper with its title."""
    figures = plots.draw(records, predictions)
    plots.save(figures, output)
    text = page(title, records, compared, predictions, manifest, figures.values(), paper)
    write_text(output / "report.html", text)


def page(
    title: str,
    records: Sequence[dict],
    compared: Sequence[dict],
    predictions: Sequence[dict],
    manifest: dict,
    figures: Iterable[plots.Drawn],
    paper: tuple[str, Rows] | None = None,
    items: int = SHOWN_ITEMS,
) -> str:
    """The page's text. items: how many questions are shown with all their answers."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"marked": marked, "comparison_row": comparison_row, "result_row": result_row}
    shown, total, tasks = _chosen_items(predictions, items)
    return environment.get_template("report.html.jinja").render(
        title=title,
        header=HEADER,
        tables=_tables(records, manifest),
        paper=paper,
        paper_note=MEASURED_PUBLISHED,
        figures=[(figure.heading, Markup(figure.svg)) for figure in figures],
        compared=compared,
        items=shown,
        total=total,
        tasks=tasks,
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
    )


def _tables(records: Sequence[dict], manifest: dict) -> list[dict[str, Any]]:
    """For each task and protocol: what stands above and below its table, and its records by model."""
    described = {(protocol.name, protocol.version): protocol.describe() for protocol in protocols_of(manifest)}
    groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for record in records:
        models = groups.setdefault((record["task"], record["protocol"]), {})
        models.setdefault(record["model"], []).append(record)
    found = []
    for (task, protocol), models in groups.items():
        members = [record for rows in models.values() for record in rows]
        above = [described[protocol, members[0].get("version", 1)], counts_line(members[0])]
        found.append({"task": task, "above": above, "models": list(models.values()), "below": notes(members)})
    return found


def _chosen_items(predictions: Sequence[dict], count: int) -> tuple[list[dict[str, Any]], int, list[str]]:
    """Items with all their answers, how many there are, and the tasks.

    The tasks take turns, and each gives first the items on which its cells disagree."""
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
    """Context and question of a prompt read once: its last line where that is short, else what follows its last full stop."""
    context, line_end, last = prompt.rpartition("\n")
    if last == "Answer:":  # the passages' form, where the question has a line of its own
        context, line_end, asked = context.rpartition("\n")
        last = f"{asked} {last}"
    if line_end and len(last) <= 300:
        return context, last
    context, stop, last = prompt.rpartition(". ")
    return (context + stop, last) if stop else ("", prompt)


def marked(text: str, answers: Sequence[str]) -> Markup:
    """`text` escaped, with the first answer that stands in it marked at each of its places."""
    for answer in answers:
        parts = re.split(f"({re.escape(answer)})", text, flags=re.IGNORECASE) if answer else [text]
        if len(parts) > 1:
            return Markup("").join(
                Markup("<mark>{}</mark>").format(p) if n % 2 else escape(p) for n, p in enumerate(parts)
            )
    return escape(text)
