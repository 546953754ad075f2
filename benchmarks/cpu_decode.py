"""Tokens a second that the mini models decode on a CPU, one sequence at a time, through transformers' `generate`.

    python benchmarks/cpu_decode.py

The decoded tokens are compared with decoding without a cache before their time counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import record
import torch
from torch import Tensor

import jrt

MODELS = ("mini-jrt", "mini-based", "mini-mamba", "mini-attention")
PROMPT, NEW, CHECKED = 512, 200, 8


def seconds(model: jrt.JRTForCausalLM, prompt: Tensor, new: int) -> float:
    start = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert out.shape[1] == prompt.shape[1] + new
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, repeats: int) -> dict:
    model = jrt.load(name)
    prompt = torch.randint(0, model.core.vocab_rows, (1, PROMPT), generator=torch.Generator().manual_seed(0))
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
        first = seconds(model, prompt, 1)
        prefill.append(1e3 * first)
        rates.append((NEW - 1) / (seconds(model, prompt, NEW) - first))
    return {
        "method": name,
        "shape": {"B": 1, "T": PROMPT, "new": NEW},
        "tokens_per_second": statistics.median(rates),
        "fastest": max(rates),
        "prefill_ms": statistics.median(prefill),
        "bound": "mini-jrt: at least 300 tokens/s",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(name, arguments.repeats) for name in MODELS]
    for row in rows:
        rate, prefill = row["tokens_per_second"] or 0, row.get("prefill_ms", 0)
        print(f"{row['method']:16} {rate:7.0f} tokens/s   {prefill:7.1f} ms to read {PROMPT}")
    print(record.write("cpu_decode", rows, arguments.json, threads=arguments.threads))


if __name__ == "__main__":
    main()
