"""Summarises the results of a sweep: one line for each model, with its best learning rate and the mean over seeds."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from synthetics.data import Task
from synthetics.set_disjointness import SetDisjointness

# Two-sided 95% points of Student's t by number of seeds. More than ten seeds use the last, a little too wide.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
PANELS = ("short list first", "long list first", "difference")
OVERALL = "mean"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95% interval (None with fewer than two seeds)."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        if len(values) < 2:
            return cls(mean(values), None)
        t = T_95[min(len(values), max(T_95))]
        return cls(mean(values), t * stdev(values) / len(values) ** 0.5)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + ("" if self.half_width is None else f" ± {100 * self.half_width:.1f}")


@dataclass(frozen=True)
class Line:
    """One model at its best learning rate."""

    method: str
    training: str  # numbers of epochs and examples of a batch, if the sweep has several; else empty
    width: int
    feature_dim: int
    window: int | None
    state_bytes: int
    rate: float
    seeds: int
    seconds: float  # of the device, for all rates and seeds of the model
    panels: dict[str, Estimate]  # OVERALL, and of PANELS those that the sizes allow
    accuracy: dict[str, float]  # by size of the examples, mean over seeds

    @property
    def name(self) -> str:
        """The line's name in tables and figures."""
        return f"{self.method}, {self.training}" if self.training else self.method

    @property
    def model(self) -> tuple[int, int, int | None]:
        return self.width, self.feature_dim, self.window


def pair_of(size: str) -> tuple[int, int] | None:
    """Returns the two lengths in a size such as "4_16", or None for a size of another task."""
    found = re.fullmatch(r"(\d+)_(\d+)", size)
    return (int(found[1]), int(found[2])) if found else None


def panels_of(accuracy: dict[str, float]) -> dict[str, float]:
    """Returns mean accuracies: over all sizes, and over the pairs whose first list is the shorter or the longer one.

    A mean over no pair is left out, and so is the difference from it."""
    found = {OVERALL: mean(accuracy.values())}
    pairs = {pair: share for size, share in accuracy.items() if (pair := pair_of(size))}
    short = [share for (first, second), share in pairs.items() if first < second]
    long = [share for (first, second), share in pairs.items() if first > second]
    found |= {panel: mean(shares) for panel, shares in zip(PANELS, (short, long), strict=False) if shares}
    if short and long:
        found[PANELS[2]] = mean(short) - mean(long)
    return found


def longest_pair(task: Task | None) -> int | None:
    """Tokens of the longest pair of lists that the task trains on; None without a task, and for one without pairs."""
    return max(map(sum, task.train)) if isinstance(task, SetDisjointness) else None


def of_trained_lengths(rows: Sequence[dict], task: Task | None) -> list[dict]:
    """Returns the rows without those pairs of lists that are longer together than all pairs of the task's training.

    The list is empty if no pair is longer, or if the task has no pairs. task: read where the rows of an older version do
    not tell what they were trained on."""
    pairs = {size: pair for size in rows[0]["accuracy"] if (pair := pair_of(size))}
    longest = rows[0].get("longest_trained") or longest_pair(task)
    if longest is None or not pairs:
        return []
    kept = [size for size, pair in pairs.items() if sum(pair) <= longest]
    if not 0 < len(kept) < len(pairs):
        return []
    return [{**row, "accuracy": {size: row["accuracy"][size] for size in kept}} for row in rows]


def summarize(rows: Sequence[dict]) -> list[Line]:
    """Returns one line for each model of one task, sorted by method and size of the state.

    Models of one method and size that were trained for other numbers of epochs, or in batches of another size, have
    lines of their own, with the numbers in `training`. All panels use the same learning rate: the one with the
    best mean over all sizes and seeds. A rate with more finished seeds is preferred to any rate with fewer.
    """
    assert len({row["task"] for row in rows}) == 1, "seeds of different tasks have no mean"
    models: dict[tuple, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    lengths = {(row["epochs"], row["batch"]) for row in rows}
    for row in rows:
        training = f"{row['epochs']} epochs, batch {row['batch']}" if len(lengths) > 1 else ""
        key = (row["method"], training, row["state_bytes"], row["width"], row["feature_dim"], row["window"])
        models[key][row["rate"]].append(row)
    lines = []
    for (method, training, state, width, feature_dim, window), rates in models.items():
        best = max(rates.values(), key=lambda runs: (len(runs), mean(mean(run["accuracy"].values()) for run in runs)))
        each = [panels_of(run["accuracy"]) for run in best]
        lines.append(
            Line(
                method=method,
                training=training,
                width=width,
                feature_dim=feature_dim,
                window=window,
                state_bytes=state,
                rate=best[0]["rate"],
                seeds=len(best),
                seconds=sum(run["seconds"] for runs in rates.values() for run in runs),
                panels={name: Estimate.of([panels[name] for panels in each]) for name in each[0]},
                accuracy={size: mean(run["accuracy"][size] for run in best) for size in best[0]["accuracy"]},
            )
        )
    return sorted(lines, key=lambda line: (line.name, line.state_bytes, line.model[:2], line.window or 0))


def markdown(lines: Sequence[Line]) -> str:
    """Returns the lines as a Markdown table, with accuracies in percent."""
    panels = list(lines[0].panels)
    names = ["method", "width", "feature size", "window", "state, bytes", "rate", "seeds", *panels, "seconds"]
    body = [
        [
            *(line.name, line.width, line.feature_dim, line.window or "-", f"{line.state_bytes:,}"),
            *(f"{line.rate:g}", line.seeds, *(line.panels[name] for name in panels), f"{line.seconds:.0f}"),
        ]
        for line in lines
    ]
    return table(names, body)


def table(names: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table of columns with these names."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (names, ["---"] * len(names), *body))


def write_csv(lines: Sequence[Line], file: Path) -> None:
    """Writes the lines to a CSV file. Accuracies are shares from 0 to 1."""
    panels, sizes = list(lines[0].panels), list(lines[0].accuracy)
    names = ["width", "feature_dim", "window", "state_bytes", "rate", "seeds", "seconds"]
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["method", *names, *(part for name in panels for part in (name, f"{name} ±")), *sizes])
        for line in lines:
            estimates = [part for name in panels for part in (line.panels[name].mean, line.panels[name].half_width)]
            writer.writerow([line.name, *(getattr(line, name) for name in names), *estimates, *line.accuracy.values()])
