"""Draws figures and tables from a sweep's folder: ``python -m synthetics.plot DIR``. Running a sweep does so too.

Every task gets the frontier, accuracy against size of the state. Set disjointness also gets the panels of the paper's
figure 2, heat maps over the lengths of both lists, and a comparison of the ways to read at equal state. Figures are PNG
and SVG files, tables are CSV files. If a sweep has several tasks, each has its own files, with the task's name. Where a
test has longer lists than the training, there are files of the trained lengths alone, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import cycle, product
from math import ceil, nan
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from synthetics import equal_state
from synthetics.folder import read
from synthetics.summary import OVERALL, PANELS, Line, markdown, of_trained_lengths, pair_of, summarize, write_csv
from synthetics.tasks import TASKS

# Colours that colour-blind readers can tell apart (Okabe and Ito, "Color Universal Design", 2008); markers help, too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
MARKERS = "os^Dv<P*>"  # one more than colours: the ninth method has another marker than the first
TRAINED = "trained-lengths"
STEMS = ("summary", "equal_state", "frontier", "order", "lengths")  # names of files


def draw_all(folder: Path) -> str:
    """Draws all figures that the results allow, and returns the tables as Markdown.

    Raises ValueError without results."""
    rows = read(folder)["rows"]
    if not rows:
        raise ValueError(f"{folder} has no results yet")
    tables = []
    parts = parts_of(rows)
    if "" not in parts:  # several tasks: files of the time when results of one were there would stay for ever
        for stem, part, end in product(STEMS, ("", f"-{TRAINED}"), ("csv", "png", "svg")):
            (folder / f"{stem}{part}.{end}").unlink(missing_ok=True)
    for name, own in parts.items():
        lines = summarize(own)
        suffix = name and f"-{name}"
        write_csv(lines, folder / f"summary{suffix}.csv")
        save(frontier(lines), folder / f"frontier{suffix}")
        if set(PANELS) <= set(lines[0].panels):
            save(by_order(lines), folder / f"order{suffix}")
        if any(pair_of(size) for size in lines[0].accuracy):
            save(heat_maps(lines), folder / f"lengths{suffix}")
        if name:
            tables.append(name)
        tables.append(markdown(lines))
        if states := equal_state.equal_states(lines):
            equal_state.write_csv(states, folder / f"equal_state{suffix}.csv")
            tables.append(equal_state.markdown(states))
    return "\n\n".join(tables)


def parts_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Returns the rows that one set of tables and figures shows, by the suffix of their files.

    Each task has a part. Where its test has longer lists than its training, the trained lengths are one more."""
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    parts = {}
    for name, own in tasks.items():
        parts[name if len(tasks) > 1 else ""] = own
        if trained := of_trained_lengths(own, TASKS.get(name)):
            parts[f"{name}-{TRAINED}" if len(tasks) > 1 else TRAINED] = trained
    return parts


def save(figure: Figure, stem: Path) -> None:
    """Saves a figure as STEM.png and STEM.svg."""
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=150)
    figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})


def by_order(lines: Sequence[Line]) -> Figure:
    """Draws the paper's figure 2: accuracy against size of the state.

    The panels are: short list first, long list first, and their difference."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    short, long, difference = figure.subplots(1, len(PANELS))
    long.sharey(short)
    for axes, panel in zip((short, long, difference), PANELS, strict=True):
        _curves(axes, lines, panel)
        axes.set_title(panel)
    _percent(short)
    difference.set_ylabel("short minus long, points")
    _legend(figure)
    return figure


def frontier(lines: Sequence[Line]) -> Figure:
    """Draws mean accuracy over all sizes of examples against size of the state."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _curves(axes, lines, OVERALL)
    _percent(axes)
    _legend(figure)
    return figure


def _percent(axes: Axes) -> None:
    """The axis ends at 0 and 100%, also where the interval of a few seeds goes beyond."""
    axes.set_ylabel("answers right, %")
    axes.set_ylim(-2, 102)


def _curves(axes: Axes, lines: Sequence[Line], panel: str) -> None:
    """Draws one curve for each method, with 95% intervals over seeds. A single seed has no interval.

    Models with the same size of state are points above each other."""
    methods = dict.fromkeys(line.name for line in lines)
    for method, colour, marker in zip(methods, cycle(COLOURS), cycle(MARKERS), strict=False):
        own = sorted((line for line in lines if line.name == method), key=lambda line: line.state_bytes)
        means = [100 * line.panels[panel].mean for line in own]
        widths = [nan if (width := line.panels[panel].half_width) is None else 100 * width for line in own]
        states = [line.state_bytes for line in own]
        axes.errorbar(
            states, means, widths, label=method, color=colour, marker=marker, markersize=4, capsize=2, linewidth=1
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("state, bytes")
    axes.grid(alpha=0.3)


def _legend(figure: Figure) -> None:
    """Names the curves beside the panels, where they cover nothing."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")


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
    columns = min(4, len(shown))
    rows = ceil(len(shown) / columns)
    figure = Figure(figsize=(1 + 3 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(shown) :]:
        axes.remove()
    for axes, line in zip(panels, shown, strict=False):
        cells = [[100 * line.accuracy.get(f"{a}_{b}", float("nan")) for b in seconds] for a in firsts]
        image = axes.imshow(cells, vmin=0, vmax=100, origin="lower", cmap="viridis")
        axes.set_xticks(range(len(seconds)), seconds, rotation=90)
        axes.set_yticks(range(len(firsts)), firsts)
        axes.set_xlabel("second list, tokens")
        axes.set_title(f"{line.name}, {line.state_bytes:,} bytes", fontsize=9)
    figure.axes[0].set_ylabel("first list, tokens")
    figure.colorbar(image, ax=figure.axes, label="answers right, %")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthetics.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        print(draw_all(arguments.folder))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
