"""Measures time and memory of linear attention in training, beside softmax attention and other libraries.

    python benchmarks/op_training.py [--output FILE] [--backends cuda triton ...] [--methods NAME ...]

The forward pass, and forward and backward together, are measured. Outputs and gradients of every method are first
compared with fp64 on one head; a wrong method is not timed. The call is captured in a CUDA graph and replayed, so that
only the GPU's time counts. Several sets of inputs are used in turn, so that no cache holds them. `eager_ms` is the time
without a graph. `extra_bytes` is the peak memory beyond inputs, output and gradients. JRT-RNN is one call for prefix and
text; the same in two calls is a row of its own.

Shapes: B batch, N tokens, H heads, d query/key size, D value size; `prefix` tokens are read before the text.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.errors import TritonError

from jrt import ops
from jrt.ops import backends
from jrt.ops.call import Call

HEADS, DIM, VALUE_DIM = 16, 16, 64
SHAPES = ((8, 2048), (1, 32768))  # (B, N), forward and backward
FORWARD_SHAPES = ((16, 32768),)
# What another library's kernel may end with: a size that it lacks, a version that it was not made for.
FAILURES = (RuntimeError, ImportError, AssertionError, TypeError, ValueError, AttributeError, TritonError)
LONGEST_QUADRATIC = 8192  # tokens up to which quadratic methods of other libraries are timed backwards
ROTATED_BYTES = 2**28  # inputs of a method together, more than the second-level cache
MOST_CONFIGURATIONS = 6  # that a tuned kernel of another library tries: to compile all of them takes minutes
LIBRARIES = ("fla", "retention")
GRADIENT_BOUND = 2e-2  # relative error of other libraries' results that counts as right; ours: twice eager's


@dataclass(frozen=True)
class Method:
    name: str
    backend: str
    call: Callable[..., Tensor]  # (q, k, v[, prefix_k, prefix_v]) -> o
    kind: str = "linear"  # or "softmax", or "other": what its right answer is; None is known for "other"
    prefix: bool = False
    quadratic: bool = False
    head: tuple[int, int, int] = (HEADS, DIM, VALUE_DIM)  # H, d, D
    reason: str | None = None  # why it cannot run here


def ours(backend: str) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
        if prefix:
            return ops.prefix_linear_attention(q, k, v, *prefix, backend=backend)[0]
        return ops.linear_attention(q, k, v, backend=backend)[0]

    return call


def in_two_calls(backend: str) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
        state = ops.encode_prefix(*prefix, backend=backend)
        return ops.linear_attention(q, k, v, initial_state=state, backend=backend)[0]

    return call


def attention(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def fla_based(name: str) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        import fla.ops.based

        return getattr(fla.ops.based, name)(q, k, v, scale=DIM**-0.5, use_norm=True)

    return call


def limit_tuning(most: int) -> None:
    """Makes kernels that tune themselves try only `most` of their configurations, spread evenly over their list."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def some(tuner: Autotuner, arguments: dict) -> list:
        configurations = every(tuner, arguments)
        return configurations[:: -(-len(configurations) // most)]

    Autotuner.prune_configs = some


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    gates = torch.full_like(q, -0.05, dtype=torch.float32)
    return chunk_gla(q, k, v, gates)[0]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    gates = torch.full(q.shape[:3], -0.05, device=q.device, dtype=torch.float32)
    beta = torch.full(q.shape[:3], 0.5, device=q.device, dtype=q.dtype)
    return chunk_gated_delta_rule(q, k, v, g=gates, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def power_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from retention import power_retention

    return power_retention(q, k, v, deg=2)


def methods() -> list[Method]:
    probe = [torch.empty(1, 64, HEADS, size, device="cuda", dtype=torch.bfloat16) for size in (DIM, DIM, VALUE_DIM)]
    found = []
    for name in ("cuda", "triton", "chunked"):
        reason = backends.TABLE[name].unsupported(Call(*probe))
        found.append(Method("Based", name, ours(name), reason=reason))
        found.append(Method("JRT-RNN", name, ours(name), prefix=True, reason=reason))
        found.append(Method("JRT-RNN, two calls", name, in_two_calls(name), prefix=True, reason=reason))
    softmax = dict(kind="softmax", quadratic=False, head=(HEADS, VALUE_DIM, VALUE_DIM))
    found.append(Method("FlashAttention-2", "sdpa", attention(SDPBackend.FLASH_ATTENTION), **softmax))
    found.append(Method("cuDNN", "sdpa", attention(SDPBackend.CUDNN_ATTENTION), **softmax))
    fla = None if importlib.util.find_spec("fla") else "flash-linear-attention is not installed"
    found.append(Method("fla parallel_based", "fla", fla_based("parallel_based"), quadratic=True, reason=fla))
    found.append(Method("fla fused_chunk_based", "fla", fla_based("fused_chunk_based"), reason=fla))
    width = HEADS * VALUE_DIM
    found.append(
        Method("fla GLA", "fla", gated_linear_attention, "other", head=(4, width // 8, width // 4), reason=fla)
    )
    heads = (width // 128, 128, 128)
    found.append(Method("fla gated delta rule", "fla", gated_delta_rule, "other", head=heads, reason=fla))
    power = None if importlib.util.find_spec("retention") else "retention is not installed"
    found.append(Method("power attention", "retention", power_attention, "other", head=(16, 64, 64), reason=power))
    return found


def draw(method: Method, batch: int, tokens: int) -> list[Tensor]:
    heads, d, D = method.head

    def normal(length: int, size: int) -> Tensor:
        return torch.randn(batch, length, heads, size, device="cuda", dtype=torch.bfloat16)

    inputs = [normal(tokens, d), normal(tokens, d), normal(tokens, D)]
    return inputs + ([normal(tokens // 2, d), normal(tokens // 2, D)] if method.prefix else [])


# ---- right?


def exact(kind: str, q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
    """Computes the definition in the inputs' dtype, in blocks of queries, for one head (B, N, 1, .)."""
    offset = 0
    if prefix:
        k, v = torch.cat([prefix[0], k], 1), torch.cat([prefix[1], v], 1)
        offset = prefix[0].shape[1]
    outputs = []
    for start in range(0, q.shape[1], 1024):
        block = q[:, start : start + 1024]
        seen = offset + start + block.shape[1]
        s = torch.einsum("bihd,bjhd->bhij", block, k[:, :seen]) * q.shape[-1] ** -0.5
        later = torch.ones(block.shape[1], seen, dtype=torch.bool, device=q.device).triu(offset + start + 1)
        weights = s.exp() if kind == "softmax" else 1 + s + s * s / 2
        weights = weights.masked_fill(later, 0)
        outputs.append(torch.einsum("bhij,bjhe->bihe", weights / weights.sum(-1, keepdim=True), v[:, :seen]))
    return torch.cat(outputs, 1)


def with_gradients(call: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = call(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def wrong(method: Method, tokens: int, backward: bool) -> str | None:
    """Returns why the method's results are wrong, or None. Only the first head of one text is compared."""
    if method.kind == "other":
        return None
    inputs = draw(method, 1, min(tokens, 4096))
    do = torch.randn_like(inputs[2])

    def compute(call: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        if backward:
            return with_gradients(call, tensors, grad)
        with torch.no_grad():
            return [call(*tensors)]

    found = [x[:, :, :1] for x in compute(method.call, inputs, do)]
    head = [x[:, :, :1] for x in inputs]
    truth = compute(lambda *tensors: exact(method.kind, *tensors), [x.double() for x in head], do[:, :, :1].double())
    eager = compute(ours("chunked"), head, do[:, :, :1]) if method.kind == "linear" else [None] * len(truth)
    for name, value, right, rough in zip(
        ("o", "dq", "dk", "dv", "d prefix k", "d prefix v"), found, truth, eager, strict=False
    ):
        error = ((value.double() - right).norm() / right.norm()).item()
        bound = GRADIENT_BOUND
        if rough is not None and method.backend in backends.TABLE:
            bound = 2 * ((rough.double() - right).norm() / right.norm()).item()
        if not error <= bound:
            return f"wrong result: error of {name} {error:.2e}, at most {bound:.2e} counts as right"
    return None


# ---- how fast?


def median_ms(call: Callable[[], object], repeats: int) -> float:
    pairs = []
    for _ in range(repeats):
        torch.cuda._sleep(2_000_000)  # about 1 ms: the host queues the call meanwhile
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(method: Method, batch: int, tokens: int, backward: bool) -> dict:
    heads, d, D = method.head
    row: dict = {
        "method": method.name,
        "pass": "forward+backward" if backward else "forward",
        "shape": {"B": batch, "N": tokens, "H": heads, "d": d, "D": D}
        | ({"prefix": tokens // 2} if method.prefix else {}),
        "backend": method.backend,
        "ms": None,
        "extra_bytes": None,
    }
    if method.reason:
        return row | {"reason": method.reason}
    if method.quadratic and tokens > LONGEST_QUADRATIC:
        return row | {"reason": f"takes quadratic time: timed up to {LONGEST_QUADRATIC} tokens"}
    torch.manual_seed(0)
    try:
        if problem := wrong(method, tokens, backward):
            return row | {"reason": problem}
        inputs = draw(method, batch, tokens)
        size = sum(x.nbytes for x in inputs)
        sets = [inputs] + [draw(method, batch, tokens) for _ in range(min(3, ROTATED_BYTES // size))]
        dos = [torch.randn_like(x[2]) for x in sets]

        def run(i: int) -> object:
            if backward:
                return with_gradients(method.call, sets[i], dos[i])
            with torch.no_grad():
                return method.call(*sets[i])

        run(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run(0)
        torch.cuda.synchronize()
        kept = sum(x.nbytes for x in results) if backward else results.nbytes
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - before - kept
        del results

        first = median_ms(lambda: run(0), 1)
        repeats = max(3, min(30, int(300 / max(first, 0.1))))
        row["eager_ms"] = median_ms(lambda: run(0), repeats)
        graphs = [captured(lambda i=i: run(i)) for i in range(len(sets))]
        turn = itertools.cycle(graphs)

        def replay() -> None:
            next(turn).replay()

        row["ms"] = median_ms(replay, repeats)
        row["input_bytes"] = size
    except FAILURES as error:
        row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="where the JSON goes; the default is benchmarks/results")
    parser.add_argument(
        "--backends", nargs="+", help="only the methods of these, for instance to compile their kernels"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help='only these, e.g. "JRT-RNN" "JRT-RNN, two calls"')
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("op_training.py measures a GPU: no CUDA device found")
    limit_tuning(MOST_CONFIGURATIONS)
    rows: list[dict] = []
    plan = [(*shape, backward) for backward in (False, True) for shape in SHAPES]
    plan += [(*shape, False) for shape in FORWARD_SHAPES]
    found = methods()
    for asked, known in (
        (arguments.backends, [method.backend for method in found]),
        (arguments.methods, [method.name for method in found]),
    ):
        if unknown := set(asked or ()) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}: expected some of {', '.join(dict.fromkeys(known))}")
    found = [method for method in found if not arguments.backends or method.backend in arguments.backends]
    found = [method for method in found if not arguments.methods or method.name in arguments.methods]
    # Other libraries come last, since they compile and tune themselves for minutes; the file is written after every row.
    for libraries in (False, True):
        for (batch, tokens, backward), method in itertools.product(plan, found):
            if libraries != (method.backend in LIBRARIES):
                continue
            torch.cuda.empty_cache()
            begin = time.perf_counter()
            row = measure(method, batch, tokens, backward)
            rows.append(row)
            record.write("op_training", rows, arguments.output, most_configurations=MOST_CONFIGURATIONS)
            name = f"{row['pass']:17} B{batch} N{tokens} {row['method']} ({row['backend']})"
            print(f"{name:60} {figures(row)}; measured in {time.perf_counter() - begin:.0f} s", flush=True)


def figures(row: dict) -> str:
    if row["ms"] is None:
        return row["reason"]
    extra = row["extra_bytes"] / row["input_bytes"]
    return f"{row['ms']:8.3f} ms, without a graph {row['eager_ms']:.3f}, extra memory {extra:.2f} x inputs"


if __name__ == "__main__":
    main()
