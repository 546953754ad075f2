"""What every benchmark keeps of a run: one JSON file with the command, machine, versions, commit and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "lm-eval", "flash-linear-attention", "flash-attn")


def device_name() -> str:
    """The GPU, or the processor and how many threads PyTorch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Python and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_")) or name == "flash-linear-attention":
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def commit() -> str:
    """What JRT_COMMIT says, for a copy on another machine; else the checkout's commit, "+changes" where files differ from
    it, or "unknown"."""
    if told := os.environ.get("JRT_COMMIT"):
        return told
    here = Path(__file__).parent
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    if head.returncode:
        return "unknown"
    changes = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def write(benchmark: str, rows: list[dict], path: Path | None = None, **more: object) -> Path:
    """Writes the rows to benchmarks/results/NAME.json, or to `path`."""
    path = path or RESULTS / f"{benchmark}.json"
    report = {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
