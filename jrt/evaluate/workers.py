"""Where answers are computed: in this process (`LocalPool`), or in Ray actors, on one machine or several (`RayPool`).

Both run the same code on the same jobs (batches of prompts), so the results are the same. `Throughput` measures how fast
answers arrive.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jrt_recall import Protocol

from jrt.evaluate.answering import Generation, answer
from jrt.evaluate.folder import Cell
from jrt.evaluate.models import ModelSpec, OpenModel, open_model

logger = logging.getLogger(__name__)

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


class _Given(NamedTuple):
    """A job that was given to a worker: the worker's number, and the actor that had this number then."""

    job: Job
    worker: int
    actor: Any


class RayPool:
    """Ray actors, each with its own copy of the model. Leaving the context (`with RayPool(...)`) ends them.

    All workers open the model at the same time, and a worker is given jobs once it has opened it. A worker that dies is
    replaced, and its jobs are given to others.

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
        self._actor_class: Any = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        self.actors = [self._actor_class.remote() for _ in range(workers)]
        self._spec: ModelSpec | None = None  # the model that was asked for last
        self._opening: dict[Any, int] = {}  # the workers that are opening it, by Ray's reference to the end of that
        self._deaths = 0  # of workers that were opening it, since one succeeded

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def info(self, spec: ModelSpec) -> dict:
        """A model's description, from the first worker. The others open the model meanwhile."""
        if spec != self._spec:
            self._spec = spec
            for worker in range(self.workers):
                self._open(worker)
        return self._asked("info", spec)

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._asked("state_bytes", spec, length)

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answered]:
        """Yields jobs with their answers, in the order in which they finish.

        Raises RuntimeError if ATTEMPTS workers died of the same job, or one after the other while they opened a model."""
        coming, again = iter(jobs), deque[Job]()
        deaths = Counter[tuple]()  # of workers, by cell and items
        given: dict[Any, _Given] = {}  # by Ray's reference to the answers, oldest first
        while True:
            for worker in self._free(given.values()):
                job = again.popleft() if again else next(coming, None)
                if job is None and not given:
                    return
                if job is None:
                    break
                actor = self.actors[worker]
                given[actor.answer.remote(job)] = _Given(job, worker, actor)
            (done,), _ = self._ray.wait([*given, *self._opening], num_returns=1)
            if done in self._opening:
                self._has_opened(done)
                continue
            job, worker, actor = given[done]
            try:
                answers = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                lost = [given.pop(other).job for other in list(given) if given[other].actor is actor]
                oldest = (lost[0].cell, *lost[0].items)  # a worker answers its jobs in their order, so it died of this
                deaths[oldest] += 1
                if deaths[oldest] == ATTEMPTS:
                    raise RuntimeError(f"{ATTEMPTS} workers died of the same {len(lost[0].rows)} prompts") from error
                again.extend(lost)
                if self.actors[worker] is actor:
                    self._replace(worker)
                continue
            del given[done]
            yield Answered(job, answers, worker)

    def _free(self, given: Iterable[_Given]) -> list[int]:
        """The workers that can be given jobs now, once for each job; those with the fewest jobs come first."""
        jobs = Counter(one.worker for one in given)
        opening = set(self._opening.values())
        ready = [worker for worker in range(self.workers) if worker not in opening]
        return [worker for count in range(AHEAD) for worker in ready if jobs[worker] <= count]

    def _open(self, worker: int) -> None:
        self._opening = {reference: other for reference, other in self._opening.items() if other != worker}
        self._opening[self.actors[worker].open.remote(self._spec)] = worker

    def _has_opened(self, reference: Any) -> None:
        worker = self._opening.pop(reference)
        try:
            self._ray.get(reference)
            self._deaths = 0
        except self._ray.exceptions.RayActorError as error:
            self._deaths += 1
            if self._deaths == ATTEMPTS:
                raise self._died_opening() from error
            self._replace(worker)

    def _asked(self, method: str, spec: ModelSpec, *more: int) -> Any:
        for _ in range(ATTEMPTS):
            try:
                return self._ray.get(getattr(self.actors[0], method).remote(spec, *more))
            except self._ray.exceptions.RayActorError:
                self._replace(0)
        raise self._died_opening()

    def _died_opening(self) -> RuntimeError:
        return RuntimeError(f"{ATTEMPTS} workers died while they opened {self._spec.name if self._spec else 'a model'}")

    def _replace(self, worker: int) -> None:
        logger.warning("worker %d died: another takes its place", worker)
        self.actors[worker] = self._actor_class.remote()
        self._open(worker)


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
