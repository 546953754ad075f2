"""Compares several builds of the Hopper kernels in one run on one machine, to measure the effect of a change.

    git worktree add /tmp/before HEAD~1
    python /tmp/before/kernels/build.py /tmp/old && python kernels/build.py /tmp/new
    python benchmarks/kernel_versions.py old=/tmp/old new=/tmp/new

Ten calls of each build are recorded as a CUDA graph, and the builds take turns. Outputs are compared with the first
build's bit by bit, and a row says if they differ. Outputs of decoding are not compared, because each call changes the
state.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import record
import torch
from torch import Tensor

from jrt import ops
from jrt.ops import cuda, extension

HEADS, DIM, VALUE_DIM = 16, 16, 64
SHAPES = (  # what, B, N
    ("causal", 16, 32768),
    ("causal, masked", 16, 32768),
    ("prefix", 16, 16384),
    ("causal", 1, 32768),
    ("causal", 16, 2048),
    ("decode step", 128, 1),
)
CALLS, ROUNDS = 10, 12


def load(name: str, folder: Path) -> ModuleType:
    """Loads the module jrt_kernels of one build under the name NAME.jrt_kernels, so that several can be loaded at once.

    Raises:
        ValueError: the folder has no such module, or its interface is not the one that jrt.ops.extension expects.
    """
    found = sorted(folder.glob("jrt_kernels*.so"))
    if not found:
        raise ValueError(f"{folder} holds no jrt_kernels: expected the folder given to kernels/build.py")
    spec = importlib.util.spec_from_file_location(f"{name}.jrt_kernels", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.interface != extension.INTERFACE:
        raise ValueError(
            f"{found[0]} has interface {module.interface}; expected {extension.INTERFACE}, as jrt.ops.extension"
        )
    return module


def call_of(what: str, batch: int, tokens: int) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a call of a kernel without arguments, with bf16 inputs of the model's shapes."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, HEADS, size, device="cuda", dtype=torch.bfloat16) for size in (DIM, DIM, VALUE_DIM)
    )
    mask = torch.rand(batch, tokens, device="cuda") > 0.3 if "masked" in what else None
    if what == "prefix":
        return lambda: tuple(ops.encode_prefix(k, v, backend="cuda"))
    if what == "decode step":
        state = ops.State(*(x.contiguous() for x in ops.encode_prefix(k, v, backend="chunked")))
        return lambda: (cuda.decode_step(q, k, v, state),)

    def causal() -> tuple[Tensor, ...]:
        o, state = ops.linear_attention(q, k, v, mask=mask, backend="cuda")
        return o, *state

    return causal


def graph_of(call: Callable) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def compare(builds: dict[str, ModuleType], what: str, batch: int, tokens: int) -> list[dict]:
    """Times all builds at one shape. Returns one row for each build."""
    call = call_of(what, batch, tokens)
    graphs, outputs = {}, {}
    for name, module in builds.items():
        with mock.patch.object(extension, "module", lambda module=module: module):
            outputs[name] = () if what == "decode step" else call()  # decoding changes its state, so outputs differ
            graphs[name] = graph_of(call)
    times: dict[str, list[float]] = {name: [] for name in builds}
    for turn in range(ROUNDS + 2):
        for name, graph in graphs.items():
            time = milliseconds(graph)
            if turn >= 2:
                times[name].append(time)
    first = next(iter(outputs.values()))
    return [
        {
            "build": name,
            "op": what,
            "B": batch,
            "N": tokens,
            "ms": round(statistics.median(times[name]), 5),
            "fastest": round(min(times[name]), 5),
            "slowest": round(max(times[name]), 5),
            "equal_outputs": all(map(torch.equal, first, outputs[name])) if first else None,
        }
        for name in builds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER", help="folders that kernels/build.py wrote to")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/kernel_versions.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a Hopper GPU")
    try:
        named = dict(each.split("=", 1) for each in arguments.builds)
        builds = {name: load(name, Path(folder)) for name, folder in named.items()}
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for shape in SHAPES:
        for row in compare(builds, *shape):
            print(row)
            rows.append(row)
    print(record.write("kernel_versions", rows, arguments.output))


if __name__ == "__main__":
    main()
