"""Measures training speed on one GPU: every family and size at T = 2,048, beside a plain PyTorch Transformer++.

    python benchmarks/train_throughput.py                       # all rows, to benchmarks/results/train_throughput.json
    python benchmarks/train_throughput.py --rows jrt-360m --steps 5

Tokens are synthetic. A step is what train/loop.py does with one pass: targets, forward and backward in bf16 autocast,
gradient clipping, fused AdamW. `mfu` is 6 N tokens/s over the device's dense bf16 peak; `mfu_with_mixers` adds what the
mixers compute (jrt.training.flops.flops_per_token). `first_step_s` starts before the model is built, so compiling is in it.
The speed is the median of WINDOWS times `--steps` steps in a row. The device is waited for between windows only, because
train/loop.py waits for it only where it reports.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from record import write
from torch import Tensor, nn

from jrt.config import Config, presets
from jrt.model import LanguageModel
from jrt.ops.backends import choose
from jrt.ops.call import Call, ScanCall
from jrt.ops.selective_scan import choose as choose_scan
from jrt.training.flops import flops_per_token, peak_flops
from jrt.training.loss import ModelWithLoss, has_liger, loss_of, room_for
from jrt.training.objective import Objective, prefix_of


@dataclass(frozen=True)
class Row:
    """What is timed in one row of the result."""

    method: str
    batch: int
    checkpointing: bool = False


ROWS = (
    Row("plain Transformer++ 360m", 16),
    Row("attention-360m", 16),
    Row("based-360m", 16),
    Row("jrt-360m", 16),
    Row("jrt-360m", 16, checkpointing=True),
    Row("mamba-360m", 8),
    Row("plain Transformer++ 1.3b", 8),
    Row("attention-1.3b", 8),
    Row("based-1.3b", 8),
    Row("jrt-1.3b", 8),
    Row("mamba-1.3b", 4),
)
PLAIN = {"360m": (24, 1024, 2816), "1.3b": (24, 2048, 5632)}  # layers, width, SwiGLU units
PLAIN_ROWS = 50304
WINDOWS = 3


@dataclass
class Timed:
    """The measurements of one row."""

    first_step: float
    seconds: list[float] = field(default_factory=list)  # of a step, one for each window
    memory: int = 0


class PlainBlock(nn.Module):
    """A simple block: RMSNorm, SDPA with rotary positions, SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, 64).permute(2, 0, 3, 1, 4)  # (B, H, T, 64)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        value, gate = self.fc1(self.norm2(x)).chunk(2, dim=-1)
        return x + self.fc2(value * F.silu(gate))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class PlainTransformer(nn.Module):
    """A Transformer++ with tied embeddings. Its loss keeps the logits of all tokens in memory."""

    def __init__(self, layers: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PLAIN_ROWS, width)
        self.blocks = nn.ModuleList(PlainBlock(width, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.outer(
            torch.arange(ids.shape[1] - 1, device=ids.device), 1e4 ** (-torch.arange(0, 64, 2, device=ids.device) / 64)
        )
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def plain(size: str, device: torch.device, compiles: bool):
    """Returns a plain model and the function from ids to its loss, compiled as one."""
    model = PlainTransformer(*PLAIN[size]).to(device)
    return model, (torch.compile(model, dynamic=False) if compiles else model)


def ours(config: Config, row: Row, length: int, device: torch.device, compiles: bool):
    """Returns a model of this project and the function from ids to its loss, as train/loop.py computes it."""
    kind = "jrt" if config.has("P") else "causal"
    objective = Objective(kind, config.vocab_rows - 1)
    prefix = prefix_of(config, kind, length)
    model = LanguageModel(config).to(device)
    model.init_weights()
    module = ModelWithLoss(model, kind == "jrt")
    if compiles:
        module.compile_parts()
    if row.checkpointing:
        module.checkpoint_blocks()
    generator = torch.Generator(device).manual_seed(0)
    room = room_for(objective, row.batch, length, prefix)
    lengths = torch.full((row.batch,), prefix, device=device) if prefix else None

    def loss(ids: Tensor) -> Tensor:
        targets = objective(ids, lengths, generator)
        sums = module(targets.input_ids, targets.labels, targets.masked, lengths, None, room)[:2]
        return loss_of(sums, targets.totals(), objective)

    return model, loss


def training(
    row: Row, length: int, device: torch.device, compiles: bool, config: Config | None
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Builds the row's model, and a function that takes one training step and returns its loss."""
    if config is None:
        model, loss = plain(row.method.rsplit(" ", 1)[1], device, compiles)
    else:
        model, loss = ours(config, row, length, device, compiles)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    generator = torch.Generator(device).manual_seed(1)
    vocabulary = 50257 if config is None else min(50257, config.vocab_rows - 1)

    def step() -> Tensor:
        ids = torch.randint(0, vocabulary, (row.batch, length + 1), device=device, generator=generator)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(ids)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return model, step


def timed(
    row: Row, length: int, steps: int, device: torch.device, compiles: bool, config: Config | None
) -> tuple[nn.Module, Timed]:
    """Builds the row's model, and takes three steps and then the windows."""
    start = time.perf_counter()
    model, step = training(row, length, device, compiles, config)
    check([step()], row)
    found = Timed(time.perf_counter() - start)
    check([step(), step()], row)
    for _ in range(WINDOWS):
        began = time.perf_counter()
        check([step() for _ in range(steps)], row)
        found.seconds.append((time.perf_counter() - began) / steps)
    found.memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return model, found


def check(losses: list[Tensor], row: Row) -> None:
    """Waits for the device, and ends the benchmark if a loss is not finite."""
    values = torch.stack(losses).tolist()
    if not all(map(math.isfinite, values)):
        raise SystemExit(f"{row.method}: losses of {values}; no speed is reported")


def backend_of(config: Config | None, row: Row, device: torch.device) -> str:
    """Returns the names of the backends that computed the mixer and the loss."""
    loss = "liger" if has_liger() and device.type == "cuda" else "chunked loss"
    if config is None:
        return "sdpa, whole logits"
    if config.has("PL"):
        return f"{_linear_backend(config, row, device)}, {loss}"
    return f"{_scan_backend(config, row, device) if config.has('M') else 'sdpa'}, {loss}"


def _linear_backend(config: Config, row: Row, device: torch.device) -> str:
    """The backend that the op itself chooses for a training call of this shape."""
    heads = config.linear_heads
    sizes = (row.batch, config.train_length, heads)
    q, v = (
        torch.empty(*sizes, size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for size in (config.feature_dim, config.width // heads)
    )
    decay = None if config.decay_const is None else torch.zeros(heads, device=device)
    chosen = choose(Call(q, q, v, log_decay=decay, normalize=decay is None), None)
    return chosen.__name__.rsplit(".", 1)[-1]


def _scan_backend(config: Config, row: Row, device: torch.device) -> str:
    """The backend that the selective scan chooses for a training call of this shape."""
    sizes = (row.batch, config.train_length)
    text, of_states = (
        torch.empty(*sizes, size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for size in (config.mamba_expand * config.width, config.state_dim)
    )
    rates, weight = (
        torch.empty(text.shape[2], config.state_dim, device=device),
        torch.empty(text.shape[2], device=device),
    )
    chosen = choose_scan(ScanCall(text, text, rates, of_states, of_states, weight, weight, None, text), None)
    return f"selective scan by {chosen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", help="methods to time (default: all)")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, help="rows of a step, for all methods")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--preset", help="time this preset too, such as debug")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    rows = list(ROWS) if options.rows is None else [row for row in ROWS if row.method in options.rows]
    if options.preset:
        rows.append(Row(options.preset, options.batch or 2))
    results = []
    for chosen in rows:
        row = Row(chosen.method, options.batch or chosen.batch, chosen.checkpointing)
        results.append(_measured(row, options, device))
        print(results[-1], flush=True)
        path = write("train_throughput", results, options.output)
    print(path)


def _measured(row: Row, options: argparse.Namespace, device: torch.device) -> dict:
    config = presets().get(row.method)
    model, found = timed(row, options.length, options.steps, device, not options.no_compile, config)
    parameters = sum(p.numel() for p in model.parameters())
    speed = row.batch * options.length / statistics.median(found.seconds)
    simple, whole = flops_per_token(config, parameters, options.length) if config else (6 * parameters, None)
    peak = peak_flops(device)
    known = math.isfinite(peak)
    del model
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {
        "method": row.method,
        "shape": {"B": row.batch, "T": options.length},
        "backend": backend_of(config, row, device),
        "activation_checkpointing": row.checkpointing,
        "tokens_per_s": round(speed, 1),
        "mfu": round(speed * simple / peak, 4) if known else None,
        "mfu_with_mixers": round(speed * whole / peak, 4) if known and whole else None,
        "memory_gib": round(found.memory / 2**30, 2),
        "first_step_s": round(found.first_step, 1),
        "parameters": parameters,
        "steps": options.steps,
    }


if __name__ == "__main__":
    main()
