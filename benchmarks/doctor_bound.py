"""How far half precision goes apart by itself: what the bound of the probe has to allow, on classes that are right.

    python benchmarks/doctor_bound.py [--device cuda] [--json FILE]

For each class and precision, as shares of the largest logit: the spread of one row's logits over batches of 1, 2, 4 and 8
copies of it (`batches`); the spread where in half of the rows one of 64 embedding values is rounded to the other side
(`rounding`); and the largest deviation of the probe's checks (`deviation`), all of which are right in float32. A bound that
is below `deviation` blames a class that is right.
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
    """The largest difference of the measured row's logits to those of the row alone, as a share of the largest logit."""
    truth = trials.read(trials.row[None])[0].float()  # (T, V)
    many = [trials.read(trials.row.expand(size, -1)).float() for size in SIZES]
    return max(float((logits - truth).abs().max() / truth.abs().max()) for logits in many)


@torch.no_grad()
def measured(kind: str, dtype: torch.dtype, device: str) -> dict | None:
    """A row of the result; None for a class that is not right in float32."""
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
    rows = []
    for kind in available():
        for dtype in (torch.bfloat16, torch.float16):
            if row := measured(kind, dtype, arguments.device):
                rows.append(row)
                print(row, flush=True)
    for bound in ("4 x batches", "4 x rounding"):
        print(f"{sum(row[f'blamed by {bound}'] for row in rows)} of {len(rows)} are blamed by a bound of {bound}")
    print(f"written to {record.write('doctor_bound', rows, arguments.json)}")


if __name__ == "__main__":
    main()
