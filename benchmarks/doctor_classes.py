"""Runs the checks of `jrt doctor` on transformers' recurrent and hybrid classes, with a few other classes as controls.

The models are tiny and have random weights.

python benchmarks/doctor_classes.py           # probes them, writes results/doctor_classes.json and the table of docs/doctor.md
python benchmarks/doctor_classes.py --table   # the table alone, from the file
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import record
import transformers
from tiny_models import CONTROLS, KINDS, available, tiny_model

from jrt.doctor import examine

PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"
COLUMNS = (
    "decode",
    "padding",
    "neighbours",
    "two calls",
    "state copy",
    "single tokens",
    "shared state",
    "save and load",
    "bfloat16",
    "float16",
)


def examined(kind: str) -> dict:
    """Returns a row of the result: model type, whether it is a control, its checks, and how `jrt eval` must run it."""
    found = examine(tiny_model(kind), kind)
    return {"kind": kind, "control": kind in CONTROLS, **found.to_dict(), "run": found.findings.mode.sentences()}


def cell(row: dict, name: str) -> str:
    check = next((check for check in row["checks"] if check["name"] == name), None)
    if check is None or check["holds"] is None:
        return "-"
    if check["holds"]:
        return "yes"
    return "**no**" if check["deviation"] is None else f"**no** ({check['deviation']:.0e})"


def table(report: dict) -> str:
    lines = [["class", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for row in report["rows"]:
        name = f"{row['kind']} (control)" if row["control"] else row["kind"]
        lines.append([name, *(cell(row, column) for column in COLUMNS)])
    missing = [kind for kind in KINDS if kind not in {row["kind"] for row in report["rows"]}]
    absent = f" Not in this version: {', '.join(missing)}." if missing else ""
    origin = f"\ntransformers {report['versions']['transformers']}, torch {report['versions']['torch']}, {report['device']}, "
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" + origin + f"{report['date']}.{absent}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write the table from the file")
    arguments = parser.parse_args()
    file = record.RESULTS / "doctor_classes.json"
    if not arguments.table:
        transformers.logging.set_verbosity_error()
        record.write("doctor_classes", [examined(kind) for kind in available()], file, "cpu")
    marked = re.compile(r"(<!-- table: classes -->\n).*?(<!-- /table -->)", re.DOTALL)
    text = marked.sub(lambda match: match[1] + table(json.loads(file.read_text())) + match[2], PAGE.read_text())
    PAGE.write_text(text)
    print(PAGE)


if __name__ == "__main__":
    main()
