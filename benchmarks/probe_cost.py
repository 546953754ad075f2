"""Measures the cost of the probe, the checks that `jrt eval` runs when it opens a model that is not of this project.

    python benchmarks/probe_cost.py [--json FILE]

The models are a Llama of SmolLM2-135M's sizes and the smallest published GPT-2, with random weights, on one thread. A
row has the probe's calls, tokens and processor seconds, and for comparison the seconds of opening the model and of
answering one prompt of 512 tokens with 48 new tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
from jrt_recall import PROTOCOLS
from jrt_recall.tokenizers import shipped_tokenizer
from recall_eval import write_llama
from transformers import GPT2Config, GPT2LMHeadModel

from jrt.evaluate import ModelSpec, open_model
from jrt.evaluate.answering import answer
from jrt.probe import probe


def write_gpt2(folder: Path) -> None:
    """GPT-2 124M with random weights and the shipped tokenizer."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/probe_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    writers: dict[str, Callable[[Path], None]] = {"llama-135m": write_llama, "gpt2-124m": write_gpt2}
    for name, write in writers.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            rows.append({"model": name, **measured(folder)})
            print(rows[-1], flush=True)
    print(f"written to {record.write('probe_cost', rows, arguments.json, 'cpu')}")


def measured(folder: str) -> dict[str, float]:
    """Returns calls and tokens of the probe, and the processor seconds of opening, probing and answering one prompt."""
    start = time.process_time()
    opened = open_model(ModelSpec(folder))
    open_seconds = time.process_time() - start
    tokens = 0

    def count(_module: torch.nn.Module, _args: tuple, given: dict) -> None:
        nonlocal tokens
        tokens += given["input_ids"].numel()

    hook = opened.model.register_forward_pre_hook(count, with_kwargs=True)
    start = time.process_time()
    findings = probe(opened.model)
    probe_seconds = time.process_time() - start
    hook.remove()
    opened.mode  # measured outside the time of the answer
    start = time.process_time()
    answer(opened, [list(range(100, 612))], PROTOCOLS["full"])
    return {
        "calls": findings.passes,
        "tokens": tokens,
        "open_seconds": open_seconds,
        "probe_seconds": probe_seconds,
        "prompt_seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    main()
