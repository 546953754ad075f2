"""Draws figures and tables from a sweep's folder: ``python -m synthetics.plot DIR``. Running a sweep does so too.

Every task gets the frontier, accuracy against size of the state. Set disjointness also gets the panels of the paper's
figure 2 and heat maps over the lengths of both lists. Figures are PNG and SVG files, the table is a CSV file. If a
sweep has several tasks, each has its own files, with the task's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from synthetics.folder import read
from synthetics.summary import OVERALL, PANELS, Line, markdown, pair_of, summarize, write_csv


def draw_all(folder: Path) -> str:
    """Draws all figures that the results allow, and returns the table as Markdown.

    Raises ValueError without results."""
    rows = read(folder)["rows"]
    if not rows:
        raise ValueError(f"{folder} has no results yet")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tables = []
    for task in tasks:
        lines = summarize([row for row in rows if row["task"] == task])
        suffix = "" if len(tasks) == 1 else f"-{task}"
        write_csv(lines, folder / f"summary{suffix}.csv")
        save(frontier(lines), folder / f"frontier{suffix}")
        if set(PANELS) <= set(lines[0].panels):
            save(by_order(lines), folder / f"order{suffix}")
        if any(pair_of(size) for size in lines[0].accuracy):
            save(heat_maps(lines), folder / f"lengths{suffix}")
        tables.append(markdown(lines) if len(tasks) == 1 else f"{task}\n\n{markdown(lines)}")
    return "\n\n".join(tables)


def save(figure: Figure, stem: Path) -> None:
    """Saves a figure as STEM.png and STEM.svg."""
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=150)
    figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})


def by_order(lines: Sequence[Line]) -> Figure:
    """Draws the paper's figure 2: accuracy against size of the state.

    The panels are: short list first, long list first, and their difference."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _curves(axes, lines, panel)
        axes.set_title(panel)
    figure.axes[0].set_ylabel("answers right, %")
    figure.axes[0].legend(fontsize=8)
    return figure


def frontier(lines: Sequence[Line]) -> Figure:
    """Draws mean accuracy over all sizes of examples against size of the state."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    _curves(axes, lines, OVERALL)
    axes.set_ylabel("answers right, %")
    axes.legend(fontsize=8)
    return figure


def _curves(axes: Axes, lines: Sequence[Line], panel: str) -> None:
    """Draws one curve for each method, with 95% intervals over seeds.

    Models with the same size of state are points above each other."""
    for method in dict.fromkeys(line.method for line in lines):
        own = sorted((line for line in lines if line.method == method), key=lambda line: line.state_bytes)
        means = [100 * line.panels[panel].mean for line in own]
        widths = [100 * (line.panels[panel].half_width or 0) for line in own]
        states = [line.state_bytes for line in own]
        axes.errorbar(states, means, widths, marker="o", markersize=4, capsize=2, linewidth=1, label=method)
    axes.set_xscale("log")
    axes.set_xlabel("state, bytes")
    axes.grid(alpha=0.3)


def heat_maps(lines: Sequence[Line]) -> Figure:
    """Draws accuracy by the lengths of both lists, one map for each method.

    All maps are of one model size: the one with the most methods and, among those, the largest difference between
    methods.
    """
    by_model: dict[tuple, list[Line]] = {}
    for line in lines:
        by_model.setdefault(line.model, []).append(line)

    def spread(own: list[Line]) -> tuple[int, float]:
        means = [line.panels[OVERALL].mean for line in own]
        return len(own), max(means) - min(means)

    shown = max(by_model.values(), key=spread)
    pairs = [pair for size in shown[0].accuracy if (pair := pair_of(size))]
    firsts, seconds = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    figure = Figure(figsize=(1 + 3 * len(shown), 3.6), layout="constrained")
    for axes, line in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        cells = [[100 * line.accuracy.get(f"{a}_{b}", float("nan")) for b in seconds] for a in firsts]
        image = axes.imshow(cells, vmin=0, vmax=100, origin="lower", cmap="viridis")
        axes.set_xticks(range(len(seconds)), seconds)
        axes.set_yticks(range(len(firsts)), firsts)
        axes.set_xlabel("second list, tokens")
        axes.set_title(f"{line.method}, {line.state_bytes:,} bytes", fontsize=9)
    figure.axes[0].set_ylabel("first list, tokens")
    figure.colorbar(image, ax=figure.axes, label="answers right, %")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthetics.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        print(draw_all(arguments.folder))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
