"""`jrt report`: from finished runs to the paper's tables, figures and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas

from jrt.evaluate.folder import RESULTS, Cell, Results, cell_of, read_run
from jrt.evaluate.report.html import MEASURED_PUBLISHED, write_page
from jrt.evaluate.tables import layouts, mixtures
from jrt.evaluate.tables.published import TITLES, Table, published_tables
from jrt.evaluate.tables.results import Rows, aligned, percent, results_text
from jrt.evaluate.tables.side_by_side import comparisons, protocols_side_by_side
from jrt.system.files import write_bytes, write_text

FILES = (
    "results.csv",
    "table.tex",
    "predictions.parquet",
    *(f"{name}.{kind}" for name in ("accuracy", "state", "position") for kind in ("png", "svg")),
    "report.html",
)


def together(folders: Sequence[Path]) -> Results:
    """The results of several runs, with the settings of a model in its name. Raises ValueError if two runs hold the same
    cell."""
    records: list[dict] = []
    predictions: list[dict] = []
    settings: dict[Cell, dict[str, str]] = {}
    failed: list[dict] = []
    protocols: dict[tuple[str, int], dict] = {}
    manifests: dict[str, dict] = {}
    for folder in folders:
        run = read_run(folder)
        labels = {model["name"]: _label(model) for model in run.manifest["identity"]["models"]}
        records += [{**record, "model": labels[record["model"]]} for record in run.records]
        predictions += [{**row, "model": labels[row["model"]]} for row in run.predictions]
        failed += [{**row, "model": labels[row["model"]]} for row in run.manifest.get("failed", ())]
        settings |= {cell._replace(model=labels[cell.model]): found for cell, found in run.settings.items()}
        protocols |= {(one["name"], one["version"]): one for one in run.manifest["identity"]["protocols"]}
        manifests[str(folder)] = run.manifest
    cells = [cell_of(record) for record in records]
    if repeated := sorted({cell for cell in cells if cells.count(cell) > 1}):
        raise ValueError(f"two runs hold {', '.join(repeated[0])}: collect one of them")
    manifest = {"identity": {"protocols": list(protocols.values())}, "failed": failed, "runs": manifests}
    return Results(records, predictions, manifest, comparisons(predictions), settings)


def _label(model: dict) -> str:
    """A model's name, with the other settings that decide its scores in brackets: "mini-jrt [pad, bfloat16]"."""
    extras = [model[key] for key in ("short_prompt", "compat") if model[key]]
    if model["dtype"] != "float32":
        extras.append(model["dtype"])
    return f"{model['name']} [{', '.join(extras)}]" if extras else model["name"]


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The folders of finished runs: each given folder if it is one, else all runs below it.

    Raises ValueError for a folder without any."""
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
    """Writes tables, figures and an HTML page to `output`; returns the tables as text, and the names of the files.

    folders: runs, or folders with runs below them; for some layouts, what `FROM_FILES` says. layout: a key of TITLES,
    one of the paper's tables; None: all that was measured. Raises ValueError if a folder holds no finished run, or two
    runs hold the same cell."""
    if layout is not None and layout not in TITLES:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(TITLES)}")
    if layout in layouts.FROM_FILES:
        (header, rows), below = layouts.FROM_FILES[layout](folders)
        output.mkdir(parents=True, exist_ok=True)
        files = (f"{layout}.tex", f"{layout}.csv")
        write_text(output / files[0], latex(header, rows))
        write_text(output / files[1], _csv(pandas.DataFrame(rows, columns=list(header))))
        unit = "measured (published)" if layout in ("table5", "table7") else MEASURED_PUBLISHED
        return _titled(TITLES[layout], unit, (header, rows), below), files
    try:
        runs = runs_in(folders)
    except ValueError as error:
        made_of = "" if layout is None else f"; {TITLES[layout]} is made of {layouts.made_of(table_of(layout))}"
        raise ValueError(f"{error}{made_of}") from None
    found = together(runs)
    text, paper = results_text(found), None
    if layout is None:
        header = ("model", "task", "strategy", "protocol", "accuracy")
        rows = [
            [*cell_of(r), f"{percent(r['score'])} ({percent(r['low'])} to {percent(r['high'])})"] for r in found.records
        ]
        more = filter(None, [protocols_side_by_side(found), *mixtures.unlike(found)])
        text = "\n".join([text, *more]).rstrip("\n") + "\n"
    else:
        (header, rows), below = paper_table(layout, found)
        paper = TITLES[layout], (header, rows)
        text = f"{_titled(TITLES[layout], MEASURED_PUBLISHED, (header, rows), below)}\n{text}"
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.csv", _csv(pandas.DataFrame(found.records)))
    write_text(output / "table.tex", latex(header, rows))
    write_bytes(output / "predictions.parquet", pandas.DataFrame(found.predictions).to_parquet())
    write_page("Recall report", output, found, paper)
    return text, FILES


def table_of(layout: str) -> Table:
    """The table of recall that a layout is made of."""
    return published_tables()["table1" if layout == "mean-gain" else layout]


def paper_table(layout: str, results: Results) -> tuple[Rows, list[str]]:
    """One of the paper's tables of recall, and the lines below it. Raises ValueError if no run holds a cell of it."""
    if layout == "mean-gain":
        return layouts.mean_gain(results)
    rows, below = layouts.layout_rows(table_of(layout), results)
    if not rows[1]:
        raise ValueError(f"no run holds a cell of {TITLES[layout]}; it is made of {layouts.made_of(table_of(layout))}")
    return rows, below


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in LaTeX; needs the package booktabs."""
    frame = pandas.DataFrame(rows, columns=list(header))
    return frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(header) - 1))


def _titled(title: str, unit: str, rows: Rows, below: Sequence[str]) -> str:
    return f"{title}\n{unit}\n\n{aligned(*rows)}\n" + "".join(f"{line}\n" for line in below)


def _csv(frame: pandas.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")
