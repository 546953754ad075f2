"""Writes the README's tables out of benchmarks/results/*.json.

python benchmarks/readme_tables.py          # rewrites README.md
python benchmarks/readme_tables.py --check  # exit status 1 where it would change anything
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import record

README = Path(__file__).parent.parent / "README.md"
MARKED = r"(<!-- table: {name} -->\n).*?(<!-- /table -->)"


def load(name: str) -> dict:
    return json.loads((record.RESULTS / f"{name}.json").read_text())


def rows_as_markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def origin(report: dict) -> str:
    return f"\n{report['device']}, torch {report['versions']['torch']}, commit {report['commit']}, {report['date']}.\n"


def minis() -> str:
    report = load("recall_minis")
    cells = {(row["model"], row["protocol"], row["strategy"]): row for row in report["rows"]}
    models, protocols, strategies = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))
    header = ["model", "state, KiB"] + [
        f"{p.removeprefix('pages-')} {s.replace('_', ' ')}" for p in protocols for s in strategies
    ]
    rows = []
    for model in models:
        mine = [cells[(model, p, s)] for p in protocols for s in strategies]
        scores = [f"{100 * row['score']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})" for row in mine]
        sizes = sorted({round(row["state_bytes"] / 1024) for row in mine})
        rows.append([model, f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}", *scores])
    items = sorted({row["n"] for row in report["rows"]})
    note = f"\nColumns: window in tokens, strategy; percent right (95% interval). {' or '.join(map(str, items))} items a cell.\n"
    return rows_as_markdown(header, rows) + note + origin(report)


def prefill() -> str:
    report = load("lin_attn_profile")
    methods = ("Based", "JRT-RNN", "JRT-Prompt", "FlashAttention-2", "cuDNN")
    wanted = [(16, 2048), (16, 8192), (16, 32768), (1, 32768)]
    found = {}
    for row in report["rows"]:
        shape = row["shape"]
        if (shape["H"], shape["d"], shape["D"]) == (16, 16, 64):
            found[(row["method"], shape["B"], shape["N"])] = row
    rows = []
    for method in methods:
        line = [method]
        for batch, length in wanted:
            row = found.get((method, batch, length))
            if row is None or row["ms"] is None:
                line.append("-")
                continue
            floor = (
                f" ({row['percent_of_floor']:.0f}% of the floor)"
                if row.get("percent_of_floor") and method in methods[:2]
                else ""
            )
            line.append(f"{row['ms']:.3f}{floor}")
        rows.append(line)
    header = ["ms", *(f"B{batch} N{length:,}" for batch, length in wanted)]
    return rows_as_markdown(header, rows) + origin(report)


def cpu() -> str:
    ops, decode = load("cpu_ops"), load("cpu_decode")
    rows = [
        [
            f"{row['method']}, B1 H16 T{row['shape']['T']:,} d16 D64 fp32",
            f"{row['ms']:,.0f} ms",
            f"{row['x_quadratic']:.0f} x quadratic, extra memory {row['extra_memory_over_inputs']:.1f} x inputs",
        ]
        for row in ops["rows"]
    ]
    rows += [
        [
            f"decode {row['method']}, batch 1",
            f"{row['tokens_per_second']:.0f} tokens/s",
            f"{row['prefill_ms']:.0f} ms to read {row['shape']['T']} tokens",
        ]
        for row in decode["rows"]
    ]
    return rows_as_markdown(["what", "time", ""], rows) + origin(ops)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "minis": ("recall_minis", minis),
    "prefill": ("lin_attn_profile", prefill),
    "cpu": ("cpu_decode", cpu),
}


def rewritten(text: str) -> str:
    for name, (source, table) in TABLES.items():
        if (record.RESULTS / f"{source}.json").is_file():
            pattern = re.compile(MARKED.format(name=name), re.DOTALL)
            text = pattern.sub(lambda match, table=table: match[1] + table() + match[2], text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    old = README.read_text()
    new = rewritten(old)
    if arguments.check:
        sys.exit(new != old)
    README.write_text(new)


if __name__ == "__main__":
    main()
