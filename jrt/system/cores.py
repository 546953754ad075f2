"""Sets the number of PyTorch's threads to the number of cores that other programs leave free.

The threads of one operation wait for each other in a busy loop. If another program takes a core from one of them, all
others wait for it, and take processor time while they wait. So on two cores with one busy program, two threads are
several times slower than one. On an idle machine more threads are faster. Waiting asleep instead would be slower there
(benchmarks/busy_machine.py).
"""

import os
import time
from typing import NamedTuple, Self

import psutil
import torch

PERIOD = 0.5
"""Seconds between two measurements."""


class _Reading(NamedTuple):
    """A measurement, in seconds: the clock, the idle time of all cores together, the processor time of this process."""

    clock: float
    idle: float
    own: float


class FreeCores:
    """A context manager: inside, PyTorch has as many threads as there are free cores, and after it its former number.

    If the environment variable OMP_NUM_THREADS is set, nothing is changed."""

    def __init__(self) -> None:
        self._changes = "OMP_NUM_THREADS" not in os.environ
        self._outside: list[int] = []  # PyTorch's number of threads before each open `with`, which may be nested
        self._share = torch.get_num_threads()
        self._last = STARTED

    def __enter__(self) -> Self:
        self._outside.append(torch.get_num_threads())
        self.look()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._outside.pop())

    def look(self) -> None:
        """Measures again if PERIOD seconds have passed, and sets the number of PyTorch's threads.

        Call it after each step of a long computation, inside `with`, in the thread that computes."""
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
    """Number of threads, from 1 to `most`: cores that were idle plus cores that this process used, rounded."""
    return max(1, min(most, round(idle + own)))


def _read() -> _Reading:
    """Measures now. Only cores on which this process may run are counted; its own time includes all its threads."""
    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)]
    idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in cores)
    return _Reading(time.monotonic(), idle, time.process_time())


STARTED = _read()
"""The measurement at import, with which the first `look` compares: loading a model takes long enough for a good
estimate."""
