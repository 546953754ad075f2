"""Trains groups of runs: one after another, in several processes, or on a Ray cluster.

Each process has its own GPU or an equal share of the CPU cores."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from jrt.system.processes import end_with
from synthetics.folder import provenance
from synthetics.runs import Run
from synthetics.training import train

Group = tuple[list[Run], Path]  # runs of one shape, and the file of their checkpoint
Rows = list[dict] | None  # results of a group; None: the deadline came before the group was finished


def train_all(
    groups: Sequence[Group], device: str, workers: int, deadline: float | None, use_ray: bool
) -> Iterator[Rows]:
    """Trains all groups. Yields the results of each group as soon as it ends, with device, versions, commit and date.

    Args:
        groups: what to train.
        device: "cpu" or "cuda". With several GPUs, the workers are spread over them.
        workers: number of processes; 1 trains in this process.
        deadline: a time of `time.monotonic`, after which no group and no epoch is started; None: no deadline.
        use_ray: whether Ray distributes the groups over its cluster, with one GPU or one core for each. The checkpoints
            must then be on a file system that all machines share.

    Raises:
        ValueError: the device or Ray is missing, workers is below 1, or a worker was killed.
    """
    check_device(device, workers)
    check_ray(use_ray)
    if use_ray:
        yield from _over_ray(groups, device, deadline)
    elif workers == 1:
        for group in groups:
            yield _train_one(group, _first(device), deadline)
    else:
        yield from _over_processes(groups, device, workers, deadline)


def check_device(device: str, workers: int) -> None:
    """Raises ValueError for an unknown or missing device, or for fewer than one worker."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch sees no GPU here; use --device cpu")
    if workers < 1:
        raise ValueError(f"{workers} workers: expected at least 1")


def check_ray(use_ray: bool) -> None:
    """Raises ValueError if Ray is asked for and not installed."""
    if use_ray and importlib.util.find_spec("ray") is None:
        raise ValueError("ray is not installed: pip install 'jrt[scale]', or leave --ray out")


def _train_one(group: Group, device: torch.device, deadline: float | None) -> Rows:
    if deadline is not None and time.monotonic() > deadline:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one
    runs, checkpoint = group
    rows = train(runs, device, checkpoint, deadline)
    if rows is not None:
        rows = [{**row, **provenance(device.type)} for row in rows]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next group's tensors have other sizes
    return rows


def _first(device: str) -> torch.device:
    return torch.device("cuda:0" if device == "cuda" else device)


def _in_process(group: Group, device: str, threads: int, deadline: float | None) -> Rows:
    torch.set_num_threads(threads)
    return _train_one(group, torch.device(device), deadline)


def _over_processes(groups: Sequence[Group], device: str, workers: int, deadline: float | None) -> Iterator[Rows]:
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    free = [f"cuda:{worker % gpus}" if gpus else "cpu" for worker in range(workers)]
    threads = max(1, (os.cpu_count() or 1) // workers)
    waiting, running = list(reversed(groups)), {}
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        while waiting or running:
            while waiting and free:
                place = free.pop()
                running[pool.submit(_in_process, waiting.pop(), place, threads, deadline)] = place
            done = next(as_completed(running))
            free.append(running.pop(done))
            try:
                rows = done.result()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"one of {workers} worker processes was killed, perhaps for lack of memory: go on with --resume and "
                    "fewer --workers"
                ) from error
            yield rows


def _over_ray(groups: Sequence[Group], device: str, deadline: float | None) -> Iterator[Rows]:
    import ray

    ray.init(ignore_reinit_error=True)
    # In a Ray task, its own GPU is cuda:0. `time.monotonic` differs between machines, so the time left is passed on.
    left = None if deadline is None else deadline - time.monotonic()
    began = time.time()

    @ray.remote(num_gpus=1 if device == "cuda" else 0, num_cpus=1)
    def remote(group: Group) -> Rows:
        own_deadline = None if left is None else time.monotonic() + left - (time.time() - began)
        return _train_one(group, _first(device), own_deadline)

    waiting = [remote.remote(group) for group in groups]
    while waiting:
        done, waiting = ray.wait(waiting)
        yield ray.get(done[0])
