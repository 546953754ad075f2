"""Writes the result of a benchmark as one JSON file, with the command, device, versions, commit and date."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from jrt.system.files import write_json
from jrt.system.provenance import command, commit, device_name, versions

RESULTS = Path(__file__).parent / "results"


def write(benchmark: str, rows: list[dict], path: Path | None = None, on: str = "cuda", **more: object) -> Path:
    """Writes the rows to benchmarks/results/NAME.json, or to `path`. on: the device that was measured, as PyTorch names it;
    "cuda" means the GPU if there is one."""
    path = path or RESULTS / f"{benchmark}.json"
    report = {
        "benchmark": benchmark,
        "command": command(*sys.argv),
        "device": device_name(on),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    return path
