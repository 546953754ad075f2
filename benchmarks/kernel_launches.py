"""Launches every kernel at small shapes, for compute-sanitizer: `bash benchmarks/sanitize_kernels.sh`.

Nothing is compared here (tests/test_cuda_kernels.py does) and inputs are made on the CPU, so that hardly any other kernel
runs under the tool: PyTorch's own, with their reports, and cuBLAS's, which racecheck cannot run.
"""

from __future__ import annotations

import itertools

import torch

from jrt import ops
from jrt.ops import cuda
from jrt.ops.feature_map import State

HEADS = 3
# 63 to 65 tokens: uneven ends; 200: stages are filled again; 1,100 of one sequence: cut into pieces.
SHAPES = [(2, 1), (2, 63), (2, 65), (2, 200), (2, 700), (1, 1100)]  # batch, tokens


def inputs(batch: int, tokens: int, value_dim: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    draws = (torch.randn(batch, tokens, HEADS, size).to(dtype) for size in (cuda.DIM, cuda.DIM, value_dim))
    return tuple(draw.to(device) for draw in draws)


def state(batch: int, value_dim: int, device: str) -> State:
    S, z = torch.randn(batch, HEADS, cuda.FEATURES, value_dim), torch.rand(batch, HEADS, cuda.FEATURES)
    return State(S.to(device), z.to(device))


def mask(batch: int, tokens: int, device: str) -> torch.Tensor:
    return (torch.rand(batch, tokens) > 0.3).to(device)


def launch_all(device: str, backend: str) -> int:
    """Calls each op in each dtype and width, with and without state and mask; returns how many calls ran."""
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
            calls += 1
        if tokens == 1 and backend == "cuda":
            cuda.decode_step(q, k, v, state(batch, width, device))
            calls += 1
    return calls


if __name__ == "__main__":
    calls = launch_all("cuda", "cuda")
    torch.cuda.synchronize()
    print(f"{calls} calls ran")
