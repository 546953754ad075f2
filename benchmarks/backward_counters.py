"""Hardware counters (Nsight Compute) of the Hopper and Triton kernels of a backward pass, beside each kernel's least time.

    python benchmarks/backward_counters.py [--backend cuda] [--output FILE]

The script starts itself again under `ncu`, as kernel_counters.py does. The least time is the larger of two: moving
inputs and outputs once, at the speed of a large copy; and the matrix products of the kernel's tiles, at the speed of a
large matrix product. Both speeds are measured in the same run.

Shapes: B batch, N tokens, H heads, d query/key size, D value size, C tokens of a chunk, R rows of a state with padding.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import record
import torch
from kernel_counters import COUNTERS, counted
from op_training import median_ms

from jrt import ops

HEADS, DIM, VALUE_DIM, CHUNK, ROWS = 16, 16, 64, 64, 160
SHAPES = ((8, 2048), (1, 32768))  # B, N
KERNEL = re.compile("backward_queries|backward_keys|backward_sums|queries_kernel|keys_kernel|piece_kernel|scan_kernel")
LAST = ("backward_keys", "keys_kernel")  # the last kernel of a backward pass
BACKENDS = ("cuda", "triton")
# A token and head of bf16: q, k, dq, dk take 2 d bytes each, v, o, do, dv 2 D each, the two weights 4 each.
BYTES = dict.fromkeys(("backward_queries", "backward_keys", "queries_kernel", "keys_kernel"), 488)
# Two operations for each multiplication of the tiles, a token and head: of C x C tiles, then of C x R tiles. The Triton
# kernels make the features by products as well.
OPERATIONS = {
    "backward_queries": 2 * CHUNK * (2 * DIM + VALUE_DIM) + 2 * ROWS * 2 * VALUE_DIM,
    "backward_keys": 2 * CHUNK * (2 * DIM + 2 * VALUE_DIM) + 2 * ROWS * 3 * VALUE_DIM,
    "queries_kernel": 2 * CHUNK * (2 * DIM + VALUE_DIM) + 2 * ROWS * (6 * DIM + 2 * VALUE_DIM),
    "keys_kernel": 2 * CHUNK * (2 * DIM + 2 * VALUE_DIM) + 2 * ROWS * (6 * DIM + 3 * VALUE_DIM),
}


def launch(backends: tuple[str, ...]) -> None:
    """Forward and backward with each backend at each shape, each kernel once."""
    torch.manual_seed(0)
    for backend, (batch, tokens) in itertools.product(backends, SHAPES):
        sizes = (DIM, DIM, VALUE_DIM)
        q, k, v = (torch.randn(batch, tokens, HEADS, n, device="cuda", dtype=torch.bfloat16) for n in sizes)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        o, _ = ops.linear_attention(q, k, v, backend=backend)
        o.backward(torch.randn_like(o))
    torch.cuda.synchronize()


def rates() -> tuple[float, float]:
    """Returns the bytes per second of a copy (read and written) and the operations per second of a bf16 product."""
    x = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = median_ms(lambda: y.copy_(x), 10), median_ms(lambda: a @ b, 10)
    return 2 * x.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: both")
    parser.add_argument("--launch", action="store_true", help="only run the kernels (what ncu starts)")
    parser.add_argument("--page", type=Path, default=Path("backward_counters.csv"), help="where ncu's raw page goes")
    parser.add_argument("--output", type=Path, help="where the JSON goes; the default is benchmarks/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    backends = BACKENDS if arguments.backend is None else (arguments.backend,)
    if arguments.launch:
        launch(backends)
        return
    if shutil.which("ncu") is None:
        parser.error("needs ncu, Nsight Compute, on PATH")
    bytes_a_second, operations_a_second = rates()
    launch(backends)  # compiles, so that ncu meets finished kernels
    command = ["ncu", "--clock-control", "none", "--kernel-name", f"regex:{KERNEL.pattern}", "--page", "raw", "--csv"]
    command += ["--metrics", ",".join(COUNTERS.values()), "--section", "SourceCounters"]
    command += [sys.executable, __file__, *sys.argv[1:], "--launch"]
    with open(arguments.page, "w") as page:
        subprocess.run(command, stdout=page, check=True)
    rows = counted(arguments.page, KERNEL)
    ends = [i for i, row in enumerate(rows) if row["method"] in LAST]
    runs = list(itertools.product(backends, SHAPES))
    for i, row in enumerate(rows):
        row["backend"], (batch, tokens) = runs[sum(end < i for end in ends)]
        row["shape"] = {"B": batch, "N": tokens, "H": HEADS, "d": DIM, "D": VALUE_DIM}
        if row["method"] in BYTES:
            count = batch * tokens * HEADS
            row["microseconds_by_bytes"] = 1e6 * count * BYTES[row["method"]] / bytes_a_second
            row["microseconds_by_products"] = 1e6 * count * OPERATIONS[row["method"]] / operations_a_second
        print(row)
    more = {"copy_bytes_a_second": bytes_a_second, "product_operations_a_second": operations_a_second}
    print(record.write("backward_counters", rows, arguments.output, **more))


if __name__ == "__main__":
    main()
