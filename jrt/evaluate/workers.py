"""Where answers are computed: in this process (`LocalPool`), or in Ray actors, on one machine or several (`RayPool`).

Both run the same code on the same jobs (batches of prompts), so the results are the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from typing import Protocol as Interface

from jrt_recall import Protocol

from jrt.evaluate.answering import Generation, answer
from jrt.evaluate.folder import Cell
from jrt.evaluate.models import ModelSpec, OpenModel, open_model

logger = logging.getLogger(__name__)

ATTEMPTS = 3


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


@dataclass(frozen=True)
class Failure:
    """Stands for the answers of a batch on which the model's code failed; `reason` is the error message."""

    reason: str


class Pool(Interface):
    """The interface that a run needs: a model's description, its state size, and answers to jobs."""

    def info(self, spec: ModelSpec) -> dict: ...

    def state_bytes(self, spec: ModelSpec, length: int) -> int: ...

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Generation] | Failure]]: ...


class Worker:
    """Keeps one model open at a time and answers jobs."""

    def __init__(self) -> None:
        self._model: OpenModel | None = None

    def info(self, spec: ModelSpec) -> dict:
        return asdict(self._opened(spec).info())

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._opened(spec).state_bytes(length)

    def answer(self, job: Job) -> list[Generation] | Failure:
        try:
            return answer(self._opened(job.spec), job.rows, job.protocol)
        except ValueError as error:
            return Failure(str(error))

    def _opened(self, spec: ModelSpec) -> OpenModel:
        if self._model is None or self._model.spec != spec:
            self._model = None  # frees the previous model's memory before the next model is loaded
            self._model = open_model(spec)
        return self._model


class LocalPool(Worker):
    """Computes in this process, one job after the other."""

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Generation] | Failure]]:
        for job in jobs:
            yield job, self.answer(job)


class RayPool:
    """Ray actors, each with its own copy of the model. Leaving the context (`with RayPool(...)`) ends them.

    A worker that dies is replaced, and its job is given to another worker.

    Args:
        workers: number of actors; each reserves one CPU.
        address: of a running Ray cluster on which jrt is installed; None starts Ray on this machine.
        gpus: GPUs that each worker reserves; a fraction lets workers share a GPU.

    Raises:
        ValueError: fewer than one worker, or the cluster cannot be reached.
    """

    def __init__(self, workers: int, address: str | None = None, gpus: float = 0) -> None:
        import ray

        if workers < 1:
            raise ValueError(f"at least one worker is needed, got {workers}")
        options: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
        except ConnectionError as error:
            raise ValueError(
                f"no Ray cluster answers at {address!r}; one that asks for a token needs RAY_AUTH_MODE=token here, too"
            ) from error
        self._ray = ray
        self._actor_class: Any = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        self.actors = [self._actor_class.remote() for _ in range(workers)]

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def info(self, spec: ModelSpec) -> dict:
        return self._asked("info", spec)

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._asked("state_bytes", spec, length)

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Generation] | Failure]]:
        """Yields jobs with their answers, in the order in which they finish; each worker has one job at a time.

        Raises:
            RuntimeError: a job's worker died ATTEMPTS times.
        """
        coming, again = iter(jobs), deque[Job]()
        failures: dict[int, int] = {}
        running: dict[Any, tuple[Job, int]] = {}  # Ray's reference to a result: its job, and the index of the worker
        while True:
            busy = {place for _, place in running.values()}
            for place in range(len(self.actors)):
                if place in busy:
                    continue
                job = again.popleft() if again else next(coming, None)
                if job is None:
                    break
                running[self.actors[place].answer.remote(job)] = (job, place)
            if not running:
                return
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            job, place = running.pop(done)
            try:
                found = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                failures[id(job)] = failures.get(id(job), 0) + 1
                if failures[id(job)] >= ATTEMPTS:
                    raise RuntimeError(f"{ATTEMPTS} workers died of the same {len(job.rows)} prompts") from error
                self._replace(place)
                again.append(job)
                continue
            yield job, found

    def _asked(self, method: str, spec: ModelSpec, *more: int) -> Any:
        for _ in range(ATTEMPTS):
            try:
                return self._ray.get(getattr(self.actors[0], method).remote(spec, *more))
            except self._ray.exceptions.RayActorError:
                self._replace(0)
        raise RuntimeError(f"{ATTEMPTS} workers died while they opened {spec.name}")

    def _replace(self, place: int) -> None:
        logger.warning("worker %d died: another takes its place", place)
        self.actors[place] = self._actor_class.remote()
