"""Measures how long a user waits for the first answer of a model of the released sizes.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --device cpu --models debug     # that the script runs, not a measurement

The time goes from the start of a Python process to the end of its first answer: imports, loading a safetensors
checkpoint of random weights, reading a prompt of 1,024 tokens, and generating 32. Compiled kernels are in no cache. A
second process then finds the kernels that the first one left in its caches: `again_s`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch

import jrt
from jrt import JRTConfig, JRTForCausalLM, presets

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "JRT_HOME")
PROMPT = {"cuda": 1024, "cpu": 32}


def save(name: str, folder: str, device: str) -> None:
    """Saves a random model of this preset in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = JRTForCausalLM(JRTConfig(architecture=presets()[name].to_dict()))
    model.to(torch.bfloat16).save_pretrained(folder)


def answer(folder: str, device: str) -> None:
    """What the timed process does."""
    model = jrt.load(folder, device, torch.bfloat16)
    ids = torch.arange(PROMPT[device], device=device)[None] % model.config.vocab_size
    model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()


def seconds(folder: str, caches: str, device: str) -> float:
    environment = os.environ | {cache: f"{caches}/{cache}" for cache in CACHES}
    start = time.perf_counter()
    command = [sys.executable, __file__, "--answer", folder, "--device", device]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(name: str, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as caches:
        save(name, folder, device)
        if device == "cuda":
            torch.cuda.empty_cache()
        first, again = (seconds(folder, caches, device) for _ in range(2))
    print(f"{name}: first answer {first:.1f} s after the start of a process, with kernels in the cache {again:.1f} s")
    return {"model": name, "first_s": first, "again_s": again, "prompt": PROMPT[device], "new_tokens": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["jrt-360m", "jrt-1.3b"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--answer", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if arguments.answer:
        answer(arguments.answer, arguments.device)
        return
    if unknown := set(arguments.models) - set(presets()):
        parser.error(f"unknown models {sorted(unknown)}: expected names out of {list(presets())}")
    rows = []
    for name in arguments.models:
        rows.append(measure(name, arguments.device))
        record.write("cold_start", rows, arguments.output)


if __name__ == "__main__":
    main()
