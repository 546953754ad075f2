"""Accuracy against state size, as in the paper's figure 2: ``python synthetics/plot.py FOLDER_OF_A_SWEEP``.

Of the learning rates the one with the best mean over all pairs counts, in every panel; seeds are averaged.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

PANELS = ("short list first", "long list first", "difference")


def read(folder: Path) -> list[dict]:
    """Rows of a sweep's results.

    Raises:
        ValueError: there are none.
    """
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not rows:
        raise ValueError(f"{folder} holds no results: expected the folder of python synthetics/sweeps.py")
    return rows


def panels_of(row: dict) -> tuple[float, float, float]:
    """Mean accuracy where the first list is the shorter one, where it is the longer one, and how much lower that is."""
    pairs = {tuple(map(int, pair.split("_"))): each for pair, each in row["accuracy"].items()}
    short = mean(each for (first, second), each in pairs.items() if first < second)
    long = mean(each for (first, second), each in pairs.items() if first > second)
    return short, long, short - long


def spread(runs: list[dict]) -> float:
    """How far apart the seeds' mean accuracies are."""
    means = [mean(run["accuracy"].values()) for run in runs]
    return max(means) - min(means)


def best(rows: list[dict]) -> list[dict]:
    """One line a method and state: best rate, mean over seeds; sorted."""
    by_model: dict[tuple, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_model[row["method"], row["state_bytes"], row["width"], row["feature_dim"]][row["rate"]].append(row)
    lines = []
    for (method, state, width, feature_dim), by_rate in sorted(by_model.items()):
        chosen = max(by_rate.values(), key=lambda runs: mean(mean(run["accuracy"].values()) for run in runs))
        line = {
            "method": method,
            "state_bytes": state,
            "width": width,
            "feature_dim": feature_dim,
            "seeds": len(chosen),
            "spread": spread(chosen),
        }
        line |= dict(zip(PANELS, (mean(each) for each in zip(*map(panels_of, chosen), strict=True)), strict=True))
        lines.append(line)
    return lines


def table(lines: list[dict]) -> str:
    head = "| method | width | feature size | state, bytes | short list first | long list first | difference | seeds apart |"
    body = [
        f"| {line['method']} | {line['width']} | {line['feature_dim']} | {line['state_bytes']:,} | "
        + " | ".join(f"{100 * line[panel]:.1f}" for panel in (*PANELS, "spread"))
        + " |"
        for line in lines
    ]
    return "\n".join([head, "|---" * 8 + "|", *body])


def write(rows: list[dict], lines: list[dict], file: Path) -> None:
    """All of a sweep in one file: the lines of its figure and every run behind them."""
    first = rows[0]
    report = {
        "benchmark": "set_disjointness",
        "command": shlex.join(["python", *sys.argv]),
        **{name: first[name] for name in ("device", "versions", "commit", "date")},
        "rows": lines,
        "runs": rows,
    }
    file.write_text(json.dumps(report, indent=1) + "\n")


def draw(lines: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 3), PANELS, strict=True):
        for method in sorted({line["method"] for line in lines}):
            own = sorted((line["state_bytes"], 100 * line[panel]) for line in lines if line["method"] == method)
            axes.plot(*zip(*own, strict=True), marker="o", label=method)
        axes.set_xscale("log")
        axes.set_xlabel("state, bytes")
        axes.set_title(panel)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("answers right, %")
    figure.axes[0].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, help="default: set_disjointness.png in the folder")
    parser.add_argument("--json", type=Path, help="also writes lines and runs to this file")
    arguments = parser.parse_args()
    try:
        rows = read(arguments.folder)
    except ValueError as error:
        parser.error(str(error))
    lines = best(rows)
    if arguments.json:
        write(rows, lines, arguments.json)
    file = arguments.figure or arguments.folder / "set_disjointness.png"
    draw(lines, file)
    print(table(lines))
    print(file)


if __name__ == "__main__":
    main()
