"""Figures of a run: accuracy by reading strategy, against state bytes, and against where the answer stands.

Each function makes a matplotlib Figure (no global state); `draw` renders all of them, for files and for a page.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jrt.evaluate.files import write_bytes, write_text

POSITION_BINS = 5
_MARKERS = "osD^vPX"


def by_strategy(records: Sequence[dict]) -> Figure:
    """Bars: one group a model, one bar a strategy, with 95% intervals; one panel for each task and protocol."""
    panels = _panels(records)
    figure, axes = _figure(len(panels))
    for axis, ((task, protocol), found) in zip(axes, panels.items(), strict=True):
        models, strategies = _unique(found, "model"), _unique(found, "strategy")
        width = 0.8 / len(strategies)
        for number, strategy in enumerate(strategies):
            members = [r for r in found if r["strategy"] == strategy]
            places = [models.index(r["model"]) + (number - (len(strategies) - 1) / 2) * width for r in members]
            axis.bar(
                places,
                [r["score"] for r in members],
                width,
                yerr=_errors(members),
                capsize=2,
                label=strategy,
                color=colormaps["viridis"](0.85 - 0.7 * number / max(1, len(strategies) - 1)),
            )
        axis.set_xticks(range(len(models)), [_short(model) for model in models], rotation=20, ha="right")
        _finish(axis, f"{task}, {protocol}")
        axis.legend(frameon=False, fontsize="small")
    return figure


def by_state(records: Sequence[dict]) -> Figure:
    """Points: accuracy against the bytes that a sequence leaves behind, a line through a model's strategies."""
    panels = _panels(records)
    figure, axes = _figure(len(panels))
    for axis, ((task, protocol), found) in zip(axes, panels.items(), strict=True):
        strategies = _unique(found, "strategy")
        for number, model in enumerate(_unique(found, "model")):
            members = [r for r in found if r["model"] == model]
            color = colormaps["tab10"](number % 10)
            axis.plot([r["state_bytes"] for r in members], [r["score"] for r in members], color=color, alpha=0.5)
            for record in members:
                marker = _MARKERS[strategies.index(record["strategy"]) % len(_MARKERS)]
                label = f"{_short(model)}, {record['strategy']}"
                place = ([record["state_bytes"]], [record["score"]])
                axis.errorbar(*place, yerr=_errors([record]), fmt=marker, color=color, capsize=2, label=label)
        axis.set_xscale("log")
        axis.set_xlabel("state after the prompt (bytes a sequence)")
        _finish(axis, f"{task}, {protocol}")
        axis.legend(frameon=False, fontsize="x-small")
    return figure


def by_position(predictions: Sequence[dict]) -> Figure:
    """Lines: accuracy against the answer's place in the context read (0: start, 1: end), in five equal bins."""
    panels = _panels([row for row in predictions if row["position"] is not None])
    figure, axes = _figure(max(1, len(panels)))
    for axis, ((task, protocol), found) in zip(axes, panels.items(), strict=False):
        for number, model in enumerate(_unique(found, "model")):
            for strategy, style in zip(_unique(found, "strategy"), ("-", "--", ":", "-.") * 8, strict=False):
                members = [r for r in found if (r["model"], r["strategy"]) == (model, strategy)]
                binned: dict[int, list[int]] = {}
                for row in members:
                    binned.setdefault(min(POSITION_BINS - 1, int(row["position"] * POSITION_BINS)), []).append(
                        row["score"]
                    )
                places = [(place + 0.5) / POSITION_BINS for place in sorted(binned)]
                means = [sum(binned[place]) / len(binned[place]) for place in sorted(binned)]
                color = colormaps["tab10"](number % 10)
                axis.plot(
                    places, means, style, marker="o", markersize=3, color=color, label=f"{_short(model)}, {strategy}"
                )
        axis.set_xlim(0, 1)
        axis.set_xlabel("place of the answer in the context")
        _finish(axis, f"{task}, {protocol}")
        axis.legend(frameon=False, fontsize="x-small")
    return figure


class Drawn(NamedTuple):
    """A figure as the bytes of a PNG file and the text of an <svg> element."""

    heading: str
    png: bytes
    svg: str


def draw(records: Sequence[dict], predictions: Sequence[dict]) -> dict[str, Drawn]:
    """All figures of a run by their file names; drawing takes seconds, so once is enough."""
    return {
        "accuracy": _drawn("Accuracy by reading strategy", by_strategy(records)),
        "state": _drawn("Accuracy against state", by_state(records)),
        "position": _drawn("Accuracy against the place of the answer", by_position(predictions)),
    }


def save(drawn: dict[str, Drawn], folder: Path) -> None:
    """Writes NAME.png and NAME.svg for each figure."""
    for name, figure in drawn.items():
        write_bytes(folder / f"{name}.png", figure.png)
        write_text(folder / f"{name}.svg", figure.svg)


def _drawn(heading: str, figure: Figure) -> Drawn:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150)
    figure.set_layout_engine("none")  # the layout stands
    figure.savefig(svg, format="svg")
    text = svg.getvalue()
    return Drawn(heading, png.getvalue(), text[text.index("<svg") :])


def _panels(rows: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["protocol"]), []).append(row)
    return found


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_ylabel("accuracy (contains)")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def _errors(records: Sequence[dict]) -> list[list[float]]:
    return [[r["score"] - r["low"] for r in records], [r["high"] - r["score"] for r in records]]


def _unique(rows: Sequence[dict], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
