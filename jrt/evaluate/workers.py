"""Where answers are computed: in this process (`LocalPool`), or in Ray actors, on one machine or several (`RayPool`).

Both run the same code on the same jobs (batches of prompts), so the results are the same. `Throughput` measures how fast
answers arrive.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jrt_recall import Protocol

from jrt.evaluate.answering import Generation, answer
from jrt.evaluate.folder import Cell
from jrt.evaluate.models import ModelSpec, OpenModel, open_model

ATTEMPTS = 3
STORE = 2**30  # bytes that Ray may take for prompts and answers on their way; by default it takes 30% of the memory
AHEAD = 2  # jobs that a worker is given at a time, so that it does not wait for the next one


@dataclass(frozen=True)
class Job:
    """One batch of one cell (model, task, strategy and protocol).

    Args:
        rows: the prompts as token ids.
        items: for each prompt, the index of its item in the cell.
    """

    spec: ModelSpec
    cell: Cell
    protocol: Protocol
    rows: list[list[int]]
    items: list[int]


class Answered(NamedTuple):
    """A job with its answers, or with the error message if the model's code failed; worker: its number, from 0."""

    job: Job
    answers: list[Generation] | str
    worker: int


class Worker:
    """Keeps one model open at a time and answers jobs."""

    def __init__(self) -> None:
        self._model: OpenModel | None = None

    def open(self, spec: ModelSpec) -> None:
        """Opens a model before its first job. Of a model that cannot be opened, `info` says why."""
        with suppress(ValueError):
            self._opened(spec)

    def info(self, spec: ModelSpec) -> dict:
        return self._opened(spec).info()

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._opened(spec).state_bytes(length)

    def answer(self, job: Job) -> list[Generation] | str:
        try:
            return answer(self._opened(job.spec), job.rows, job.protocol)
        except ValueError as error:
            return str(error)

    def _opened(self, spec: ModelSpec) -> OpenModel:
        if self._model is None or self._model.spec != spec:
            self._model = None  # frees the previous model's memory before the next model is loaded
            self._model = open_model(spec)
        return self._model


class LocalPool(Worker):
    """Computes in this process, one job after the other."""

    workers = 1

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answered]:
        for job in jobs:
            yield Answered(job, self.answer(job), 0)


class RayPool:
    """Ray actors, each with its own copy of the model. Leaving the context (`with RayPool(...)`) ends them.

    All workers open the model at the same time, and a worker is given jobs once it has opened it. Ray replaces a worker
    that dies and gives it the same jobs; it opens the model for the first of them.

    Args:
        workers: number of actors; each reserves one CPU.
        address: of a running Ray cluster on which jrt is installed; None starts Ray on this machine.
        gpus: GPUs that each worker reserves; a fraction lets workers share a GPU.

    Raises:
        ValueError: Ray is not installed, fewer than one worker, more workers than this machine has GPUs for, or the
            cluster cannot be reached.
    """

    def __init__(self, workers: int, address: str | None = None, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("several workers need Ray: pip install 'jrt[scale]'") from error
        if workers < 1:
            raise ValueError(f"at least one worker is needed, got {workers}")
        options: dict[str, Any] = {}
        if address is None:
            there = torch.cuda.device_count() if gpus else 0
            if workers * gpus > there:
                raise ValueError(
                    f"{workers} workers need {workers * gpus:g} GPUs, and this machine has {there}: ask for fewer workers"
                )
            options = {"num_cpus": workers, "num_gpus": there, "include_dashboard": False, "object_store_memory": STORE}
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
        except ConnectionError as error:
            raise ValueError(
                f"no Ray cluster answers at {address!r}; one that asks for a token needs RAY_AUTH_MODE=token here, too"
            ) from error
        self.workers = workers
        self._ray = ray
        reserved = {"num_cpus": 1, "num_gpus": gpus}
        actor: Any = ray.remote(**reserved, max_restarts=-1, max_task_retries=ATTEMPTS - 1)(Worker)
        self.actors = [actor.remote() for _ in range(workers)]
        self._spec: ModelSpec | None = None  # the model that was asked for last
        self._opening: dict[Any, int] = {}  # the workers that are opening it, by Ray's reference to the end of that

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def info(self, spec: ModelSpec) -> dict:
        """A model's description, from the first worker. The others open the model meanwhile."""
        if spec != self._spec:
            self._spec = spec
            self._opening = {actor.open.remote(spec): worker for worker, actor in enumerate(self.actors)}
        return self._result(self.actors[0].info.remote(spec), f"while they opened {spec.name}")

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._result(self.actors[0].state_bytes.remote(spec, length), f"while they ran {spec.name}")

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answered]:
        """Yields jobs with their answers, in the order in which they finish.

        Raises RuntimeError if ATTEMPTS workers died of the same job, or one after the other while they opened a model."""
        coming = iter(jobs)
        given: dict[Any, tuple[Job, int]] = {}  # a job and its worker, by Ray's reference to the answers; oldest first
        while True:
            for worker in self._free(worker for _, worker in given.values()):
                job = next(coming, None)
                if job is None and not given:
                    return
                if job is None:
                    break
                given[self.actors[worker].answer.remote(job)] = job, worker
            (done,), _ = self._ray.wait([*given, *self._opening], num_returns=1)
            if done in self._opening:
                self._result(done, f"while they opened {self._spec.name if self._spec else 'a model'}")
                del self._opening[done]
                continue
            job, worker = given[done]
            # A worker answers its jobs in their order, so it died of the oldest.
            oldest = next(job for job, other in given.values() if other == worker)
            answers = self._result(done, f"of the same {len(oldest.rows)} prompts")
            del given[done]
            yield Answered(job, answers, worker)

    def _free(self, busy: Iterable[int]) -> list[int]:
        """The workers that can be given jobs now, once for each job; those with the fewest jobs come first.

        busy: the worker of each job that has no answer yet."""
        jobs, opening = Counter(busy), self._opening.values()
        ready = [worker for worker in range(self.workers) if worker not in opening]
        return [worker for count in range(AHEAD) for worker in ready if jobs[worker] <= count]

    def _result(self, reference: Any, when: str) -> Any:
        """What a call of an actor returned. Raises RuntimeError if ATTEMPTS workers died; `when` says of what."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise RuntimeError(f"{ATTEMPTS} workers died {when}") from error


Pool = LocalPool | RayPool
"""Gives a model's description, the size of its state, and answers to jobs."""


class Throughput:
    """Counts items from the moment when every worker has answered once, so that all are warm, to the last answer."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._cold = set(range(workers))  # workers without an answer so far
        self._items = 0
        self._begun = self._last = 0.0

    def note(self, worker: int, items: int) -> None:
        """Records that a worker's answers to a number of items have just arrived."""
        self._last = time.monotonic()
        if self._cold:
            self._cold.discard(worker)
            self._begun = self._last
        else:
            self._items += items

    def as_dict(self) -> dict[str, float]:
        """The number of workers, the items that count, and their seconds; both are 0 if some worker never answered."""
        return {"workers": self.workers, "items": self._items, "seconds": self._last - self._begun}
