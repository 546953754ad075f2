"""Measures linear attention on a CPU: the chunked form against the quadratic form, and a prefix against causal text.

    python benchmarks/cpu_ops.py

Each method runs in its own process, so that its peak memory can be measured. Its result is first compared with fp64.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
from torch import Tensor

from jrt.ops import encode_prefix, linear_attention

HEADS, DIM, VALUE = 16, 16, 64
CHECKED_HEAD = 5
BOUNDS = {"chunked": "at least 10 x quadratic; extra memory < 4 x inputs", "encode_prefix": "at least 2 x chunked"}


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The quadratic form, one head at a time, because the scores of all heads would not fit into memory."""
    heads = []
    for head in range(q.shape[2]):
        s = q[:, :, head] @ k[:, :, head].mT / q.shape[-1] ** 0.5  # (B, T, T)
        scores = (1 + s + s * s / 2).tril()
        heads.append(scores @ v[:, :, head] / scores.sum(-1, keepdim=True))
    return torch.stack(heads, dim=2)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "quadratic": quadratic,
    "chunked": lambda q, k, v: linear_attention(q, k, v, backend="chunked")[0],
    "encode_prefix": lambda q, k, v: encode_prefix(k, v, backend="chunked").S,
}


def exact(method: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result of one head in fp64."""
    q, k, v = (x[:, :, CHECKED_HEAD : CHECKED_HEAD + 1].double() for x in (q, k, v))
    if method == "encode_prefix":
        return encode_prefix(k, v, backend="reference").S[:, 0]
    return linear_attention(q, k, v, backend="chunked")[0][:, :, 0]  # tests hold chunked fp64 to the definition


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def measure(method: str, length: int, repeats: int) -> dict:
    """Measures one row. It is called in a process of its own."""
    torch.manual_seed(0)
    METHODS[method](*(torch.randn(1, 64, HEADS, size) for size in (DIM, DIM, VALUE)))  # threads and libraries are up
    q, k, v = (torch.randn(1, length, HEADS, size) for size in (DIM, DIM, VALUE))
    inputs = sum(x.nbytes for x in (q, k, v))
    before, times = peak_bytes(), []
    result = None
    for _ in range(repeats):
        result = None
        start = time.perf_counter()
        result = METHODS[method](q, k, v)
        times.append(1e3 * (time.perf_counter() - start))
    extra = peak_bytes() - before
    head = result[:, CHECKED_HEAD] if method == "encode_prefix" else result[:, :, CHECKED_HEAD]
    truth = exact(method, q, k, v)
    return {
        "method": method,
        "shape": {"B": 1, "H": HEADS, "T": length, "d": DIM, "D": VALUE, "dtype": "float32"},
        "ms": statistics.median(times),
        "repeats": repeats,
        "extra_memory_over_inputs": extra / inputs,
        "error": ((head.double() - truth).norm() / truth.norm()).item(),
        "bound": BOUNDS.get(method),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        repeats = 2 if arguments.child == "quadratic" else 7
        print(json.dumps(measure(arguments.child, arguments.length, repeats)))
        return
    rows = []
    for method in METHODS:
        command = [sys.executable, __file__, "--child", method, "--length", str(arguments.length)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    times = {row["method"]: row["ms"] for row in rows}
    for row in rows:
        row["x_quadratic"] = times["quadratic"] / row["ms"]
        row["x_chunked"] = times["chunked"] / row["ms"]
        print(
            f"{row['method']:14} {row['ms']:9.1f} ms  {row['x_quadratic']:6.1f} x quadratic"
            f"  {row['x_chunked']:5.2f} x chunked  extra memory {row['extra_memory_over_inputs']:5.2f} x inputs"
            f"  error {row['error']:.1e}"
        )
    print(record.write("cpu_ops", rows, arguments.json, "cpu"))


if __name__ == "__main__":
    main()
