"""Writes the result of a benchmark as one JSON file, with the command, device, versions, commit and date."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path

from jrt.system.files import write_json
from jrt.system.provenance import commit, device_name, versions

RESULTS = Path(__file__).parent / "results"


def without_machine(argument: str) -> str:
    """Returns a command's argument. Of an absolute path, only the last part is kept."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def write(benchmark: str, rows: list[dict], path: Path | None = None, **more: object) -> Path:
    """Writes the rows to benchmarks/results/NAME.json, or to `path`."""
    path = path or RESULTS / f"{benchmark}.json"
    report = {
        "benchmark": benchmark,
        "command": shlex.join(["python", *map(without_machine, sys.argv)]),
        "device": device_name(),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    return path
