"""Times the Hopper kernels with each number of pieces that a sequence may be cut into.

    python benchmarks/kernel_pieces.py

kernels/pieces.cpp has a formula that chooses the number of pieces. It was fitted to these times and is checked by them.
The script prints for each shape the best number, the number that the formula chooses, and how much longer that takes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from unittest import mock

import kernel_versions
import record
import torch

from jrt import ops
from jrt.ops import extension

HEADS, DIM, VALUE_DIM = 16, 16, 64
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 17, 18, 20, 24)
LENGTHS = (512, 2048, 8192, 32768)
PIECES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 24)
MOST_TOKENS, MOST_BLOCKS = 24 * 16384, 800  # of all sequences; of all pieces
ROUNDS = 6


def measure(batch: int, tokens: int) -> list[dict]:
    """Measures one shape. Returns one row for each op and number of pieces."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, HEADS, size, device="cuda", dtype=torch.bfloat16) for size in (DIM, DIM, VALUE_DIM)
    )
    calls = {
        "causal": lambda: ops.linear_attention(q, k, v, backend="cuda"),
        "prefix": lambda: ops.encode_prefix(k, v, backend="cuda"),
    }
    kernels = extension.module()
    sizes = (batch, tokens, HEADS, VALUE_DIM)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for op, call in calls.items():
        chosen = kernels.prefill_pieces(*sizes, op == "prefix", multiprocessors)
        chunks = -(-tokens // 64)
        wanted = {chosen, *(n for n in PIECES if n == 1 or (n <= chunks // 2 and n * batch * HEADS <= MOST_BLOCKS))}
        for pieces in sorted({-(-chunks // -(-chunks // n)) for n in wanted}):
            with mock.patch.object(kernels, "prefill_pieces", lambda *_, pieces=pieces: pieces):
                graph = kernel_versions.graph_of(call)
            times = [kernel_versions.milliseconds(graph) for _ in range(ROUNDS)][2:]
            rows.append({"op": op, "B": batch, "N": tokens, "pieces": pieces, "ms": round(statistics.median(times), 5)})
            rows[-1]["chosen"] = pieces == chosen
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/kernel_pieces.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a Hopper GPU")
    rows, ratios = [], []
    for tokens, batch in itertools.product(LENGTHS, BATCHES):
        if batch * tokens > MOST_TOKENS:
            continue
        measured = measure(batch, tokens)
        rows += measured
        for op in ("causal", "prefix"):
            ours = [row for row in measured if row["op"] == op]
            best = min(ours, key=lambda row: row["ms"])
            chosen = next(row for row in ours if row["chosen"])
            ratios.append(chosen["ms"] / best["ms"])
            print(
                f"{op} B{batch} N{tokens}: best {best['pieces']} ({best['ms']:.4f} ms), "
                f"chosen {chosen['pieces']} ({ratios[-1]:.3f} x)"
            )
    over_best = {"mean": round(statistics.mean(ratios), 4), "worst": round(max(ratios), 4)}
    print(over_best)
    print(record.write("kernel_pieces", rows, arguments.output, chosen_over_best=over_best))


if __name__ == "__main__":
    main()
