"""Linear attention inside DDP, FSDP2, activation checkpointing and torch.compile.

On a CPU two processes (gloo) must compute what one computes, with PyTorch's backend. On a GPU one process uses
Triton's.

Shapes: B batch, T tokens, M prefix tokens, E width, H heads, d query/key size, D value size.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from jrt.ops import prefix_linear_attention

B, T, M, E, H, d = 4, 70, 40, 32, 2, 8
WRAPPERS = ("ddp", "fsdp")


class PrefixReader(nn.Module):
    """Projections, a prefix and a text: a mixer with its backend named."""

    def __init__(self, backend: str, checkpoints: bool) -> None:
        super().__init__()
        self.backend, self.checkpoints = backend, checkpoints
        self.queries, self.keys, self.prefix_keys = (nn.Linear(E, H * d, bias=False) for _ in range(3))
        self.values, self.prefix_values, self.out = (nn.Linear(E, E, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoints:
            return checkpoint(self.read, x, use_reentrant=False)
        return self.read(x)

    def read(self, x: Tensor) -> Tensor:
        prefix = (heads(project(x[:, :M])) for project in (self.prefix_keys, self.prefix_values))
        q, k, v = (heads(project(x)) for project in (self.queries, self.keys, self.values))
        o, _ = prefix_linear_attention(q, k, v, *prefix, backend=self.backend)
        return self.out(o.flatten(2))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1))


def reader(backend: str, checkpoints: bool = False) -> PrefixReader:
    torch.manual_seed(0)
    return PrefixReader(backend, checkpoints)


def texts() -> Tensor:
    return torch.randn(B, T, E, generator=torch.Generator().manual_seed(1))


def wrapped(model: nn.Module, how: str) -> nn.Module:
    return DistributedDataParallel(model) if how == "ddp" else fully_shard(model)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the mean square of the outputs, by the parameter's name in `PrefixReader`, whole where they are sharded."""
    model(x).square().mean().backward()
    found = {}
    for name, weight in model.named_parameters():
        grad = weight.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def read_as(rank: int, store: Path, how: str, checkpoints: bool) -> None:
    """One of two processes, with every second text."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = gradients(wrapped(reader("chunked", checkpoints), how), texts()[rank::2])
    torch.save(found, store.with_name(f"gradients-{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpointed"])
def test_two_processes_have_the_gradients_of_one(tmp_path, how, checkpoints):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                read_as(rank, tmp_path / "store", how, checkpoints)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    expected = gradients(reader("reference"), texts())
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", WRAPPERS)
def test_wrapped_on_a_gpu(group_of_one, how, compiles, checkpoints, backend):
    expected = gradients(reader("reference").double(), texts().double())
    model = wrapped(reader(backend, checkpoints).cuda(), how)
    if compiles:
        model.compile(fullgraph=False, dynamic=False)  # DDP and FSDP2 break the graph at their hooks
    for name, grad in gradients(model, texts().cuda()).items():
        torch.testing.assert_close(grad.cpu().double(), expected[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=1e-5)
