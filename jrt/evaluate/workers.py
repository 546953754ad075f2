"""`RayPool`: the jobs of a run on several processes or machines, one model copy in each.

A worker that dies is replaced and its job asked again; rows do not depend on who answers them, so the result is that of
a single process.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator

import ray
from ray.exceptions import RayActorError

from jrt.evaluate.engine import Generation
from jrt.evaluate.pools import Job, Worker
from jrt.evaluate.subjects import ModelSpec

logger = logging.getLogger(__name__)

ATTEMPTS = 3


class RayPool:
    """Ray actors; a context manager that ends them.

    Args:
        workers: how many, each with one CPU.
        address: an existing cluster, on which jrt must be installed; None starts Ray here.
        gpus: GPUs of each worker.

    Raises:
        ValueError: the cluster cannot be reached.
    """

    def __init__(self, workers: int, address: str | None = None, gpus: float = 0) -> None:
        if workers < 1:
            raise ValueError(f"at least one worker is needed, got {workers}")
        options = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
        except ConnectionError as error:
            raise ValueError(
                f"no Ray cluster answers at {address!r}; one that asks for a token needs RAY_AUTH_MODE=token here, too"
            ) from error
        self._actor_class = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        self.actors = [self._actor_class.remote() for _ in range(workers)]

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_) -> None:
        ray.shutdown()

    def facts(self, spec: ModelSpec) -> dict:
        return self._asked("facts", spec)

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._asked("state_bytes", spec, length)

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Generation]]]:
        """Answers as they come; each worker has one job at a time.

        Raises RuntimeError where a job has ended its worker several times."""
        coming, again = iter(jobs), deque()
        failures: dict[int, int] = {}
        running = {}
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
            (done,), _ = ray.wait(list(running), num_returns=1)
            job, place = running.pop(done)
            try:
                found = ray.get(done)
            except RayActorError as error:
                failures[id(job)] = failures.get(id(job), 0) + 1
                if failures[id(job)] >= ATTEMPTS:
                    raise RuntimeError(f"{ATTEMPTS} workers died of the same {len(job.rows)} prompts") from error
                self._replace(place)
                again.append(job)
                continue
            yield job, found

    def _asked(self, method: str, *arguments):
        for _ in range(ATTEMPTS):
            try:
                return ray.get(getattr(self.actors[0], method).remote(*arguments))
            except RayActorError:
                self._replace(0)
        raise RuntimeError(f"{ATTEMPTS} workers died while they opened {arguments[0].name}")

    def _replace(self, place: int) -> None:
        logger.warning("worker %d died: another takes its place", place)
        self.actors[place] = self._actor_class.remote()
