"""Measures how many tokens a second the mini models decode on a CPU, one sequence at a time, through `generate`.

    python benchmarks/cpu_decode.py
    git worktree add ../before COMMIT && python benchmarks/cpu_decode.py --before ../before

Decoded tokens are first compared with decoding without a cache; only right ones are timed. With `--before`, the code of
another checkout is compared with this one. The two take turns, each in its own process, and are compared by processor
time, because other programs on the machine change it least (`cpu_decode_before.json`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import record
import torch
from torch import Tensor

import jrt
from jrt.system.provenance import commit

ROOT = Path(__file__).parent.parent
MODELS = ("mini-jrt", "mini-based", "mini-mamba", "mini-attention")
PROMPT, NEW, CHECKED = 512, 200, 8


def make_prompt(model: jrt.JRTForCausalLM) -> Tensor:
    """(1, PROMPT) token ids."""
    return torch.randint(0, model.core.vocab_rows, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def seconds(model: jrt.JRTForCausalLM, prompt: Tensor, new: int) -> tuple[float, float]:
    """Returns the wall-clock seconds and the processor seconds of one call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    out = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert out.shape[1] == prompt.shape[1] + new
    return time.perf_counter() - start, time.process_time() - cpu_start


@torch.inference_mode()
def measure(name: str, repeats: int) -> dict:
    model = jrt.load(name)
    prompt = make_prompt(model)
    runs = [model.generate(prompt, max_new_tokens=CHECKED, do_sample=False, use_cache=cache) for cache in (True, False)]
    if not torch.equal(*runs):
        return {
            "method": name,
            "shape": {"B": 1, "T": PROMPT},
            "tokens_per_second": None,
            "reason": "differs from decoding without a cache",
        }
    prefill, rates = [], []
    for _ in range(repeats):
        first, _ = seconds(model, prompt, 1)
        prefill.append(1e3 * first)
        rates.append((NEW - 1) / (seconds(model, prompt, NEW)[0] - first))
    return {
        "method": name,
        "shape": {"B": 1, "T": PROMPT, "new": NEW},
        "tokens_per_second": statistics.median(rates),
        "fastest": max(rates),
        "prefill_ms": statistics.median(prefill),
        "bound": "mini-jrt: at least 300 tokens/s",
    }


@torch.inference_mode()
def print_processor_time(name: str) -> None:
    """Runs in each process of `beside`: prints the processor seconds of decoding NEW - 1 tokens."""
    model = jrt.load(name)
    prompt = make_prompt(model)
    seconds(model, prompt, 4)
    print(min(seconds(model, prompt, NEW)[1] - seconds(model, prompt, 1)[1] for _ in range(3)))


def beside(before: Path, name: str, threads: int, repeats: int) -> dict:
    """Measures tokens per processor second of this checkout and of the one at `before`, in turns."""
    rates: dict[Path, list[float]] = {ROOT: [], before: []}
    for _ in range(repeats):
        for root, found in rates.items():
            environment = os.environ | {"PYTHONPATH": str(root)}
            command = [sys.executable, __file__, "--processor-time", name, "--threads", str(threads)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found.append((NEW - 1) / float(done.stdout.split()[-1]))
    ratios = [here / there for here, there in zip(rates[ROOT], rates[before], strict=True)]
    return {
        "method": name,
        "shape": {"B": 1, "T": PROMPT, "new": NEW},
        "tokens_per_processor_second": statistics.median(rates[ROOT]),
        "tokens_per_processor_second_before": statistics.median(rates[before]),
        "times_before": statistics.median(ratios),
        "times_before_of_each_turn": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path, help="folder of another checkout")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processor-time", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.processor_time:
        print_processor_time(arguments.processor_time)
        return
    if arguments.before:
        rows = [beside(arguments.before.resolve(), name, arguments.threads, arguments.repeats) for name in MODELS]
        for row in rows:
            print(f"{row['method']:16} {row['times_before']:.2f} x before")
        more = {"threads": arguments.threads, "commit_before": commit(arguments.before)}
        print(record.write("cpu_decode_before", rows, arguments.json, "cpu", **more))
        return
    rows = [measure(name, arguments.repeats) for name in MODELS]
    for row in rows:
        rate, prefill = row["tokens_per_second"] or 0, row.get("prefill_ms", 0)
        print(f"{row['method']:16} {rate:7.0f} tokens/s   {prefill:7.1f} ms to read {PROMPT}")
    print(record.write("cpu_decode", rows, arguments.json, "cpu", threads=arguments.threads))


if __name__ == "__main__":
    main()
