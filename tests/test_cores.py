"""The number of PyTorch's threads is set to the number of cores that other programs leave free."""

import os
import subprocess
import sys
import time

import pytest
import torch

from jrt.system.cores import PERIOD, FreeCores, threads


@pytest.mark.parametrize(
    ("idle", "own", "most", "expected"),
    [
        (0.0, 2.0, 2, 2),  # two threads that nobody disturbs
        (1.0, 1.0, 2, 2),  # a single-threaded part on an idle machine
        (0.0, 1.3, 2, 1),  # two threads beside one busy program
        (0.0, 1.0, 2, 1),  # one thread beside one busy program
        (0.2, 1.5, 2, 2),  # somebody moves a window
        (0.0, 0.2, 2, 1),  # many busy programs
        (60.0, 1.0, 8, 8),  # no more than there were
        (0.0, 7.1, 8, 7),
    ],
)
def test_threads_are_the_cores_that_are_free_or_ours(idle, own, most, expected):
    assert threads(idle, own, most) == expected


@pytest.fixture
def unset(monkeypatch):
    """No number of threads is asked for, and PyTorch has two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def work(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_beside_busy_programs_there_is_one_thread_and_afterwards_as_many_as_before(unset):
    cores = FreeCores()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        work(2 * PERIOD)
        with cores:
            work(2 * PERIOD)
            cores.look()
            assert torch.get_num_threads() == 1
            with cores:
                assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        for program in busy:
            program.kill()
            program.wait()


def test_a_number_that_is_asked_for_is_kept(unset, monkeypatch):
    cores = FreeCores()
    cores._share = 1  # as on a busy machine
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with FreeCores() as fixed:
        fixed.look()
        assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores._last = cores._last._replace(clock=time.monotonic())
    with cores:
        assert torch.get_num_threads() == 1


def test_fewer_threads_than_are_free_stay_fewer(unset):
    cores = FreeCores()
    torch.set_num_threads(1)
    with cores:
        assert torch.get_num_threads() == 1
