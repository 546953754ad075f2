"""Figures of a run: accuracy by reading strategy, against the size of the state, and against the answer's place.

Each function returns a matplotlib Figure; pyplot, with its global state, is not used. `draw` renders all of them.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from jrt.evaluate.folder import Results
from jrt.evaluate.tables.results import size
from jrt.system.files import write_bytes, write_text

POSITION_BINS = 5
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":", "-.")
_LINE = "#333333"


def by_strategy(records: Sequence[dict]) -> Figure:
    """Bars: one group for each model, one bar for each strategy, with 95% intervals."""
    strategies = _unique(records, "strategy")
    width = 0.8 / len(strategies)
    colors = [colormaps["viridis"](0.85 - 0.7 * n / max(1, len(strategies) - 1)) for n in range(len(strategies))]
    figure, panels = _panels(records)
    for axis, found in panels:
        models = _unique(found, "model")
        for number, strategy in enumerate(strategies):
            members = [r for r in found if r["strategy"] == strategy]
            places = [models.index(r["model"]) + (number - (len(strategies) - 1) / 2) * width for r in members]
            axis.bar(places, [r["score"] for r in members], width, color=colors[number])
            _intervals(axis, places, members, _LINE)
        axis.set_xticks(range(len(models)), [_short(model) for model in models], rotation=20, ha="right")
    _legend(figure, [Patch(color=color, label=s) for s, color in zip(strategies, colors, strict=True)])
    return figure


def by_state(records: Sequence[dict]) -> Figure:
    """Points: accuracy against the bytes of the state after the prompt, with a line through each model's strategies."""
    colors, markers = _colors(records), dict(zip(_unique(records, "strategy"), cycle(_MARKERS), strict=False))
    figure, panels = _panels(records)
    for axis, found in panels:
        for model in _unique(found, "model"):
            members = [r for r in found if r["model"] == model]
            places = [r["state_bytes"] for r in members]
            axis.plot(places, [r["score"] for r in members], color=colors[model], alpha=0.5)
            for place, record in zip(places, members, strict=True):
                _intervals(axis, [place], [record], colors[model], markers[record["strategy"]])
        axis.set_xscale("log", base=2)
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".0", "")))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("state after the prompt, a sequence")
    marks = [Line2D([], [], color=_LINE, ls="", marker=marker, label=s) for s, marker in markers.items()]
    _legend(figure, [*_model_patches(colors), *marks])
    return figure


def by_position(predictions: Sequence[dict]) -> Figure:
    """Lines: accuracy against the answer's place in the context (0 start, 1 end), in POSITION_BINS equal bins."""
    rows = [row for row in predictions if row["position"] is not None]
    colors, dashes = _colors(rows), dict(zip(_unique(rows, "strategy"), cycle(_DASHES), strict=False))
    figure, panels = _panels(rows)
    for axis, found in panels:
        lines: dict[tuple[str, str], dict[int, list[int]]] = {}
        for row in found:
            place = min(POSITION_BINS - 1, int(row["position"] * POSITION_BINS))
            lines.setdefault((row["model"], row["strategy"]), {}).setdefault(place, []).append(row["score"])
        for (model, strategy), binned in lines.items():
            places = [(place + 0.5) / POSITION_BINS for place in sorted(binned)]
            means = [fmean(binned[place]) for place in sorted(binned)]
            axis.plot(places, means, marker="o", markersize=3, clip_on=False, color=colors[model], ls=dashes[strategy])
        axis.set_xlim(0, 1)
        axis.set_xlabel("place of the answer in the context (0 start, 1 end)")
    keys = [Line2D([], [], color=_LINE, ls=style, label=s) for s, style in dashes.items()]
    _legend(figure, [*_model_patches(colors), *keys])
    return figure


class Drawn(NamedTuple):
    """A figure as the bytes of a PNG file and the text of an <svg> element."""

    heading: str
    png: bytes
    svg: str


