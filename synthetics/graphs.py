"""Records training steps as CUDA graphs.

A small step launches hundreds of kernels, and each runs for less time than its launch takes. A CUDA graph launches all
of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST = 2  # calls of each shape before it is recorded, so that kernels are compiled and libraries set up


class RecordedSteps:
    """Calls a function of tensors. On a GPU it records the function once for each shape of its inputs and then replays
    it.

    The function must be the same at each call, change its tensors in place only, never wait for the GPU, and return
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.records = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Drops all recorded graphs. Needed when tensors that the function uses have moved to other memory."""
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
