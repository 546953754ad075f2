"""From finished runs to the paper's tables and a report: `collect(runs, output, layout)`.

Published values stand beside measured ones only for the models that the paper measured, on its own datasets.
"""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from jrt_recall.errors import error_kind
from jrt_recall.fixtures import SOURCE as GENERATED

from jrt.evaluate import plots
from jrt.evaluate.files import write_text
from jrt.evaluate.folder import RESULTS, cell_of, read_run
from jrt.evaluate.plan import Cell
from jrt.evaluate.published import SUPER_GLUE_TABLES, TABLES, Table, published_row
from jrt.evaluate.report import page, table
from jrt.evaluate.results import comparisons
from jrt.evaluate.tables import aligned, protocols_of, results_text

FILES = (
    "results.csv",
    "table.tex",
    "predictions.parquet",
    *(f"{name}.{kind}" for name in ("accuracy", "state", "position") for kind in ("png", "svg")),
    "report.html",
)
_WIDE = 9  # more columns than this and models become the columns


class Collected:
    """Records and predictions of several runs, as one."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.records: list[dict] = []
        self.predictions: list[dict] = []
        self.protocols: dict[str, dict] = {}
        self.manifests: dict[str, dict] = {}
        for folder in folders:
            records, predictions, manifest = read_run(folder)
            labels = {m["name"]: _label(m) for m in manifest["identity"]["models"]}
            self.records += [{**record, "model": labels[record["model"]]} for record in records]
            self.predictions += [{**row, "model": labels[row["model"]]} for row in predictions]
            self.protocols |= {protocol["name"]: protocol for protocol in manifest["identity"]["protocols"]}
            self.manifests[folder.name] = manifest
        cells = [cell_of(record) for record in self.records]
        if repeated := sorted({cell for cell in cells if cells.count(cell) > 1}):
            raise ValueError(f"two runs hold {', '.join(repeated[0])}: collect one of them")

    @property
    def manifest(self) -> dict:
        """All manifests, and the protocols that the tables name."""
        return {"identity": {"protocols": list(self.protocols.values())}, "runs": self.manifests}


def collect(folders: Sequence[Path], output: Path, layout: str | None = None) -> str:
    """Writes FILES to `output` and returns the tables as text.

    folders: runs, or folders that hold runs. layout: one of the paper's tables; None: tables of what was measured.
    Raises ValueError where a folder holds no finished run, or two runs the same cell."""
    if layout is not None and layout not in TABLES:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join((*TABLES, *SUPER_GLUE_TABLES))}")
    found = Collected(runs_in(folders))
    text = results_text(found.records, protocols_of(found.manifest))
    extra = ""
    if layout is None:
        header, rows = ("model", "task", "strategy", "protocol", "accuracy"), _plain_rows(found.records)
    else:
        chosen = TABLES[layout]
        header, rows = layout_rows(chosen, found)
        if not rows:
            raise ValueError(f"no run holds a cell of {chosen.title}; it is made of {_made_of(chosen)}")
        text = f"{chosen.title}\nmeasured (published), percent\n\n{aligned(header, rows)}\n\n{text}"
        extra = f"<h2>{chosen.title}</h2><p class=note>measured (published), percent</p>" + table(header, rows)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.csv", _csv(found.records))
    write_text(output / "table.tex", latex(header, rows))
    _write_frame(found.predictions, output / "predictions.parquet")
    figures = plots.draw(found.records, found.predictions)
    plots.save(figures, output)
    compared = comparisons(found.predictions)
    html = page("Recall report", found.records, compared, found.predictions, found.manifest, figures.values(), extra)
    write_text(output / "report.html", html)
    return text


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


def layout_rows(layout: Table, found: Collected) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows of one of the paper's tables; wide tables have models as columns."""
    cells = {cell_of(record): record for record in found.records}
    predictions: dict[Cell, list[dict]] = {}
    for row in found.predictions:
        predictions.setdefault(cell_of(row), []).append(row)
    lines = []
    for model in dict.fromkeys(record["model"] for record in found.records):
        paper = published_row(layout, model)
        measured: list[float | None] = []
        shown = []
        comparable = True
        for index, column in enumerate(layout.columns):
            cell = Cell(model, column.task, column.strategy, column.protocol)
            value = None
            if cell in cells:
                score = column.measure == "score"
                value = 100 * (cells[cell]["score"] if score else _share(predictions[cell], column.measure))
                comparable = comparable and not cells[cell]["source"].startswith(GENERATED)
            measured.append(value)
            shown.append(_beside(value, None if paper is None else paper[index]))
        if all(value is None for value in measured):
            continue
        if not comparable:
            paper, shown = None, [_beside(value, None) for value in measured]
        if layout.columns[0].measure == "score":
            whole = None not in measured
            shown.append(_beside(_mean(measured) if whole else None, None if paper is None else _mean(paper)))
        lines.append([model, *shown])
    labels = [column.label for column in layout.columns]
    if layout.columns[0].measure == "score":
        labels.append("average")
    if lines and len(labels) > _WIDE + 1:
        turned = [[label, *(line[place + 1] for line in lines)] for place, label in enumerate(labels)]
        return ("", *(line[0] for line in lines)), turned
    return ("model", *labels), lines


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs table."""
    lines = [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, header)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def frame(predictions: Sequence[dict]):
    """All predictions as a pandas frame, one row an item and cell."""
    import pandas

    return pandas.DataFrame(list(predictions))


def _label(model: dict) -> str:
    """A model's name with what else decides its scores."""
    extras = [model[key] for key in ("short_prompt", "compat") if model[key]]
    if model["dtype"] != "float32":
        extras.append(model["dtype"])
    return f"{model['name']} [{', '.join(extras)}]" if extras else model["name"]


def _plain_rows(records: Sequence[dict]) -> list[list[str]]:
    rows = []
    for r in records:
        accuracy = f"{100 * r['score']:.1f} ({100 * r['low']:.1f} to {100 * r['high']:.1f})"
        rows.append([r["model"], r["task"], r["strategy"], r["protocol"], accuracy])
    return rows


def _beside(measured: float | None, published: float | None) -> str:
    text = "-" if measured is None else f"{measured:.1f}"
    return text if published is None else f"{text} ({published:.1f})"


def _share(rows: Sequence[dict], kind: str) -> float:
    """Of all rows, right ones included, those that are wrong in that way."""
    return _mean([error_kind(row["prediction"], row["answers"]) == kind for row in rows])


def _made_of(layout: Table) -> str:
    return ", ".join(dict.fromkeys(f"{column.task} under {column.protocol}" for column in layout.columns))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _csv(records: Sequence[dict]) -> str:
    stream = StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def _write_frame(predictions: Sequence[dict], file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    frame(predictions).to_parquet(partial)
    partial.replace(file)


def _tex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text
