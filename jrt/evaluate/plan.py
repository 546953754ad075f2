"""What a run asks: models x tasks x protocols x strategies, as a list of cells with their items.

Everything that can be wrong with a request is found here, before a model is opened or a file written.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jrt_recall import PUBLISHED, TASKS, Protocol, TaskItems, items, strategy_named
from jrt_recall.protocols import cells as protocols_of

from jrt.evaluate.subjects import ModelSpec, open_tokenizer

RECALL_PREFIX, PASSAGES_PREFIX = "recall_", "qa_"


class Cell(NamedTuple):
    """One number of a table, by names."""

    model: str
    task: str
    strategy: str
    protocol: str


@dataclass(frozen=True)
class Request:
    """What was asked for.

    protocol: a protocol or a family of them; None: each task's default. limit: items per cell; None: all.
    data: mirror folder of the published datasets; passages: folder of the `qa_*` tasks; None: what the environment names.
    cut_with: another cutting tokenizer, which renames the protocol."""

    models: tuple[ModelSpec, ...]
    tasks: tuple[str, ...]
    strategies: tuple[str, ...] = ("once",)
    protocol: str | None = None
    limit: int | None = None
    seed: int = 0
    data: Path | None = None
    passages: Path | None = None
    cut_with: str | None = None


@dataclass(frozen=True)
class Plan:
    """A request made definite: the items of each (task, strategy, protocol), the same for all models."""

    request: Request
    questions: dict[tuple[str, str, str], TaskItems] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All cells, model by model."""
        return [Cell(spec.name, *key) for spec in self.request.models for key in self.questions]

    def items(self, cell: Cell) -> TaskItems:
        return self.questions[cell.task, cell.strategy, cell.protocol]

    def protocols(self) -> list[Protocol]:
        """Each protocol that is used, once."""
        return list({found.protocol.name: found.protocol for found in self.questions.values()}.values())

    def identity(self) -> dict:
        """What makes two runs the same run: plain values for the manifest. Batches, devices and workers are no part."""
        request = self.request
        return {
            "models": [
                {"name": m.name, "dtype": m.dtype or "float32", "compat": m.compat, "short_prompt": m.short_prompt}
                for m in request.models
            ],
            "limit": request.limit,
            "seed": request.seed,
            "cells": [found.summary() for found in self.questions.values()],
            "protocols": [protocol.as_dict() for protocol in self.protocols()],
        }


def plan(request: Request) -> Plan:
    """Loads the questions of a request.

    Raises ValueError for unknown or repeated names (models too), a negative seed, a protocol that does not fit a task, and
    missing datasets."""
    for kind, names in (
        ("model", [m.name for m in request.models]),
        ("task", request.tasks),
        ("strategy", request.strategies),
    ):
        if not names:
            raise ValueError(f"name at least one {kind}")
        if len(set(names)) < len(names):
            raise ValueError(f"the same {kind} is named twice: {', '.join(names)}")
    if request.seed < 0:
        raise ValueError(f"a seed is at least 0, got {request.seed}")
    tasks = [task_named(name) for name in request.tasks]
    _check_folders(request, tasks)
    strategies = [strategy_named(name) for name in request.strategies]
    wanted = [
        (task, protocol, strategy)
        for task in tasks
        for protocol in protocols_of(request.protocol, task)
        for strategy in strategies
    ]
    for spec in request.models:
        open_tokenizer(spec.name)
    questions = {}
    for task, protocol, strategy in wanted:
        folder = request.passages if task.startswith(PASSAGES_PREFIX) else request.data
        found = items(task, strategy, protocol, request.cut_with, request.limit, request.seed, folder)
        questions[task, found.strategy, found.protocol.name] = found
    return Plan(request, questions)


def _check_folders(request: Request, tasks: list[str]) -> None:
    """A folder that is not there, or that no task reads, is a mistake in the request."""
    if request.passages is not None and not any(task.startswith(PASSAGES_PREFIX) for task in tasks):
        raise ValueError("a folder of passages is named, but no task reads it: qa_squad, qa_nq ... do")
    if request.data is not None and not any(task in PUBLISHED for task in tasks):
        raise ValueError(f"a mirror folder is named, but no task reads it: {', '.join(PUBLISHED)} do")
    if request.passages is not None and not Path(request.passages).is_dir():
        raise ValueError(f"the folder of passages, {request.passages}, is not there")
    if request.data is not None and not Path(request.data).is_dir():
        raise ValueError(
            f"the datasets' mirror, {request.data}, is not there: `jrt data fetch --folder FOLDER` makes one"
        )


def task_named(name: str) -> str:
    """The task of that name; lm-eval's `recall_NAME` is understood. Raises ValueError that lists the tasks."""
    task = name.strip().removeprefix(RECALL_PREFIX)
    if task not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return task
