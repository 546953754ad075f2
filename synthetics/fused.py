"""Functions that are compiled into few kernels on a GPU and stay plain PyTorch on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")


def fused(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """The function, compiled once for all sizes where its first argument is on a GPU.

    Only element-wise work and sums are worth it: a GPU is limited by how often it reads and writes the tensors between.
    """

    @cache
    def compiled() -> Callable[Arguments, Tensor]:
        return torch.compile(function, dynamic=True)  # at the first call: it imports the compiler

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        first = args[0]
        on_gpu = isinstance(first, Tensor) and first.is_cuda
        return (compiled() if on_gpu else function)(*args, **kwargs)

    return call
