"""Measures recall of the four mini models on reference pages, read once and twice, as the demo does, at any windows.

    python benchmarks/recall_minis.py [--windows 512 1024 2048] [--limit 160] [--device cuda]

The same command, started again, continues where it stopped. runs/recall_minis holds every answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import record

from jrt.evaluate import LocalPool, ModelSpec, Request, plan, run
from jrt.evaluate.demo import ITEMS, MINIS, STRATEGIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=ITEMS, help="items a cell")
    parser.add_argument("--windows", type=int, nargs="+", default=[512])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/recall_minis"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for window in arguments.windows:
        specs = tuple(ModelSpec(name, arguments.device) for name in MINIS)
        chosen = plan(Request(specs, ("reference_pages",), STRATEGIES, f"pages-{window}", arguments.limit))
        outcome = run(chosen, LocalPool(), arguments.output / str(window), arguments.batch_size, resume=True)
        rows += [dict(record) for record in outcome.records]
    print(record.write("recall_minis", rows, arguments.json, arguments.device))


if __name__ == "__main__":
    main()
