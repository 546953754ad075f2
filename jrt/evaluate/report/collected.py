"""`jrt report`: from finished runs to the paper's tables, figures and one HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from jrt.evaluate.folder import RESULTS, Cell, cell_of, read_run
from jrt.evaluate.report.html import MEASURED_PUBLISHED, write_page
from jrt.evaluate.run import comparisons
from jrt.evaluate.tables import layouts, mixtures
from jrt.evaluate.tables.published import TITLES, published_tables
from jrt.evaluate.tables.results import Rows, aligned, latex, percent, protocols_of, results_text
from jrt.evaluate.tables.side_by_side import protocols_side_by_side
from jrt.system.files import write_bytes, write_text

FILES = (
    "results.csv",
    "table.tex",
    "predictions.parquet",
    *(f"{name}.{kind}" for name in ("accuracy", "state", "position") for kind in ("png", "svg")),
    "report.html",
)


class Collected:
    """Records and predictions of several runs together. Raises ValueError if two runs hold the same cell."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.records: list[dict] = []
        self.predictions: list[dict] = []
        self.failed: dict[Cell, str] = {}  # cells without a score, with the reason
        protocols: dict[tuple[str, int], dict] = {}
        manifests: dict[str, dict] = {}
        self.settings: dict[Cell, mixtures.Settings] = {}
        """For each cell, the dtype, items and package versions with which it was computed."""
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

    folders: runs, or folders with runs below them. layout: a key of TITLES, one of the paper's tables; None: all that
    was measured. Raises ValueError if a folder holds no finished run, or two runs hold the same cell."""
    if layout is not None and layout not in TITLES:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(TITLES)}")
    if layout in layouts.FROM_FILES:
        return _from_files(layout, folders, output)
    try:
        runs = runs_in(folders)
    except ValueError as error:
        raise ValueError(
            f"{error}{'' if layout is None else f'; {TITLES[layout]} is made of {cells_of(layout)}'}"
        ) from None
    found = Collected(runs)
    text = results_text(found.records, protocols_of(found.manifest), found.failed)
    if layout is None:
        title, (header, rows) = None, _plain_rows(found.records)
        more = [
            protocols_side_by_side(found.records, found.predictions),
            *mixtures.unlike(found.settings, found.records),
        ]
        text = "\n".join([text, *filter(None, more)]).rstrip("\n") + "\n"
    else:
        title, (header, rows), below = paper_table(layout, found)
        text = f"{_titled(title, MEASURED_PUBLISHED, (header, rows), below)}\n{text}"
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.csv", _csv(found.records))
    write_text(output / "table.tex", latex(header, rows))
    write_bytes(output / "predictions.parquet", _parquet(found.predictions))
    paper = None if title is None else (title, (header, rows))
    compared = comparisons(found.predictions)
    write_page("Recall report", output, found.records, compared, found.predictions, found.manifest, paper, found.failed)
    return text, FILES


def paper_table(layout: str, found: Collected) -> tuple[str, Rows, list[str]]:
    """One of the paper's tables: its title, its rows, and the lines below it (reasons of marks, commands of missing
    runs).

    Raises ValueError if no run holds a cell of the table."""
    table = published_tables()["table1" if layout == "mean-gain" else layout]
    also = [*layouts.not_run(table, found.records, found.failed), *mixtures.limited(found.settings)]
    if layout == "mean-gain":
        rows, below = layouts.mean_gain(found.records)
        return TITLES[layout], rows, [*below, *also, *mixtures.unlike(found.settings, found.records)]
    mixed = mixtures.mixture(table, found.records, found.settings)
    header, lines = layouts.layout_rows(table, found.records, found.predictions, mixed)
    if not lines:
        raise ValueError(f"no run holds a cell of {table.title}; it is made of {cells_of(layout)}")
    return table.title, (header, lines), [*mixed.reasons, *layouts.missing_runs(table, found.records), *also]


def cells_of(layout: str) -> str:
    """The cells that a table of recall is made of, in words."""
    columns = published_tables()["table1" if layout == "mean-gain" else layout].columns
    return ", ".join(dict.fromkeys(f"{column.task} {column.strategy} under {column.protocol}" for column in columns))


def _from_files(layout: str, folders: Sequence[Path], output: Path) -> tuple[str, tuple[str, ...]]:
    """A table that is made from other files than runs of `jrt eval`: written as LaTeX and CSV, returned as text."""
    (header, rows), below = layouts.FROM_FILES[layout](folders)
    folder = output.parent if output.is_file() else output
    folder.mkdir(parents=True, exist_ok=True)
    files = (f"{layout}.tex", f"{layout}.csv")
    write_text(folder / files[0], latex(header, rows))
    write_text(folder / files[1], _csv([dict(zip(header, row, strict=True)) for row in rows]))
    unit = "measured (published)" if layout in ("table5", "table7") else MEASURED_PUBLISHED
    return _titled(TITLES[layout], unit, (header, rows), below), files


def _titled(title: str, unit: str, rows: Rows, below: Sequence[str]) -> str:
    return f"{title}\n{unit}\n\n{aligned(*rows)}\n" + "".join(f"{line}\n" for line in below)


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


def _csv(rows: Sequence[dict]) -> str:
    import pandas

    return pandas.DataFrame(list(rows)).to_csv(index=False, lineterminator="\n")


def _parquet(rows: Sequence[dict]) -> bytes:
    import pandas

    stream = io.BytesIO()
    pandas.DataFrame(list(rows)).to_parquet(stream)
    return stream.getvalue()
