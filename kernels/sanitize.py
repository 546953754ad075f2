"""Launches every kernel at small shapes, for compute-sanitizer: `bash kernels/sanitize.sh`.

Nothing is compared here (tests/test_cuda_kernels.py does) and inputs are made on the CPU, so that hardly any other kernel
runs under the tool: PyTorch's own, with their reports, and cuBLAS's, which racecheck cannot run.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from jrt import ops
from jrt.ops import cuda
from jrt.ops.feature_map import FEATURES, State

HEADS = 3


def inputs(batch: int, tokens: int, value_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draws = (torch.randn(batch, tokens, HEADS, size).to(dtype) for size in (16, 16, value_dim))
    return tuple(draw.to("cuda") for draw in draws)


def state(batch: int, value_dim: int) -> State:
    S, z = torch.randn(batch, HEADS, FEATURES, value_dim), torch.rand(batch, HEADS, FEATURES)
    return State(S.to("cuda"), z.to("cuda"))


def mask(batch: int, tokens: int) -> torch.Tensor:
    return (torch.rand(batch, tokens) > 0.3).to("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    launches = 0
    # 63 to 65 tokens: uneven ends; 200: stages are filled again; 1,100 of one sequence: cut into pieces.
    shapes = [(2, 1), (2, 63), (2, 65), (2, 200), (2, 700), (1, 1100)]
    dtypes, widths = (torch.bfloat16, torch.float16), (64, 112, 128)
    for _, (batch, tokens), width, dtype in itertools.product(range(rounds), shapes, widths, dtypes):
        q, k, v = inputs(batch, tokens, width, dtype)
        for before, counts in itertools.product((None, state(batch, width)), (None, mask(batch, tokens))):
            ops.linear_attention(q, k, v, initial_state=before, mask=counts, backend="cuda")
            launches += 1
        ops.linear_attention(q, k, v, normalize=False, backend="cuda")
        ops.encode_prefix(k, v, backend="cuda")
        ops.encode_prefix(k, v, mask=mask(batch, tokens), backend="cuda")
        launches += 3
        if tokens == 1:
            cuda.decode_step(q, k, v, state(batch, width))
            launches += 1
    torch.cuda.synchronize()
    print(f"{launches} calls ran")


if __name__ == "__main__":
    main()
