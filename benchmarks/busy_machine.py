"""Measures how much another busy program slows down `jrt eval`, with its own choice of threads and with a fixed number.

    env -u OMP_NUM_THREADS python benchmarks/busy_machine.py [--model mini-mamba mini-jrt] [--limit 16] [--rounds 5]

Each setting runs as a command of its own, alone and beside a program that never stops. The settings take turns, and the
median of their rounds is reported. A fixed number of threads is set by OMP_NUM_THREADS; "all cores" is PyTorch's
default. A run waits until no other program uses the machine, and is repeated if one did during the run. After
`--patience` minutes in all, runs are no longer repeated.

A row has the seconds of the answers (from results.json), the seconds of the whole command, and `others`: how many cores
other programs used on average, the busy program not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import record

TASK = "recall_reference_pages_512"
QUIET = 0.1
"""Cores that others may have."""
BUSY = [sys.executable, "-c", "while True: pass"]


def ways() -> dict[str, dict[str, str]]:
    """Returns the environment variables of each setting, by its name."""
    return {"chosen": {}, "all cores": {"OMP_NUM_THREADS": str(os.cpu_count())}, "one thread": {"OMP_NUM_THREADS": "1"}}


def evaluate(model: str, limit: int, environment: dict[str, str]) -> tuple[float, float, float]:
    """Runs the command. Returns the seconds of the answers, the seconds in all, and the processor time in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jrt", "eval", "--model", model, "--tasks", TASK, "--limit", str(limit)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run(
            [*command, "--output", folder + "/run"],
            env={**os.environ, **environment},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        passed = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(Path(folder, "run", "results.json").read_text(encoding="utf-8"))
    answers = sum(cell["seconds"] for cell in found)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return answers, passed, used


def one_round(model: str, limit: int, environment: dict[str, str], is_busy: bool) -> dict[str, float]:
    """Does one run of one setting. The row has `others`, the cores that other programs used."""
    busy = subprocess.Popen(BUSY) if is_busy else None
    idle_before = _idle()
    answers, passed, used = evaluate(model, limit, environment)
    idle = _idle() - idle_before
    if busy is not None:
        times = psutil.Process(busy.pid).cpu_times()
        used += times.user + times.system
        busy.kill()
        busy.wait()
    others = (os.cpu_count() or 1) - (idle + used) / passed
    return {"answers": answers, "command": passed, "others": others}


def undisturbed(
    model: str, limit: int, environment: dict[str, str], is_busy: bool, deadline: float
) -> dict[str, float]:
    """Repeats `one_round` until no other program used the machine, or until the deadline (on `time.monotonic`)."""
    while True:
        while time.monotonic() < deadline and psutil.cpu_percent(interval=2) > 100 * QUIET / (os.cpu_count() or 1):
            pass
        found = one_round(model, limit, environment, is_busy)
        if found["others"] <= QUIET or time.monotonic() >= deadline:
            return found


def _idle() -> float:
    times = psutil.cpu_times()
    return times.idle + getattr(times, "iowait", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["mini-mamba", "mini-jrt"])
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=10, help="minutes to wait for an idle machine")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/busy_machine.json")
    arguments = parser.parse_args()
    if "OMP_NUM_THREADS" in os.environ:
        parser.error("OMP_NUM_THREADS is set, which fixes the number of threads: start this without it")
    deadline = time.monotonic() + 60 * arguments.patience
    rows = []
    for model in arguments.model:
        found: dict[tuple[bool, str], list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for is_busy in (False, True):
                for way, environment in ways().items():
                    one = undisturbed(model, arguments.limit, environment, is_busy, deadline)
                    found.setdefault((is_busy, way), []).append(one)
                    print(
                        model, "busy" if is_busy else "idle", way, {k: round(v, 2) for k, v in one.items()}, flush=True
                    )
        for (is_busy, way), runs in found.items():
            medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            rows.append(
                {
                    "model": Path(model).name,
                    "machine": "busy" if is_busy else "idle",
                    "threads": way,
                    "seconds": medians["answers"],
                    "command_seconds": medians["command"],
                    "others": medians["others"],
                    "rounds": [run["answers"] for run in runs],
                }
            )
    path = record.write("busy_machine", rows, arguments.json, "cpu", task=TASK, limit=arguments.limit)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
