"""Measures how long a user waits for the first answer of a model of the released sizes.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --device cpu --models debug     # that the script runs, not a measurement

The time goes from the start of a Python process to the end of its first answer: imports, loading a safetensors
checkpoint of random weights, reading a prompt of 1,024 tokens, and generating 32. Compiled kernels are in no cache. A
second process then finds the kernels that the first one left in its caches: `again_s`. `first` and `again` are the
seconds of each part; the prompt's part includes one new token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.time()

import record  # noqa: E402 - the imports are timed
import torch  # noqa: E402

import jrt  # noqa: E402
from jrt import JRTConfig, JRTForCausalLM, presets  # noqa: E402

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "JRT_HOME")
PROMPT = {"cuda": 1024, "cpu": 32}
NEW_TOKENS = 32


def save(name: str, folder: str, device: str) -> None:
    """Saves a random model of this preset in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = JRTForCausalLM(JRTConfig(architecture=presets()[name].to_dict()))
    model.to(torch.bfloat16).save_pretrained(folder)


def answer(folder: str, device: str) -> dict[str, float]:
    """What the timed process does. Returns when each part ended, in seconds since the epoch."""
    ended = {"python": STARTED, "imports": time.time()}
    torch.zeros(1, device=device)
    ended["device"] = time.time()
    model = jrt.load(folder, device, torch.bfloat16)
    ended["weights"] = time.time()
    ids = torch.arange(PROMPT[device], device=device)[None] % model.config.vocab_size
    for part, tokens in (("prompt", 1), ("answer", NEW_TOKENS)):
        model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()
        ended[part] = time.time()
    return ended


def seconds(folder: str, caches: str, device: str) -> dict[str, float]:
    """Seconds of each part of a new process, and of all together."""
    environment = os.environ | {cache: f"{caches}/{cache}" for cache in CACHES}
    command = [sys.executable, __file__, "--answer", folder, "--device", device]
    start = time.time()
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    ended = json.loads(output.splitlines()[-1])
    parts = [after - before for before, after in itertools.pairwise([start, *ended.values()])]
    return dict(zip(ended, parts, strict=True)) | {"all": ended["answer"] - start}


def measure(name: str, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as caches:
        save(name, folder, device)
        if device == "cuda":
            torch.cuda.empty_cache()
        first, again = (seconds(folder, caches, device) for _ in range(2))
    print(f"{name}: first answer {first['all']:.1f} s after the start of a process, again {again['all']:.1f} s")
    print(f"first {first}\nagain {again}")
    return {
        "model": name, "first_s": first["all"], "again_s": again["all"], "first": first, "again": again,
        "prompt": PROMPT[device], "new_tokens": NEW_TOKENS,
    }  # fmt: skip


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
        print(json.dumps(answer(arguments.answer, arguments.device)))
        return
    if unknown := set(arguments.models) - set(presets()):
        parser.error(f"unknown models {sorted(unknown)}: expected names out of {list(presets())}")
    rows = []
    for name in arguments.models:
        rows.append(measure(name, arguments.device))
        record.write("cold_start", rows, arguments.output, arguments.device)


if __name__ == "__main__":
    main()