def draw(results: Results) -> dict[str, Drawn]:
    """All figures of a run, by file name without ending. Drawing takes seconds, so files and page share the result."""
    return {
        "accuracy": _drawn("Accuracy by reading strategy", by_strategy(results.records)),
        "state": _drawn("Accuracy against state", by_state(results.records)),
        "position": _drawn("Accuracy against the place of the answer", by_position(results.predictions)),
    }


def by_recall(records: Sequence[dict]) -> dict[str, Drawn]:
    """The paper's Figure 3 from the records of `jrt.evaluate.perplexity`: the perplexity of recall hits by distance and
    by frequency, a line for each model."""
    panels = {
        "distance": "tokens since the pair stood before",
        "frequency": "times the pair stands in other sequences",
    }
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    colors = _colors(records)
    for axis, (by, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        hits = [record for record in records if (record["slice"], record["by"]) == ("hit", by)]
        bins = sorted(_unique(hits, "bin"))
        for model, marker in zip(colors, cycle(_MARKERS), strict=False):
            own = {bins.index(record["bin"]): record["perplexity"] for record in hits if record["model"] == model}
            axis.plot(sorted(own), [own[place] for place in sorted(own)], marker=marker, color=colors[model])
        axis.set_xticks(range(len(bins)), [" ".join(name.split()) for name in bins], rotation=20, ha="right")
        axis.set_xlabel(label)
        axis.set_ylabel("perplexity of recall hits")
        axis.set_yscale("log")
        _plain(axis)
    _legend(figure, _model_patches(colors))
    return {"figure3": _drawn("Perplexity of recall hits", figure)}


def save(drawn: dict[str, Drawn], folder: Path) -> None:
    """Writes NAME.png and NAME.svg for each figure."""
    for name, figure in drawn.items():
        write_bytes(folder / f"{name}.png", figure.png)
        write_text(folder / f"{name}.svg", figure.svg)


def _drawn(heading: str, figure: Figure) -> Drawn:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150)
    figure.set_layout_engine("none")  # keeps the layout of the PNG
    figure.savefig(svg, format="svg")
    text = svg.getvalue()
    return Drawn(heading, png.getvalue(), text[text.index("<svg") :])


def _panels(rows: Sequence[dict]) -> tuple[Figure, list[tuple[Axes, list[dict]]]]:
    """A figure with one panel for each task, protocol and version of it, and the rows that belong there."""
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["protocol"], row.get("version", 1)), []).append(row)
    versions = Counter((task, protocol) for task, protocol, _ in groups)
    columns = max(1, min(2, len(groups)))
    lines = max(1, -(-len(groups) // columns))
    figure = Figure(figsize=(5.2 * columns, 3.8 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    for axis, (task, protocol, version) in zip(axes, groups, strict=False):
        which = f" version {version}" if versions[task, protocol] > 1 else ""
        axis.set_title(f"{task}, {protocol}{which}", fontsize="medium")
        axis.set_ylabel("accuracy (contains)")
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        _plain(axis)
    return figure, list(zip(axes, groups.values(), strict=False))


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend below all panels, in which a model or a strategy has the same color and marker."""
    if handles:
        inches = 0.55 + 0.07 * max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(4, len(handles), int(figure.get_figwidth() / inches)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _model_patches(colors: Mapping[str, str]) -> list[Patch]:
    return [Patch(color=color, label=_short(model)) for model, color in colors.items()]


def _colors(rows: Sequence[dict]) -> dict[str, str]:
    """A color for each model; matplotlib begins again after ten."""
    return {model: f"C{number}" for number, model in enumerate(_unique(rows, "model"))}


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def _intervals(axis: Axes, places: Sequence[float], rows: Sequence[dict], color: str, marker: str = "none") -> None:
    errors = [[r["score"] - r["low"] for r in rows], [r["high"] - r["score"] for r in rows]]
    axis.errorbar(places, [r["score"] for r in rows], errors, fmt=marker, color=color, capsize=2, clip_on=False)


def _unique(rows: Sequence[dict], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
