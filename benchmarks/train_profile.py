"""Measures where the time of a training step on one GPU goes: each kernel's share, by what it computes.

    python benchmarks/train_profile.py --rows "plain Transformer++ 360m" attention-360m

The rows and steps are those of benchmarks/train_throughput.py. Kernels of a training step run one after another, so
their durations add up to the busy time of the GPU; the rest of the step it waits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import record
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_throughput import ROWS, Row, training

from jrt.config import presets

STEPS = 5
OTHER = "norms, rotary, activations, sums"
# A kernel is of the first group that has one of the words in the kernel's name.
GROUPS = {
    "cross-entropy": ("liger", "cross_entropy", "log_softmax"),
    OTHER: ("triton_poi_", "triton_per_", "triton_red_"),  # made by torch.compile; their names tell the fused calls
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "attention": ("fmha", "flash", "cudnn", "sdpa", "flex"),
    "linear attention, scan": ("prefill", "backward_keys", "backward_queries", "_states", "scan", "linear_attention"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"),
    "copies": ("memcpy", "memset", "copy_", "fill"),
}


def group_of(kernel: str) -> str:
    """The group of a kernel's name."""
    name = kernel.lower()
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), OTHER)


def measure(row: Row, length: int, kept: int) -> dict:
    """The milliseconds of a step, of each group of kernels and of the `kept` longest kernels."""
    device = torch.device("cuda")
    model, step = training(row, length, device, True, presets().get(row.method))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step().item()  # waits for the device
        times.append(1e3 * (time.perf_counter() - began))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    launches: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            launches[event.name].append(event.time_range.elapsed_us() / 1e3 / STEPS)
    groups: dict[str, float] = defaultdict(float)
    for kernel, shares in launches.items():
        groups[group_of(kernel)] += sum(shares)
    longest = sorted(launches, key=lambda kernel: -sum(launches[kernel]))[:kept]
    del model
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return {
        "method": row.method,
        "shape": {"B": row.batch, "T": length},
        "ms": statistics.median(times),
        "busy_ms": sum(groups.values()),
        "groups": dict(sorted(groups.items(), key=lambda group: -group[1])),
        "kernels": [
            {
                "kernel": each[:90],
                "launches": len(launches[each]) // STEPS,
                "ms": sum(launches[each]),
                "of": group_of(each),
            }
            for each in longest
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [row.method for row in ROWS if not row.checkpointing]
    parser.add_argument("--rows", nargs="+", choices=names, default=["plain Transformer++ 360m", "attention-360m"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--kernels", type=int, default=40, help="how many kernels of each row are kept")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.set_float32_matmul_precision("high")
    results = []
    for row in (row for row in ROWS if row.method in options.rows and not row.checkpointing):
        results.append(measure(row, options.length, options.kernels))
        print(f"{row.method}: {results[-1]['ms']:.1f} ms a step, GPU busy {results[-1]['busy_ms']:.1f} ms")
        for group, ms in results[-1]["groups"].items():
            print(f"    {ms:7.2f} ms {group}")
        path = record.write("train_profile", results, options.output)
    print(path)


if __name__ == "__main__":
    main()
