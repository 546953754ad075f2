"""Launches every kernel at small shapes, for compute-sanitizer: `bash benchmarks/sanitize_kernels.sh`.

    python benchmarks/kernel_launches.py hopper    # the CUDA kernels of kernels/, forward
    python benchmarks/kernel_launches.py backward  # the same, forward and backward
    python benchmarks/kernel_launches.py scan      # the CUDA kernels of the selective scan, forward and backward
    python benchmarks/kernel_launches.py triton    # linear attention in Triton, forward and backward
    python benchmarks/kernel_launches.py step      # the Triton kernels of a decoding step

Results are not checked here but in tests/test_cuda_kernels.py, test_cuda_backward.py, test_selective_scan.py,
test_triton_ops.py, test_prefix_attention.py and test_decoding.py. Inputs are made on the CPU. So hardly any kernels of
PyTorch and cuBLAS run under the tool: it would report on them too, and its racecheck cannot run cuBLAS's.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import torch

from jrt import ops, presets
from jrt.model import LanguageModel
from jrt.ops import cuda
from jrt.ops.feature_map import State, feature_count

HEADS = 3
# 63 to 65 tokens: uneven ends; 200: stages are filled again; 1,100 of one sequence: cut into pieces.
SHAPES = [(2, 1), (2, 63), (2, 65), (2, 200), (2, 700), (1, 1100)]  # batch, tokens
TRITON_SHAPES = [(2, 1), (2, 70), (1, 700)]
TRITON_SIZES = [(16, 64), (8, 20)]  # d, D
# Batch, steps, channels. 15 to 17 steps: a chunk's ends; 130 channels: more than a block's; 1,000 steps: cut into segments.
SCAN_SHAPES = [(2, 1, 40), (2, 15, 130), (3, 16, 256), (2, 17, 31), (2, 100, 200), (1, 1000, 130)]
SCAN_STATES = 16
STEPS = 3


def inputs(
    batch: int, tokens: int, value_dim: int, dtype: torch.dtype, device: str, dim: int = cuda.DIM
) -> tuple[torch.Tensor, ...]:
    draws = (torch.randn(batch, tokens, HEADS, size).to(dtype) for size in (dim, dim, value_dim))
    return tuple(draw.to(device) for draw in draws)


def state(batch: int, value_dim: int, device: str, dim: int = cuda.DIM) -> State:
    features = feature_count(dim)
    S, z = torch.randn(batch, HEADS, features, value_dim), torch.rand(batch, HEADS, features)
    return State(S.to(device), z.to(device))


def mask(batch: int, tokens: int, device: str) -> torch.Tensor:
    return (torch.rand(batch, tokens) > 0.3).to(device)


def launch_all(device: str, backend: str) -> int:
    """Calls each op in each dtype and width, with and without state and mask. Returns the number of calls."""
    torch.manual_seed(0)
    calls = 0
    for (batch, tokens), width, dtype in itertools.product(SHAPES, (64, 112, 128), (torch.bfloat16, torch.float16)):
        q, k, v = inputs(batch, tokens, width, dtype, device)
        masks = (None, mask(batch, tokens, device))
        for before, counts in itertools.product((None, state(batch, width, device)), masks):
            ops.linear_attention(q, k, v, initial_state=before, mask=counts, backend=backend)
            calls += 1
        ops.linear_attention(q, k, v, normalize=False, backend=backend)
        calls += 1
        for counts in masks:
            ops.encode_prefix(k, v, mask=counts, backend=backend)
            ops.prefix_linear_attention(q, k, v, k, v, mask=counts, prefix_mask=counts, backend=backend)
            calls += 2
        if tokens == 1 and backend == "cuda":
            cuda.decode_step(q, k, v, state(batch, width, device))
            calls += 1
    return calls


def launch_gradients(device: str, backend: str) -> int:
    """Runs linear attention, its prefix and both in one call forward and backward in each size and dtype. Returns the
    number of calls."""
    torch.manual_seed(0)
    calls = 0
    dtypes = (torch.bfloat16, torch.float32)
    for (batch, tokens), (dim, width), dtype in itertools.product(TRITON_SHAPES, TRITON_SIZES, dtypes):
        q, k, v = (x.requires_grad_() for x in inputs(batch, tokens, width, dtype, device, dim))
        before = state(batch, width, device, dim)
        log_decay = torch.full((HEADS,), -0.1).to(device)
        o, after = ops.linear_attention(
            q, k, v, initial_state=before, mask=mask(batch, tokens, device), log_decay=log_decay, backend=backend
        )
        results = [o, *after, *ops.encode_prefix(k, v, backend=backend)]
        half = max(1, tokens // 2)
        o, after = ops.prefix_linear_attention(
            q, k, v, k[:, :half], v[:, :half], mask=mask(batch, tokens, device), backend=backend
        )
        go_back([*results, o, *after])
        calls += 3
    return calls


def launch_hopper_gradients(device: str, backend: str) -> int:
    """Runs linear attention, its prefix and both in one call forward and backward in bf16, with and without state and
    mask. Returns the number of calls."""
    torch.manual_seed(0)
    calls = 0
    for (batch, tokens), width, padded in itertools.product(SHAPES, (64, 112), (False, True)):
        q, k, v = (x.requires_grad_() for x in inputs(batch, tokens, width, torch.bfloat16, device))
        before, counts = (state(batch, width, device), mask(batch, tokens, device)) if padded else (None, None)
        results = [*ops.encode_prefix(k, v, mask=counts, backend=backend)]
        calls += 1
        if tokens > 1:  # the backward pass of one token is Triton's, whose barriers racecheck does not follow
            o, after = ops.linear_attention(q, k, v, initial_state=before, mask=counts, backend=backend)
            results += [o, *after]
            o, after = ops.prefix_linear_attention(q, k, v, k, v, mask=counts, prefix_mask=counts, backend=backend)
            results += [o, *after]
            calls += 2
        go_back(results)
    return calls


def go_back(results: list[torch.Tensor]) -> None:
    torch.autograd.backward(results, [torch.ones(x.shape, dtype=x.dtype).to(x.device) for x in results])


def launch_scan(device: str, backend: str) -> int:
    """Runs the selective scan without gradients, and forward and backward, in each dtype, with all that it can be given
    and with the least. Returns the number of calls."""
    torch.manual_seed(0)
    calls = 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (batch, steps, channels), dtype in itertools.product(SCAN_SHAPES, dtypes):
        u, delta, gate = (torch.randn(batch, steps, channels).to(dtype) for _ in range(3))
        B, C = (torch.randn(batch, steps, SCAN_STATES).to(dtype) for _ in range(2))
        A, before = -torch.rand(channels, SCAN_STATES), torch.randn(batch, channels, SCAN_STATES)
        D, bias = torch.randn(channels), torch.randn(channels)
        least = [x.to(device).requires_grad_() for x in (u, delta.abs(), A, B, C)]
        D, bias, before, gate = (x.to(device).requires_grad_() for x in (D, bias, before, gate))
        rest = {"D": D, "delta_bias": bias, "initial_state": before, "gate": gate}
        for given in ({}, rest):
            with torch.no_grad():
                ops.selective_scan(*least, **given, backend=backend)
            go_back(list(ops.selective_scan(*least, **given, backend=backend)))
            calls += 2
    return calls


def launch_step(device: str, rows: tuple[int, ...] = (1, 3, 20, 130)) -> int:
    """Runs some decoding steps of small models with every mixer, in each dtype. Returns the number of steps."""
    from jrt.decoding.fused import FusedStep  # needs Triton

    torch.manual_seed(0)
    debug = dataclasses.replace(presets()["debug"], vocab_rows=70)
    configs = (
        dataclasses.replace(debug, pattern="CPSAM", width=96),
        dataclasses.replace(debug, pattern="LCMS", width=44, rotary_dim=11, decay_const=-3, decay_projection=True),
    )
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    steps = 0
    for config, dtype, count in itertools.product(configs, dtypes, rows):
        model = LanguageModel(config).to(dtype).to(device)
        step, tokens = FusedStep(model, count, 64), torch.arange(count).remainder(70).to(device)
        with torch.no_grad():
            for _ in range(STEPS):
                step.advance(tokens)
                steps += 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "kernels", choices=("hopper", "backward", "scan", "triton", "step"), nargs="?", default="hopper"
    )
    kernels = parser.parse_args().kernels
    if kernels == "hopper":
        calls = launch_all("cuda", "cuda")
    elif kernels == "backward":
        calls = launch_hopper_gradients("cuda", "cuda")
    elif kernels == "scan":
        calls = launch_scan("cuda", "cuda")
    elif kernels == "triton":
        calls = launch_gradients("cuda", "triton")
    else:
        calls = launch_step("cuda")
    torch.cuda.synchronize()
    print(f"{calls} calls ran")


if __name__ == "__main__":
    main()
