"""Measures the selective scan, forward and backward, at a training shape. Each method is checked before it is timed.

    python3 benchmarks/selective_scan.py --json benchmarks/results/selective_scan.json

The floor is the time of the memory traffic that no method avoids (each input read once, each output written once) at
the device's peak bandwidth (`--bandwidth`). Errors are measured against the chunked backend in fp64. They may be at
most twice those of the chunked backend in the dtype of the call. A method that cannot run here, such as a package that
is not installed, gets rows with the reason.
"""

import argparse
import functools
from pathlib import Path

import record
import torch
from torch import Tensor

from jrt.ops import selective_scan

OUTPUTS = ("y", "state", "du", "ddelta", "dA", "dB", "dC", "dD")


def make_inputs(batch: int, steps: int, channels: int, states: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Returns u, delta, A, B, C and D with values as in a Mamba layer at initialisation."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, device=device)

    A = -torch.arange(1.0, states + 1, device=device).expand(channels, states).contiguous()
    delta = torch.nn.functional.softplus(normal(batch, steps, channels) - 4)
    B, C = normal(batch, steps, states), normal(batch, steps, states)
    inputs = [normal(batch, steps, channels).to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), normal(channels)]
    return [x.requires_grad_() for x in inputs]


def values_and_gradients(inputs: list[Tensor], backend: str, dy: Tensor) -> list[Tensor]:
    y, state = selective_scan(*inputs, backend=backend)
    return [y, state, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def relative_errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    return {name: ((x.double() - t).norm() / t.norm()).item() for name, x, t in zip(OUTPUTS, found, truth, strict=True)}


def median_ms(call, repeats: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def kernels(call) -> dict[str, float]:
    """Returns the milliseconds of each GPU kernel of one call, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    return {e.key[:80]: e.device_time_total / 1e3 for e in events if e.device_time_total > 0}


def measure(
    inputs: list[Tensor], backend: str, dy: Tensor, truth: list[Tensor], eager: dict[str, float], args
) -> list[dict]:
    shape = dict(zip("BTEN", (*inputs[0].shape, inputs[2].shape[1]), strict=True))
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    passes = ("forward", "forward+backward")
    try:
        errors = relative_errors(values_and_gradients(inputs, backend, dy), truth)
    except ValueError as refusal:
        common = {"method": backend, "shape": shape, "dtype": dtype, "ms": None, "reason": str(refusal)}
        return [common | {"pass": name} for name in passes]
    bounds = {name: 2 * eager[name] + torch.finfo(torch.float32).eps for name in OUTPUTS}
    worst = max(OUTPUTS, key=lambda name: errors[name] / bounds[name])
    small = sum(x.nbytes for x in inputs)  # every input once
    traffic = dict(zip(passes, (small + dy.nbytes, 3 * small + 2 * dy.nbytes), strict=True))
    rows = []
    for name, byte_count in traffic.items():
        row = {"method": backend, "pass": name, "shape": shape, "dtype": dtype}
        row |= {"worst": worst, "error": errors[worst], "bound": bounds[worst], "ms": None, "reason": None}
        if errors[worst] > bounds[worst]:
            failure = f"failed its check: {worst} {errors[worst]:.1e} > {bounds[worst]:.1e}"
            rows.append(row | {"reason": failure})
            continue

        def call(name=name):
            if name == "forward+backward":
                return values_and_gradients(inputs, backend, dy)
            with torch.no_grad():
                return selective_scan(*inputs, backend=backend)

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        row["ms"] = median_ms(call, args.repeats)
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["gbps"] = byte_count / row["ms"] / 1e6
        row["percent_of_floor"] = 100 * row["gbps"] / args.bandwidth
        row["kernels"] = kernels(call)
        rows.append(row)
    return rows


def sweep(inputs: list[Tensor], dy: Tensor, repeats: int) -> None:
    """Times the kernels for several sizes of a chunk (in steps) and of a program (in channels)."""
    from jrt.ops import selective_scan_triton as kernel

    u, delta, A, B, C, D = (x.detach() for x in inputs)
    for length, width in ((8, 32), (8, 64), (16, 32), (16, 64)):
        _, state, between = kernel.forward(u, delta, A, B, C, D, None, length, width)
        dstate = torch.zeros_like(state)
        forward = functools.partial(kernel.forward, u, delta, A, B, C, D, None, length, width)
        backward = functools.partial(kernel.backward, u, delta, A, B, C, D, between, dy, dstate, length, width)
        times = [f"{name} {median_ms(f, repeats):.3f} ms" for name, f in (("forward", forward), ("backward", backward))]
        print(f"length {length:3d} width {width:3d}: {', '.join(times)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 16), ("steps", 4608), ("channels", 384), ("states", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=["cuda", "triton", "chunked", "mamba-ssm"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="peak of the device in GB/s (H100 SXM: 3350)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sweep", action="store_true", help="also time the Triton kernels over their tile sizes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU: times on a CPU say nothing about it")

    dtype = getattr(torch, args.dtype)
    inputs = make_inputs(args.batch, args.steps, args.channels, args.states, dtype, "cuda")
    dy = torch.randn_like(inputs[0])
    truth = values_and_gradients([x.detach().double().requires_grad_() for x in inputs], "chunked", dy)
    eager = relative_errors(values_and_gradients(inputs, "chunked", dy), truth)
    rows = []
    for method in args.methods:
        for row in measure(inputs, method, dy, truth, eager, args):
            rows.append(row)
            if row["ms"] is None:
                print(f"{method} {row['pass']}: {row['reason']}")
                continue
            print(
                f"{method:8s} {row['pass']:17s} {row['ms']:8.3f} ms  {row['gbps']:6.0f} GB/s"
                f"  {row['percent_of_floor']:3.0f}% of the floor  {row['peak_mib']:6.0f} MiB"
                f"  worst {row['worst']} {row['error']:.1e} (bound {row['bound']:.1e})"
            )
            for kernel, ms in list(row["kernels"].items())[:8]:
                print(f"    {ms:8.3f} ms  {kernel}")
    if args.sweep:
        sweep(inputs, dy, args.repeats)
    if args.json:
        record.write("selective_scan", rows, args.json)


if __name__ == "__main__":
    main()
