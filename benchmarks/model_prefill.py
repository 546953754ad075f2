"""Measures the time to the first token of whole JRT models through `generate`, with and without the Hopper kernels.

Weights are random, because time does not depend on them. Before timing, the last token's logits of the two backends are
compared. They may differ by bf16 rounding errors, which add up over the layers.

Shapes: B batch, N prompt tokens.

    python benchmarks/model_prefill.py
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from unittest import mock

import record
import torch
from torch import Tensor

from jrt import presets
from jrt.configuration_jrt import JRTConfig
from jrt.modeling_jrt import JRTForCausalLM
from jrt.ops import cuda, extension

MODELS = ("jrt-360m", "jrt-1.3b")
SHAPES = ((1, 2048), (16, 2048), (1, 8192), (4, 8192))
BOUND = 0.05  # relative difference of logits between two bf16 computations of 24 and more layers
REPEATS = 10


def backend(kernels: bool) -> contextlib.AbstractContextManager:
    """Inside this context, the Hopper kernels are used if they can run (kernels true), or not at all."""
    return contextlib.nullcontext() if kernels else mock.patch.object(cuda, "unsupported", lambda *_: "switched off")


def first_token_ms(model: JRTForCausalLM, ids: Tensor) -> float:
    times = []
    for repeat in range(2 + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(name: str, model: JRTForCausalLM, batch: int, length: int) -> list[dict]:
    ids = torch.randint(0, model.core.vocab_rows, (batch, length), device="cuda")
    logits, rows = {}, []
    for kernels in (True, False):
        row = {"method": name, "kernels": kernels, "shape": {"B": batch, "N": length}, "ms": None, "reason": ""}
        try:
            with backend(kernels):
                logits[kernels] = model(ids, logits_to_keep=1).logits.float()
                row["ms"] = first_token_ms(model, ids)
        except torch.cuda.OutOfMemoryError as error:
            row["reason"] = str(error).partition(".")[0]
        rows.append(row)
        torch.cuda.empty_cache()
    if len(logits) == 2:
        error = ((logits[True] - logits[False]).norm() / logits[False].norm()).item()
        for row in rows:
            row |= {"error": error, "bound": BOUND}
            if not error <= BOUND:
                row |= {"ms": None, "reason": f"logits differ by {error:.3f}"}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if reason := extension.missing(torch.cuda.current_device()):
        parser.error(reason)
    rows = []
    for name in MODELS:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = JRTForCausalLM(JRTConfig(architecture=presets()[name].to_dict()))
        model = model.to(torch.bfloat16).eval()
        with torch.no_grad():
            for batch, length in SHAPES:
                rows += measure(name, model, batch, length)
                on, off = rows[-2:]
                reasons = " ".join(filter(None, (on["reason"], off["reason"])))
                print(f"{name} B{batch} N{length}: with kernels {on['ms']} ms, without {off['ms']} ms {reasons}")
        del model
        torch.cuda.empty_cache()
    record.write("model_prefill", rows, arguments.output)


if __name__ == "__main__":
    main()
