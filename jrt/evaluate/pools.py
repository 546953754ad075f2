"""Who computes: this process, or Ray actors (`workers`). Both answer the same jobs with the same code."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol as Interface

from jrt_recall import Protocol

from jrt.evaluate.engine import Generation, answer
from jrt.evaluate.plan import Cell
from jrt.evaluate.subjects import ModelSpec, Subject, open_subject


@dataclass(frozen=True)
class Job:
    """One batch of one cell: prompts as ids, and which items of the cell they ask."""

    spec: ModelSpec
    cell: Cell
    protocol: Protocol
    rows: list[list[int]]
    items: list[int]


class Pool(Interface):
    """What a run needs of whoever computes."""

    def facts(self, spec: ModelSpec) -> dict: ...

    def state_bytes(self, spec: ModelSpec, length: int) -> int: ...

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Generation]]]: ...


class Worker:
    """Keeps one model open at a time and answers jobs."""

    def __init__(self) -> None:
        self._subject: Subject | None = None

    def facts(self, spec: ModelSpec) -> dict:
        return asdict(self._opened(spec).facts())

    def state_bytes(self, spec: ModelSpec, length: int) -> int:
        return self._opened(spec).state_bytes(length)

    def answer(self, job: Job) -> list[Generation]:
        return answer(self._opened(job.spec), job.rows, job.protocol)

    def _opened(self, spec: ModelSpec) -> Subject:
        if self._subject is None or self._subject.spec != spec:
            self._subject = None  # the former model's memory, before the next is read
            self._subject = open_subject(spec)
        return self._subject


class LocalPool(Worker):
    """Everything in this process, one job after the other."""

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Generation]]]:
        for job in jobs:
            yield job, self.answer(job)
