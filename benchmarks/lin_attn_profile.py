"""Measures prefill of linear attention on one GPU against other methods: time, bandwidth, error (paper table 5).

Before it is timed, every method is compared with fp64 on two heads at the same shape. A method that fails gets a row
with the reason. All rows of one run are written to one JSON file, one CSV file and one plot.

Shapes: B batch, N tokens, H = 16 heads, d = 16, D = 64, bf16, causal. JRT-RNN reads a prefix of N / 2 and a text of N;
JRT-Prompt is Based on 2 N. Softmax attention has head size 64. A time is the median over pairs of CUDA events. Before
each pair the GPU pauses for 1 ms, so that launching the call (up to 1 ms on the host) is not measured.

    python benchmarks/lin_attn_profile.py --output benchmarks/results
    python benchmarks/lin_attn_profile.py --plot benchmarks/results/lin_attn_profile.json
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import record
import torch
from lin_attn_methods import DIM, HEADS, VALUE_DIM, Inputs, Method, Unavailable, methods
from torch import Tensor

from jrt import ops
from jrt.ops import cuda
from jrt.ops.call import Call

BATCHES = [(batch, 16384) for batch in (1, 2, 4, 8, 16, 32, 64)]
LENGTHS = [(16, length) for length in (2048, 4096, 8192, 16384, 32768, 65536, 131072)]
FIRST = [(16, 32768), (1, 32768), (16, 2048)]  # those with a goal, in case the rest is cut short
DECODE_BATCHES = (1, 16, 128, 1024)
TIGHT = 2.0  # our kernel's error may be at most this many times that of eager PyTorch in the same dtype
LOOSE = 0.01  # other methods': wrong functions are far above, bf16 is at 0.002 to 0.004


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    N: int
    d: int
    D: int


@dataclass
class Row:
    method: str
    shape: Shape
    kernel: str = ""  # what ran
    ms: float | None = None
    reason: str = ""  # why there is no time
    error: float | None = None  # relative, against fp64
    bound: float | None = None  # largest error that counts as right
    gbps: float | None = None  # unavoidable bytes / time
    tflops: float | None = None  # arithmetic of the method's own formula / time
    floor_ms: float | None = None  # unavoidable bytes at the measured copy bandwidth
    percent_of_floor: float | None = None
    x_flash_attention_2: float | None = None
    extra_gib: float | None = None  # allocated at the peak, on top of the inputs
    repeats: int = 0


# ---- what a right answer is ----------------------------------------------------------------------------------------


def exact_head(x: Inputs, batch: int, head: int, kind: str, normalized: bool) -> Tensor:
    """Returns one head's right answer (N, D), by the definition in fp64, computed in blocks of rows."""
    q, k, v = (y[batch, :, head].double() for y in (x.q, x.k, x.v))
    offset = 0
    if x.k_prefix is not None:
        k = torch.cat([x.k_prefix[batch, :, head].double(), k])
        v = torch.cat([x.v_prefix[batch, :, head].double(), v])
        offset = x.k_prefix.shape[1]
    rows = max(64, 2**27 // k.shape[0])
    columns = torch.arange(k.shape[0], device=k.device)
    out = []
    for start in range(0, q.shape[0], rows):
        block = q[start : start + rows]
        seen = offset + start + block.shape[0]
        s = block @ k[:seen].T * q.shape[-1] ** -0.5  # (rows, seen)
        later = columns[:seen] > offset + start + torch.arange(block.shape[0], device=k.device)[:, None]
        if kind == "softmax":
            weights = s.masked_fill_(later, -math.inf).softmax(-1)
        else:
            weights = (s * s).mul_(0.5).add_(s).add_(1).masked_fill_(later, 0)
        o = weights @ v[:seen]
        out.append(o / weights.sum(-1, keepdim=True) if normalized and kind == "linear" else o)
    return torch.cat(out)


def checked_heads(shape: Shape) -> list[tuple[int, int]]:
    return [(0, 0), (shape.B - 1, shape.H - 1)]


def relative_error(o: Tensor, exact: Tensor) -> float:
    return ((o.double() - exact).norm() / exact.norm()).item()


# ---- timing --------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[int], object], limit_seconds: float = 1.0) -> tuple[float, int]:
    """Returns the median milliseconds and the number of timed calls: 50, or fewer if a call takes over 20 ms.

    `call` gets the number of the repeat as its argument."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()

    def run(repeats: int) -> list[float]:
        pairs = []
        for i in range(repeats):
            torch.cuda._sleep(2_000_000)  # about 1 ms: the host queues the call meanwhile
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(i)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    first = run(1)[0]
    repeats = max(3, min(50, int(1000 * limit_seconds / max(first, 0.1))))
    return statistics.median(run(repeats)), repeats


def copy_bandwidth() -> float:
    """Returns the bytes per second, read and written, of a device-to-device copy of 2 GiB."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda _: y.copy_(x))[0] * 1e3


def draw(shape: Shape, method: Method) -> Inputs:
    length = shape.N * method.length_factor
    size = VALUE_DIM if method.kind == "softmax" else shape.d

    def normal(tokens: int, last: int) -> Tensor:
        return torch.randn(shape.B, tokens, shape.H, last, device="cuda", dtype=torch.bfloat16)

    prefix = (normal(shape.N // 2, size), normal(shape.N // 2, shape.D)) if method.prefix else (None, None)
    return Inputs(normal(length, size), normal(length, size), normal(length, shape.D), *prefix)


def unavoidable_bytes(x: Inputs, shape: Shape, kind: str) -> int:
    """Returns the bytes that no method avoids: inputs read once, output and final state written once."""
    state = 4 * shape.B * shape.H * ops.feature_count(shape.d) * (shape.D + 1) if kind == "linear" else 0
    return x.bytes + x.v.nbytes + state


def arithmetic(shape: Shape, method: Method) -> float:
    """Returns the floating-point operations of a method's formula.

    Softmax has N^2 / 2 pairs of tokens; linear attention has chunks of 64 tokens and 153 features."""
    length = shape.N * method.length_factor
    if method.kind == "softmax":
        return shape.B * shape.H * 2.0 * length**2 * VALUE_DIM
    features = ops.feature_count(shape.d)
    per_token = 2 * 64 * (shape.d + shape.D) + 4 * features * shape.D
    prefix = 2 * features * shape.D * shape.N / 2 if method.prefix else 0
    return shape.B * shape.H * (per_token * length + prefix)


def measure(method: Method, shape: Shape, bandwidth: float, truth: dict[tuple, Tensor]) -> Row:
    """Measures one method. `truth` stores the right answers of this shape for the next method."""
    row = Row(method.name, shape, method.kernel)
    torch.manual_seed(shape.N + shape.B)
    torch.cuda.empty_cache()
    torch.compiler.reset()  # else a compiled method falls back to eager after eight shapes
    try:
        x = draw(shape, method)
        if reason := method.available(x):
            raise Unavailable(reason)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = method.call(x)
        row.extra_gib = (torch.cuda.max_memory_allocated() - before) / 2**30

        # 1. Right?
        heads = checked_heads(shape)
        if method.function not in truth:
            found = [exact_head(x, b, h, method.kind, method.normalized) for b, h in heads]
            truth[method.function] = torch.stack(found)
        exact = truth[method.function]
        row.error = relative_error(torch.stack([o[b, :, h] for b, h in heads]), exact)
        row.bound = TIGHT * eager_error(x, heads, exact) if method.ours else LOOSE
        if not (row.error <= row.bound and bool(o.isfinite().all())):
            raise Unavailable(f"wrong result: error {row.error:.2e}, at most {row.bound:.2e} counts as right")
        del o, exact

        # 2. How fast? Small inputs are rotated so that they do not sit in the cache.
        sets = [x] + [draw(shape, method) for _ in range(min(4, 2**28 // x.bytes))]
        row.ms, row.repeats = median_ms(lambda i: method.call(sets[i % len(sets)]))
        traffic = unavoidable_bytes(x, shape, method.kind)
        row.floor_ms = traffic / bandwidth * 1e3
        row.gbps = traffic / row.ms / 1e6
        row.tflops = arithmetic(shape, method) / row.ms / 1e9
        row.percent_of_floor = 100 * row.floor_ms / row.ms
    except Unavailable as error:
        row.reason = str(error)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        row.reason = str(error).partition("\n")[0][:200]
    return row


def measure_decode(batch: int, bandwidth: float) -> Row:
    """Measures decoding one token in one layer, with a state that is updated in place."""
    shape = Shape(batch, HEADS, 1, DIM, VALUE_DIM)
    row = Row("decode step", shape, "jrt_kernels decode")
    torch.manual_seed(batch)
    size = ops.feature_count(DIM)

    def tokens(length: int, last: int) -> Tensor:
        return torch.randn(batch, length, HEADS, last, device="cuda", dtype=torch.bfloat16)

    q, k, v = tokens(1, DIM), tokens(1, DIM), tokens(1, VALUE_DIM)
    state = ops.encode_prefix(tokens(64, DIM), tokens(64, VALUE_DIM), backend="chunked")
    state = ops.State(*(x.contiguous() for x in state))
    row.reason = cuda.unsupported(Call(q, k, v, state)) or ""
    if row.reason:
        return row
    exact, _ = ops.linear_attention(
        q.double(), k.double(), v.double(), initial_state=ops.State(*(x.double() for x in state)), backend="reference"
    )
    eager, _ = ops.linear_attention(q, k, v, initial_state=state, backend="chunked")
    copies = min(4, max(1, 2**31 // state.S.nbytes))  # taken in turns; at B1 and B16 the cache still holds them all
    states = [ops.State(state.S.clone(), state.z.clone()) for _ in range(copies)]
    row.error = relative_error(cuda.decode_step(q, k, v, states[0]), exact)
    row.bound = TIGHT * relative_error(eager, exact)
    if row.error > row.bound:
        row.reason = f"wrong result: error {row.error:.2e}, at most {row.bound:.2e} counts as right"
        return row
    row.ms, row.repeats = median_ms(lambda i: cuda.decode_step(q, k, v, states[i % copies]))
    traffic = 2 * 4 * batch * HEADS * size * (VALUE_DIM + 1) + q.nbytes + k.nbytes + 2 * v.nbytes
    row.floor_ms = traffic / bandwidth * 1e3
    row.gbps = traffic / row.ms / 1e6
    row.tflops = batch * HEADS * 4.0 * size * VALUE_DIM / row.ms / 1e9
    row.percent_of_floor = 100 * row.floor_ms / row.ms
    return row


def repeatable(shape: Shape) -> bool:
    """Whether ten prefills of the same inputs give the same bits."""
    x = draw(shape, next(method for method in methods(None) if method.name == "JRT-RNN"))

    def once() -> list[Tensor]:
        o, state = ops.prefix_linear_attention(x.q, x.k, x.v, x.k_prefix, x.v_prefix, backend="cuda")
        return [o, *state]

    first = once()
    return all(torch.equal(one, other) for _ in range(10) for one, other in zip(first, once(), strict=True))


def eager_error(x: Inputs, heads: list[tuple[int, int]], exact: Tensor) -> float:
    """Returns the error of eager PyTorch in the inputs' dtype on the same heads."""

    def pick(y: Tensor) -> Tensor:
        return torch.stack([y[b, :, h] for b, h in heads])[:, :, None]  # (2, N, 1, .)

    state = None
    if x.k_prefix is not None:
        state = ops.encode_prefix(pick(x.k_prefix), pick(x.v_prefix), backend="chunked")
    o, _ = ops.linear_attention(pick(x.q), pick(x.k), pick(x.v), initial_state=state, backend="chunked")
    return relative_error(o[:, :, 0], exact)


# ---- results -------------------------------------------------------------------------------------------------------


def add_speedups(rows: list[Row]) -> None:
    flash = {row.shape: row.ms for row in rows if row.method == "FlashAttention-2"}
    for row in rows:
        if row.ms and flash.get(row.shape):
            row.x_flash_attention_2 = flash[row.shape] / row.ms


def print_table(rows: list[Row]) -> None:
    columns = f"{'ms':>10s} {'GB/s':>6s} {'TFLOP/s':>8s} {'% floor':>8s} {'x FA2':>8s} {'error':>9s}"
    print(f"{'method':28s} {'B':>3s} {'N':>7s} {columns}")
    for row in rows:
        head = f"{row.method:28s} {row.shape.B:3d} {row.shape.N:7d}"
        if row.ms is None:
            print(f"{head}  {row.reason}")
            continue
        speed = f"{row.x_flash_attention_2:8.2f}" if row.x_flash_attention_2 else " " * 8
        rates = f"{row.ms:10.4f} {row.gbps:6.0f} {row.tflops:8.1f} {row.percent_of_floor:8.1f}"
        print(f"{head} {rates} {speed} {row.error:9.2e}")


def write(rows: list[Row], folder: Path, bandwidth: float, equal_bits: bool | None) -> None:
    path = folder / "lin_attn_profile.json"
    more = {"copy_gbps": bandwidth / 1e9, "equal_bits_in_ten_prefills": equal_bits}
    record.write("lin_attn_profile", [asdict(row) for row in rows], path, **more)
    flat = [{**asdict(row), **asdict(row.shape)} for row in rows]
    for line in flat:
        del line["shape"]
    with open(folder / "lin_attn_profile.csv", "w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(flat[0]))
        table.writeheader()
        table.writerows(flat)


def read(path: Path) -> list[Row]:
    """The rows of a written file."""
    rows = json.loads(path.read_text())["rows"]
    return [Row(**{**row, "shape": Shape(**row["shape"])}) for row in rows]


def plot(rows: list[Row], path: Path) -> None:
    """Time over length and over batch, each where more than one shape was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = []
    for key, sizes, label in (("N", LENGTHS, "tokens, batch 16"), ("B", BATCHES, "batch, 16,384 tokens")):
        timed = [row for row in rows if row.ms and (row.shape.B, row.shape.N) in sizes]
        if len({row.shape for row in timed}) > 1:
            panels.append((key, label, timed))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels) + 1, 4.5), squeeze=False)
    for axis, (key, label, timed) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(row.method for row in timed):
            points = sorted((getattr(row.shape, key), row.ms) for row in timed if row.method == name)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="prefill, ms")
        axis.set_xticks(sorted({getattr(row.shape, key) for row in timed}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1024 else f"{x / 1024:g}k")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results, help="folder for JSON, CSV and plot")
    parser.add_argument("--thunderkittens", type=Path, help="folder of a build with a module `thunderkittens`")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, e.g. JRT-RNN FlashAttention-2")
    parser.add_argument("--longest", type=int, default=131072, help="skip longer texts")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of an earlier run")
    arguments = parser.parse_args()
    if arguments.plot:
        return plot(read(arguments.plot), arguments.plot.with_suffix(".png"))
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")

    chosen = [m for m in methods(arguments.thunderkittens) if not arguments.methods or m.name in arguments.methods]
    if not chosen:
        parser.error(f"no such method; known: {[m.name for m in methods(None)]}")
    sizes = [size for size in dict.fromkeys([*FIRST, *LENGTHS, *BATCHES]) if size[1] <= arguments.longest]
    shapes = [Shape(batch, HEADS, length, DIM, VALUE_DIM) for batch, length in sizes]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e9:.0f} GB/s")
    equal_bits, rows = None, []
    with torch.no_grad():
        if any(method.ours for method in chosen):
            rows += [measure_decode(batch, bandwidth) for batch in DECODE_BATCHES]
            if not rows[0].reason:
                equal_bits = repeatable(Shape(4, HEADS, 8192, DIM, VALUE_DIM))
        for shape in shapes:
            truth: dict[tuple, Tensor] = {}
            for method in chosen:
                rows.append(measure(method, shape, bandwidth, truth))
                print(f"  B {shape.B} N {shape.N} {method.name}: {rows[-1].ms or rows[-1].reason}", flush=True)
            add_speedups(rows)
            write(rows, arguments.output, bandwidth, equal_bits)  # after each shape: a run may be cut short
    if importlib.util.find_spec("matplotlib"):
        plot(rows, arguments.output / "lin_attn_profile.png")
    print_table(rows)
    print(f"equal bits in ten prefills: {equal_bits}")


if __name__ == "__main__":
    main()
