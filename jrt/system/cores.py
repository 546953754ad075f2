"""How many threads PyTorch computes with on a processor that other programs use at the same time.

The threads of one operation wait for each other, and they wait by running: a thread that another program has pushed aside
holds up all others, and those that wait take processor time from it. Two threads beside one busy program on two cores are
several times slower than one thread. On an idle machine more threads are faster, and waiting by sleeping is slower
(benchmarks/busy_machine.py).
"""

import os
import time
from typing import NamedTuple, Self

import psutil
import torch

PERIOD = 0.5
"""Seconds between two looks at the machine."""


class _Reading(NamedTuple):
    """Seconds since the machine or the process started: on the clock, not used by anyone (all cores), used by this process."""

    clock: float
    idle: float
    own: float


class FreeCores:
    """Threads for the cores that other programs leave free. As a context manager: inside, PyTorch computes with so many.

    Where OMP_NUM_THREADS is set, its number is kept."""

    def __init__(self) -> None:
        self._changes = "OMP_NUM_THREADS" not in os.environ
        self._outside: list[int] = []  # PyTorch's threads before each `with` that is open
        self._share = torch.get_num_threads()
        self._last = STARTED

    def __enter__(self) -> Self:
        self._outside.append(torch.get_num_threads())
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._outside.pop())

    def look(self) -> None:
        """Sets PyTorch's threads to what was free in the last PERIOD seconds; a new look is taken when they have passed.

        For each step of a long computation, in the thread that computes, inside `with`."""
        if not self._changes:
            return
        most = self._outside[0]
        if time.monotonic() - self._last.clock >= PERIOD:
            last, self._last = self._last, _read()
            passed, idle, own = (after - before for before, after in zip(last, self._last, strict=True))
            self._share = threads(idle / passed, own / passed, most)
        wanted = min(self._share, most)
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


def threads(idle: float, own: float, most: int) -> int:
    """The nearest number to the cores that are idle or this process's own, from 1 to `most`."""
    return max(1, min(most, round(idle + own)))


def _read() -> _Reading:
    """The process's processor time counts all its threads; cores are those that it may run on."""
    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)]
    idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in cores)
    return _Reading(time.monotonic(), idle, time.process_time())


STARTED = _read()
"""When this module was imported. Loading a model takes seconds, in which the machine shows how busy it is."""
