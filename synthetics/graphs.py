"""Steps recorded as CUDA graphs: a small step launches hundreds of kernels that each take less time than a launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST = 2  # calls of each shape before it is recorded: they compile kernels and set up libraries


class RecordedSteps:
    """Calls a function of tensors; on a GPU records it once for each shape of its inputs, then replays that.

    The function must be the same at each call, keep what it changes in place, not wait for the GPU and return nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.records = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Records anew from here on: what the function works on has moved."""
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.records else None

    def __call__(self, function: Callable[..., None], *inputs: Tensor) -> None:
        shape = tuple(each.shape for each in inputs)
        self.calls[shape] = self.calls.get(shape, 0) + 1
        if not self.records or self.calls[shape] <= FIRST:
            function(*inputs)
            return
        if shape not in self.graphs:
            self.graphs[shape] = self._recorded(function, inputs)
        graph, held = self.graphs[shape]
        for own, new in zip(held, inputs, strict=True):
            own.copy_(new)
        graph.replay()

    def _recorded(
        self, function: Callable[..., None], inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        held = tuple(each.clone() for each in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            function(*held)
        return graph, held
