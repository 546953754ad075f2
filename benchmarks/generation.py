"""Measures decoding through `generate` on one GPU: time to the first token, time per token, memory, and the floor.

The *floor* of a step is the least time it could take: reading the weights that it needs once, and reading and writing
its states, at the speed of a large copy on the same GPU. `ms_per_token` is the time after the prompt was read, divided
by the number of tokens after the first; copying the states into place is included.

Models have random weights, because time does not depend on them. JRT reads its prompt once. Based reads it twice, one
copy after the other, as the paper's prompts do. For comparison, a Llama model of transformers of the same size runs as
it is and with a static cache, which transformers compiles.

One row of each method (batch 16) also counts the bf16 tokens that differ from those of transformers' own loop. In fp32
none differ (tests/test_decoding.py). After the first difference the two texts go apart, so `first_difference` has its
position. `error` and `loop_error` say how far the logits of the second token are from those of the same weights in
fp32, here and in transformers' loop (the size of the difference over the size of the logits). `gap` is the difference
between the two largest fp32 logits, in the same unit, median over rows: where it is smaller than the errors, rounding
decides which token is chosen.

Shapes: B rows, N prompt tokens of a row, before it is read twice.

    python benchmarks/generation.py
    python benchmarks/generation.py --device cpu --models debug --new 8   # that the script runs, not a measurement
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import record
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from jrt import JRTConfig, JRTForCausalLM, presets
from jrt.ops import feature_count

SHAPES = ((1, 1024), (16, 1024), (128, 1024), (1, 4096), (16, 8192), (1, 16384), (1, 65536))
MODELS = ("jrt-360m", "llama-360m", "based-360m", "jrt-1.3b", "mamba-360m", "attention-360m")
OWN_LOOP = " (transformers' loop)"
LLAMAS = {"llama-360m": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24)}
REPEATS = 3
COMPARED = 64  # tokens of a row that are compared between the two loops
SLOW = 32  # tokens that a loop of one launch after the other decodes at most


@dataclasses.dataclass
class Row:
    """The result of one method at one shape. A value is None if it was not measured; `reason` then says why."""

    method: str
    shape: dict[str, int]
    first_token_ms: float | None = None
    ms_per_token: float | None = None
    tokens_per_s: float | None = None
    floor_ms: float | None = None
    percent_of_floor: float | None = None
    peak_bytes: int | None = None
    new_tokens: int | None = None
    compared_tokens: int | None = None
    differing_tokens: int | None = None
    first_difference: int | None = None
    error: float | None = None
    loop_error: float | None = None
    gap: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is run. loop: transformers' own loop instead of `jrt.decoding`."""

    name: str
    repeats: int = 1  # times the prompt is read
    arguments: dict = dataclasses.field(default_factory=dict)  # more arguments of `generate`
    loop: bool = False
    shapes: int = len(SHAPES)  # how many of the shapes, from the first on
    most: int | None = None  # new tokens at most

    def generate(self, model: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
        """(B, new) new tokens, greedy; nothing ends early."""
        return self._call(model, ids, new, self.arguments)[:, ids.shape[1] :]

    def second(self, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the first new token, and (B, vocabulary) the logits of the second, fp32."""
        keep = {"return_dict_in_generate": True, "output_logits": True}
        out = self._call(model, ids, 2, self.arguments | keep)
        return out.sequences[:, ids.shape[1]], out.logits[1].float()

    def _call(self, model: PreTrainedModel, ids: Tensor, new: int, arguments: dict):
        own = mock.patch.object(JRTForCausalLM, "_sample", GenerationMixin._sample)
        with own if self.loop else contextlib.nullcontext():
            return model.generate(
                ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **arguments
            )


def methods(name: str) -> list[Method]:
    """Returns the methods by which a model is measured, the main one first."""
    if name in LLAMAS:
        return [
            Method(name, shapes=3, most=SLOW),
            Method(f"{name} static", arguments={"cache_implementation": "static"}, shapes=1),
        ]
    repeats = 2 if name.startswith("based") else 1
    return [Method(name, repeats), Method(name + OWN_LOOP, repeats, loop=True, shapes=1, most=SLOW)]


def make_model(name: str, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        if name in LLAMAS:
            sizes = dict(vocab_size=50304, num_attention_heads=16, tie_word_embeddings=True)
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=131072, **sizes, **LLAMAS[name]))
        else:
            model = JRTForCausalLM(JRTConfig(architecture=presets()[name].to_dict()))
    return model.to(torch.bfloat16).eval()


def step_bytes(model: PreTrainedModel, batch: int, columns: int) -> int:
    """Returns the bytes that a step must move: weights once, states read and written, earlier keys and values read."""
    skipped = ("proj_k_enc", "proj_v_enc")  # read by the prefix encoder only
    total = sum(p.nbytes for name, p in model.named_parameters() if not any(part in name for part in skipped))
    half = 2
    if isinstance(model, LlamaForCausalLM):
        config = model.config
        return total + batch * 2 * config.num_hidden_layers * config.hidden_size * columns * half
    config = model.core
    if not config.tied:
        total -= model.get_input_embeddings().weight.nbytes
    row = 0
    for layer, letter in enumerate(config.pattern):
        match letter:
            case "C":
                row += 2 * half * (config.conv_kernel - 1) * config.conv_channels
            case "P" | "L":
                row += 2 * 4 * feature_count(config.feature_dim) * (config.width + config.linear_heads)
            case "S":
                row += 2 * half * config.width * min(config.window_of(layer), columns)
            case "A":
                row += 2 * half * config.width * columns
            case _:
                channels = config.mamba_expand * config.width
                row += 2 * channels * (half * (config.mamba_kernel - 1) + 4 * config.state_dim)
    return total + batch * row


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the median wall-clock seconds of a call, including the GPU's work."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bytes_per_ms(device: str) -> float:
    """Returns the speed of a copy of 1 GiB (4 MiB on a CPU). Bytes read and bytes written are both counted."""
    source = torch.empty((1 << 30) if device == "cuda" else 1 << 22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / (1e3 * seconds(lambda: target.copy_(source), device, 10))


def timed(model: PreTrainedModel, method: Method, ids: Tensor, new: int) -> tuple[float, float]:
    """Returns the seconds to read the prompt, and the seconds for everything after it."""
    device, read = model.device.type, type(model)._prefill
    ends: list[float] = []

    def watched(*arguments, **named):
        outputs = read(*arguments, **named)
        synchronize(device)
        ends.append(time.perf_counter())
        return outputs

    with mock.patch.object(type(model), "_prefill", watched):
        synchronize(device)
        start = time.perf_counter()
        method.generate(model, ids, new)
        synchronize(device)
    return ends[0] - start, time.perf_counter() - ends[0]


def measure(model: PreTrainedModel, method: Method, batch: int, length: int, new: int, speed: float) -> Row:
    device = model.device.type
    new = min(new, method.most or new)
    row = Row(method.name, {"B": batch, "N": length}, new_tokens=new)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    ids = ids.repeat(1, method.repeats)
    try:
        method.generate(model, ids, new)  # compiles and captures
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, rest = zip(*(timed(model, method, ids, new) for _ in range(REPEATS)), strict=True)
    except torch.cuda.OutOfMemoryError as error:
        row.reason = str(error).partition(".")[0]
        return row
    row.first_token_ms, step = 1e3 * statistics.median(first), 1e3 * statistics.median(rest) / (new - 1)
    row.ms_per_token, row.tokens_per_s = step, 1e3 * batch / step
    row.floor_ms = step_bytes(model, batch, ids.shape[1]) / speed
    row.percent_of_floor = 100 * row.floor_ms / step
    row.peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return row


def compare(model: PreTrainedModel, row: Row, method: Method, new: int) -> None:
    """Writes into `row` how many tokens differ between this method and transformers' own loop."""
    ids = torch.randint(0, model.config.vocab_size, (row.shape["B"], row.shape["N"])).to(model.device)
    ids = ids.repeat(1, method.repeats)
    loop = dataclasses.replace(method, loop=True)
    ours = method.generate(model, ids, new)
    theirs = loop.generate(model, ids, new)
    differs = (ours != theirs).any(0)
    row.compared_tokens, row.differing_tokens = ours.numel(), int((ours != theirs).sum())
    row.first_difference = int(differs.int().argmax()) if bool(differs.any()) else None

    firsts, logits = zip(method.second(model, ids), loop.second(model, ids), strict=True)
    free(model)
    exact = copy.deepcopy(model).float()
    first, truth = loop.second(exact, ids)
    same = (firsts[0] == first) & (firsts[1] == first)
    if bool(same.any()):
        truth = truth[same]
        row.error, row.loop_error = (float((x[same] - truth).norm() / truth.norm()) for x in logits)
        size = truth.pow(2).mean(-1).sqrt()
        best = truth.topk(2).values
        row.gap = float(((best[:, 0] - best[:, 1]) / size).median())


def free(model: nn.Module | None) -> None:
    if isinstance(model, JRTForCausalLM):
        model.sessions.kept.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--new", type=int, default=256, help="new tokens of a row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if unknown := set(arguments.models) - set(presets()) - set(LLAMAS):
        parser.error(f"unknown models {sorted(unknown)}: expected names out of {[*presets(), *LLAMAS]}")
    end = time.monotonic() + arguments.seconds
    speed = bytes_per_ms(arguments.device)
    more = {"bytes_per_ms": speed}
    shapes = SHAPES if arguments.device == "cuda" else ((1, 32), (2, 32))
    rows: list[Row] = []
    for name in arguments.models:
        model = make_model(name, arguments.device)
        for method in methods(name):
            for batch, length in shapes[: method.shapes]:
                row = Row(method.name, {"B": batch, "N": length}, reason="out of time")
                if time.monotonic() < end:
                    row = measure(model, method, batch, length, arguments.new, speed)
                if row.ms_per_token and (batch, length) == shapes[1] and not method.loop and name not in LLAMAS:
                    compare(model, row, method, min(arguments.new, COMPARED))
                rows.append(row)
                free(model)
                print(describe(row), flush=True)
            record.write(
                "generation", [dataclasses.asdict(row) for row in rows], arguments.output, arguments.device, **more
            )
        del model
        free(None)


def describe(row: Row) -> str:
    what = f"{row.method} B{row.shape['B']} N{row.shape['N']}:"
    if row.ms_per_token is None:
        return f"{what} {row.reason}"
    differs = ""
    if row.differing_tokens is not None:
        differs = f", {row.differing_tokens} of {row.compared_tokens} tokens differ"
    return (
        f"{what} first token {row.first_token_ms:.1f} ms, then {row.ms_per_token:.3f} ms a token"
        f" ({row.tokens_per_s:,.0f} tokens/s), {row.percent_of_floor:.0f}% of the floor{differs}"
    )


if __name__ == "__main__":
    main()
