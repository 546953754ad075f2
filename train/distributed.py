"""Training with one process for each device: starting the processes, spreading the model, drawing its first weights."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from jrt.config import Config
from jrt.model import LanguageModel
from jrt.system.processes import PARENT
from jrt.training.loss import ModelWithLoss

log = logging.getLogger(__name__)
STRATEGIES = ("ddp", "fsdp")
UNIT = 40_000_000  # parameters of a group that FSDP gathers at once: four blocks of a 360M model, two of a 1.3B model
# MiB of gradients that DistributedDataParallel sums at once: all of them, after the backward pass. A sum beside the
# backward pass takes multiprocessors from it, and a matrix product waits where its own are taken: on H100s the step was no
# shorter with smaller buckets, fewer NCCL blocks or sums in bf16.
BUCKET_MIB = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def same(self, value: object) -> object:
        """Returns the first process's value on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


class SaidElsewhere(ValueError):
    """Another process has the same problem and says so."""


def on_first(place: World, work: Callable[[], T]) -> T | None:
    """Returns what `work` returns on the first process, and None on the others, which wait for it.

    Raises:
        ValueError, OSError: what `work` raised; on the other processes SaidElsewhere.
    """
    found, problem = None, None
    if place.is_first:
        try:
            found = work()
        except (ValueError, OSError) as error:
            problem = error
    failed = place.same(problem is not None)
    if problem is not None:
        raise problem
    if failed:
        raise SaidElsewhere
    return found


def is_launched() -> bool:
    """Whether torchrun, SLURM with torchrun, or `launch` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def world(accelerator: str, devices: int, nodes: int) -> Iterator[World]:
    """Connects this process with the others, if there are any, and disconnects at the end.

    Args:
        accelerator: "auto", "cpu" or "gpu".
        devices: of each machine.
        nodes: number of machines.

    Raises:
        ValueError: the device does not exist, or the number of processes is not devices x nodes.
    """
    count = int(os.environ["WORLD_SIZE"]) if is_launched() else 1
    if count != devices * nodes:
        raise ValueError(
            f"{count} processes run, but trainer.devices x trainer.nodes is {devices * nodes}: start train/run.py, which "
            "starts one for each device, or torchrun with as many"
        )
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(accelerator, local)
    if count == 1:
        yield World(0, 1, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        yield World(rank, count, device)
    finally:
        dist.destroy_process_group()


def _device(accelerator: str, local: int) -> torch.device:
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator is {accelerator!r}: expected auto, cpu or gpu")
    available = torch.cuda.device_count()
    if accelerator == "cpu" or (accelerator == "auto" and not available):
        return torch.device("cpu")
    if local >= available:
        fewer = f", or trainer.devices={available}" if available else ""
        raise ValueError(f"device {local + 1} of {available} GPUs was asked for: use trainer=cpu{fewer}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def launch(script: str, arguments: Sequence[str], devices: int) -> int:
    """Runs `python script arguments` in one process for each device of this machine, and returns the exit code.

    The processes end with this one, even if it is killed (`jrt.system.processes`)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"is_host": True},
        max_restarts=0,
        run_id=f"jrt-{port}",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the run itself says what went wrong
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ[PARENT] = str(os.getpid())
    try:
        elastic_launch(config, entrypoint=sys.executable)(script, *arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            log.error("the process of device %d was ended by signal %d", rank, -failure.exitcode)
        return failure.exitcode
    return 0


def build(
    config: Config,
    recovers: bool,
    place: World,
    strategy: str,
    seed: int | None,
    compiles: bool = False,
    checkpoints_activations: bool = False,
) -> tuple[LanguageModel, nn.Module]:
    """Builds the model on this process's device.

    Only the first process draws weights; the others receive them. So a model starts with the same weights on any number
    of devices.

    Args:
        config: of the model.
        recovers: whether the loss has a part for masked tokens (`jrt.training.loss.ModelWithLoss`).
        place: this process.
        strategy: one of STRATEGIES.
        seed: of the weights; None if a checkpoint will fill them.
        compiles: whether parts of the model are compiled.
        checkpoints_activations: whether activations are computed again in the backward pass, to save memory.

    Returns:
        The model, and the module to call in training: the model with its loss, spread over the devices.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"trainer.strategy is {strategy!r}: expected one of {', '.join(STRATEGIES)}")
    drawn: LanguageModel | None = None
    if place.is_first:
        drawn = LanguageModel(config)
        if seed is not None:
            drawn.init_weights(torch.Generator().manual_seed(seed))
    if place.size == 1:
        assert drawn is not None
        model = drawn.to(place.device)
    else:
        with torch.device("meta"):
            model = LanguageModel(config)
    whole = ModelWithLoss(model, recovers)
    if compiles:
        whole.compile_parts()
    if checkpoints_activations:
        whole.checkpoint_blocks()
    if place.size == 1:
        return model, whole
    if strategy == "fsdp":
        mesh = init_device_mesh(place.device.type, (place.size,))
        for unit in units(list(model.blocks)):
            fully_shard(unit, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    _to_empty(model, place.device)
    state = drawn.state_dict() if drawn is not None else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    _share_buffers(model, drawn)
    if strategy == "ddp":
        devices = [place.device.index] if place.device.type == "cuda" else None
        # Gradients are summed in the memory where they are computed. Buffers are constants: nothing to send.
        shared = DistributedDataParallel(
            whole, devices, gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=BUCKET_MIB
        )
        return model, shared
    return model, whole


def units(blocks: list[nn.Module], least: int = UNIT) -> list[list[nn.Module]]:
    """Groups successive blocks for FSDP, so that each group has at least `least` parameters; the last may have fewer.

    The weights of a group are gathered and freed together. That takes time on the CPU for each group, and memory for
    its weights."""
    found, size = list[list[nn.Module]](), least
    for block in blocks:
        if size >= least:
            found.append([])
            size = 0
        found[-1].append(block)
        size += sum(parameter.numel() for parameter in block.parameters())
    return found


def _to_empty(model: LanguageModel, device: torch.device) -> None:
    model.to_empty(device=device)
    if model.config.tied:  # `to_empty` gives tied weights separate memory
        model.head.weight = model.embedding.weight


def _share_buffers(model: LanguageModel, drawn: LanguageModel | None) -> None:
    """Sends the first process's buffers to all others, because a state_dict need not hold them."""
    source = dict(drawn.named_buffers()) if drawn is not None else {}
    for name, buffer in model.named_buffers():
        if name in source:
            buffer.copy_(source[name])
        dist.broadcast(buffer, src=0)


@contextmanager
def unsynchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Inside this context, gradients are summed over the devices only in the last pass of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    set_sync: Callable[[bool], None] | None = getattr(module, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)
    yield


def whole_state(model: LanguageModel) -> dict[str, Tensor]:
    """Returns all weights, gathered on the CPU of the first process. On the others the dict is empty."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
