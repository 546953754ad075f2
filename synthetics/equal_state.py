"""Compares the ways to read at equal state: causal, causal twice, and with a prefix (paper section 3 and figure 2).

The questions are: is there a state at which prefix reading solves the task and causal reading does not, when the longer
list comes first? And how much of the gap between the two does reading twice close?
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from synthetics.summary import OVERALL, PANELS, Estimate, Line, table

SOLVED = 0.99  # least mean over all pairs, for a model that solves the task
LOST = 0.60  # a mean below this one, over the pairs with the longer list first, is a failure
_, LONG_FIRST, _ = PANELS
DEEP = "-deep"  # end of the names of methods with two more layers


@dataclass(frozen=True)
class EqualState:
    """Models of one width, feature size and window, trained equally long. Their states have equal sizes."""

    causal: Line
    prefix: Line
    twice: Line | None  # None: no such model was trained

    @property
    def separates(self) -> bool:
        """Whether prefix reading solves the task while causal reading fails with the longer list first."""
        return self.prefix.panels[OVERALL].mean >= SOLVED and self.causal.panels[LONG_FIRST].mean < LOST

    @property
    def closed(self) -> float | None:
        """The share of the gap between causal and prefix reading, longer list first, that reading twice closes.

        None if no model read twice, or if prefix reading is not better than causal reading."""
        if self.twice is None:
            return None
        causal, twice, prefix = (line.panels[LONG_FIRST].mean for line in (self.causal, self.twice, self.prefix))
        return (twice - causal) / (prefix - causal) if prefix > causal else None

    @property
    def estimates(self) -> dict[str, Estimate | None]:
        """The accuracies that are compared, by the name of their column. All but the first: longer list first."""
        return {
            "prefix, all pairs": self.prefix.panels[OVERALL],
            "prefix": self.prefix.panels[LONG_FIRST],
            "causal": self.causal.panels[LONG_FIRST],
            "twice": None if self.twice is None else self.twice.panels[LONG_FIRST],
        }


def equal_states(lines: Sequence[Line]) -> list[EqualState]:
    """Returns the sizes of state (and lengths of training) that have a causal and a prefix model, smallest first."""
    found: dict[tuple, dict[str, Line]] = {}
    for line in sorted(lines, key=lambda line: line.state_bytes):
        if LONG_FIRST in line.panels:
            size = (line.state_bytes, line.model, line.training, line.method.endswith(DEEP))
            found.setdefault(size, {})[line.method.removesuffix(DEEP)] = line
    return [
        EqualState(own["causal"], own["prefix"], own.get("twice"))
        for own in found.values()
        if {"causal", "prefix"} <= set(own)
    ]


def markdown(states: Sequence[EqualState]) -> str:
    """Returns a Markdown table of percentages and, below it, the answers to both questions."""
    names = ["state, bytes", "width", "feature size", "training"]
    names += [*states[0].estimates, "gap closed by twice", "separates"]
    body = [
        [
            *(f"{each.causal.state_bytes:,}", each.causal.width, each.causal.feature_dim, each.causal.training or "-"),
            *("-" if estimate is None else estimate for estimate in each.estimates.values()),
            "-" if each.closed is None else f"{100 * each.closed:.0f}",
            "yes" if each.separates else "no",
        ]
        for each in states
    ]
    compared = [each for each in states if each.closed is not None]
    most = [each for each in compared if each.closed is not None and each.closed > 0.5]
    text = (
        "Percent right at equal state, with the longer list first unless the column says all pairs:\n\n"
        f"{table(names, body)}\n\n"
        f"Prefix reading reaches {100 * SOLVED:.0f}% over all pairs and causal reading stays below {100 * LOST:.0f}% "
        f"(the size *separates* them) {_at([each for each in states if each.separates], states)}."
    )
    return text + f"\nReading twice closes more than half of the gap {_at(most, compared)}." if compared else text


def _at(some: Sequence[EqualState], of: Sequence[EqualState]) -> str:
    """Says at how many of the sizes, and at which."""
    sizes = ", ".join(f"{each.causal.state_bytes:,}" for each in some)
    return f"at {len(some)} of {len(of)} sizes of state" + (f" ({sizes} bytes)" if some else "")


def write_csv(states: Sequence[EqualState], file: Path) -> None:
    """Writes the sizes of state to a CSV file. Accuracies and the closed gap are shares; ± is half of the interval."""
    columns = [part for name in states[0].estimates for part in (name, f"{name} ±")]
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            ["state_bytes", "width", "feature_dim", "training", *columns, "gap closed by twice", "separates"]
        )
        for each in states:
            numbers = [
                part
                for estimate in each.estimates.values()
                for part in ((None, None) if estimate is None else (estimate.mean, estimate.half_width))
            ]
            model = (each.causal.state_bytes, each.causal.width, each.causal.feature_dim, each.causal.training)
            writer.writerow([*model, *numbers, each.closed, each.separates])
