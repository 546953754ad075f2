"""Measures how much the logits of correct model classes vary in half precision.

The probe (`jrt doctor`) must allow this much, or it would report correct classes as wrong.

    python benchmarks/doctor_bound.py [--device cuda] [--json FILE]

A row is one class in one precision. It has three numbers, as shares of the largest logit. `batches`: the spread of one
row's logits over batches of 1, 2, 4 and 8 copies of it. `rounding`: the spread if one of 64 embedding values is rounded
in the other direction in half of the rows. `deviation`: the largest deviation in the probe's checks. All these classes
are right in float32, so a bound below `deviation` would be too strict.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import record
import torch
from tiny_models import CONTROLS, available, tiny_model

from jrt.probe import probe
from jrt.probe.trials import SPREADS, Trials

SIZES = (2, 4, 8)


def spread_over_batches(trials: Trials) -> float:
    """Returns the largest difference between a row's logits in a batch and alone, as a share of the largest logit."""
    truth = trials.read(trials.row[None])[0].float()  # (T, V)
    many = [trials.read(trials.row.expand(size, -1)).float() for size in SIZES]
    return max(float((logits - truth).abs().max() / truth.abs().max()) for logits in many)


@torch.no_grad()
def measured(kind: str, dtype: torch.dtype, device: str) -> dict | None:
    """Returns a row of the result, or None for a class that is not right in float32."""
    if not all(check.holds for check in probe(tiny_model(kind).to(device)).checks):
        return None
    model = tiny_model(kind).to(device, dtype)
    found = probe(model)
    deviation = max(check.deviation or 0.0 for check in found.checks)
    return {
        "kind": kind,
        "control": kind in CONTROLS,
        "dtype": str(dtype).removeprefix("torch."),
        "batches": spread_over_batches(Trials(model, 0)),
        "rounding": found.checks[0].bound / SPREADS,
        "deviation": deviation,
        "blamed by 4 x batches": deviation > SPREADS * spread_over_batches(Trials(model, 0)),
        "blamed by 4 x rounding": any(check.holds is False for check in found.checks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/doctor_bound.json")
    arguments = parser.parse_args()
    rows: list[dict] = []
    written: Path | None = None
    for kind in available():
        for dtype in (torch.bfloat16, torch.float16):
            if row := measured(kind, dtype, arguments.device):
                rows.append(row)
                print(row, flush=True)
                written = record.write(
                    "doctor_bound", rows, arguments.json
                )  # so that a run that is cut off is not lost
    for bound in ("4 x batches", "4 x rounding"):
        print(f"{sum(row[f'blamed by {bound}'] for row in rows)} of {len(rows)} are blamed by a bound of {bound}")
    print(f"written to {written}")


if __name__ == "__main__":
    main()
