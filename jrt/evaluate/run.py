"""A run of `jrt eval`: `plan(request)` loads the questions, `run(plan, pool, output)` answers them into a folder.

`run` writes predictions batch by batch, and computes all results from what was written. So the results are the same for
a run that was interrupted and resumed, or spread over workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jrt_recall import TaskItems, contains, items, strategy_named, task_named
from jrt_recall.protocols import PAGES, PASSAGES
from jrt_recall.protocols import cells as protocols_of
from jrt_recall.scoring import bootstrap
from jrt_recall.tokenizers import reachable
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from jrt.evaluate.answering import Encoded, Generation, encode, prompt_limit
from jrt.evaluate.batches import Limits, batches
from jrt.evaluate.folder import Cell, Results, RunFolder, by_item, origin
from jrt.evaluate.models import ModelSpec, open_tokenizer
from jrt.evaluate.tables.side_by_side import comparisons
from jrt.evaluate.workers import Job, Pool, Throughput

CPU_TOKENS = 8192  # the most tokens of a batch: the activations of more do not fit a processor's caches
CPU_PADDING = 1024  # the most padding of a batch, in tokens: more costs as much time as one more batch
ON_CPU = Limits(size=16, tokens=CPU_TOKENS, padding=CPU_PADDING)
# For models with full attention on a CPU (`Limits.alone`): on longer prompts, attention over padding costs more time
# than decoding them in one batch saves.
CPU_ALONE = 1024
ON_GPU = Limits(size=128)  # a batch that does not fit into memory is halved


@dataclass(frozen=True)
class Request:
    """What the user asks for: each model answers each task with each strategy, under each protocol.

    Args:
        protocol: names of protocols or of families of them (docs/protocols.md); None: each task's default.
        limit: the most items of a cell; None: all.
        seed: for the choice of reference pages and of examples, and for bootstrap intervals.
        data: mirror folder of the published datasets; None: the environment variable JRT_DATA, then the hub.
        passages: folder of the `qa_*` tasks; None: the environment variable JRT_PASSAGES.
        cut_with: the tokenizer that cuts documents to the protocol's length, in place of the protocol's own. The
            protocol then gets another name, because its scores cannot be compared.
    """

    models: tuple[ModelSpec, ...]
    tasks: tuple[str, ...]
    strategies: tuple[str, ...] = ("once",)
    protocol: str | tuple[str, ...] | None = None
    limit: int | None = None
    seed: int = 0
    data: Path | None = None
    passages: Path | None = None
    cut_with: str | None = None


@dataclass(frozen=True)
class Plan:
    """A checked request with its questions.

    questions: the items by (task, strategy, protocol); they are the same for all models."""

    request: Request
    questions: dict[tuple[str, str, str], TaskItems] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All cells, model by model."""
        return [Cell(spec.name, *key) for spec in self.request.models for key in self.questions]

    def items(self, cell: Cell) -> TaskItems:
        return self.questions[cell.task, cell.strategy, cell.protocol]

    def identity(self) -> dict:
        """Plain values that decide the results: two runs with equal identities are the same run.

        Batch sizes, devices and workers change no result, so they are not included."""
        request = self.request
        protocols = {found.protocol.label(): found.protocol for found in self.questions.values()}
        return {
            "models": [spec.identity() for spec in request.models],
            "limit": request.limit,
            "seed": request.seed,
            "cells": [found.summary() for found in self.questions.values()],
            "protocols": [protocol.as_dict() for protocol in protocols.values()],
        }


def plan(request: Request) -> Plan:
    """Checks a request and loads its questions.

    Raises ValueError for unknown or repeated names (models too), a negative seed, a protocol that does not fit a task,
    and missing datasets."""
    tasks = [task_named(name) for name in request.tasks]
    strategies = [strategy_named(name) for name in request.strategies]
    named = {
        "model": [_one_name(spec.name) for spec in request.models],
        "task": tasks,
        "strategy": [strategy.name for strategy in strategies],
    }
    for kind, names in named.items():
        if not names:
            raise ValueError(f"name at least one {kind}")
        if len(set(names)) < len(names):
            raise ValueError(f"the same {kind} is named twice: {', '.join(names)}")
    if request.seed < 0:
        raise ValueError(f"a seed is at least 0, got {request.seed}")
    _check_folders(request, tasks)
    named_protocols = request.protocol if isinstance(request.protocol, tuple) else (request.protocol,)
    wanted = [(task, one) for task in request.tasks for name in named_protocols for one in protocols_of(name, task)]
    if not wanted:
        raise ValueError("name at least one protocol")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"the same protocol is named twice: {', '.join(map(str, named_protocols))}")
    _first_that_opens(request.models, lambda spec: open_tokenizer(spec.name))
    questions = {}
    for task, protocol in wanted:
        folder = request.passages if task in PASSAGES else request.data
        for strategy in strategies:
            found = items(task, strategy, protocol, request.cut_with, request.limit, request.seed, folder)
            questions[found.task, found.strategy, found.protocol.name] = found
    return Plan(request, questions)


def _one_name(model: str) -> str:
    """A folder's one name, however it is written; any other name as it is."""
    folder = os.path.expanduser(model)
    return os.path.realpath(folder) if os.path.isdir(folder) else model


def _first_that_opens(specs: Sequence[ModelSpec], opened: Callable[[ModelSpec], object]) -> None:
    """Checks that at least one model opens. Others may fail: they become rows of the table with the reason.

    Raises ValueError with the reason of each model if none opens."""
    problems = {}
    for spec in specs:
        try:
            opened(spec)
            return
        except ValueError as error:
            problems[spec.name] = error
    if len(problems) == 1:
        raise next(iter(problems.values()))
    raise ValueError("no model can be opened: " + "; ".join(f"{name}: {error}" for name, error in problems.items()))


def _check_folders(request: Request, tasks: list[str]) -> None:
    """Raises ValueError for a folder that does not exist, or that none of the tasks reads."""
    if request.passages is not None:
        if not any(task in PASSAGES for task in tasks):
            raise ValueError("a folder of passages is named, but no task reads it: qa_squad, qa_nq ... do")
        if not Path(request.passages).is_dir():
            raise ValueError(f"the folder of passages, {request.passages}, is not there")
    if request.data is not None:
        if all(task in PASSAGES or task.startswith(PAGES) for task in tasks):
            raise ValueError("a mirror folder is named, but no task reads it: recall_swde, recall_fda ... do")
        if not Path(request.data).is_dir():
            raise ValueError(
                f"the datasets' mirror, {request.data}, is not there: `jrt data fetch --folder FOLDER` makes one"
            )


def run(plan: Plan, pool: Pool, output: Path, batch_size: int | None = None, resume: bool = False) -> Results:
    """Answers all questions of a plan and writes the results to the folder `output`.

    batch_size: prompts of a batch; None: chosen for the device and the length of the prompts.
    Raises ValueError if no model can be opened, the batch size is below 1, or the folder holds another run."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a batch holds at least one item, got {batch_size}")
    _first_that_opens(plan.request.models, pool.info)  # before anything is written
    manifest = {"identity": plan.identity(), **origin(plan.request.models[0].device)}
    with RunFolder(output, manifest, resume) as folder:
        return _run(plan, pool, folder, batch_size)


def _run(plan: Plan, pool: Pool, folder: RunFolder, batch_size: int | None) -> Results:
    asked: dict[Cell, _Asked] = {}
    failed: dict[Cell, str] = {}
    cells = plan.cells()
    known = by_item(folder.rows)
    missing = {
        cell: [index for index, item in enumerate(plan.items(cell).items) if item.id not in known[cell]]
        for cell in cells
    }

    def jobs() -> Iterator[Job]:
        for spec in plan.request.models:
            mine = [cell for cell in cells if cell.model == spec.name]
            try:
                info, tokenizer = pool.info(spec), open_tokenizer(spec.name)
            except ValueError as error:
                failed.update(dict.fromkeys(mine, str(error)))
                continue
            folder.note_model(info)
            for cell in mine:
                found = plan.items(cell)
                try:
                    asked[cell] = _asked(found, tokenizer, info, pool, spec)
                except ValueError as error:
                    failed[cell] = str(error)
                    continue
                prompts = asked[cell].prompts
                open_items = [index for index in missing[cell] if not prompts[index].problem]
                limits = _limits(spec, info, batch_size, found.protocol.max_new_tokens)
                for batch in batches([prompts[index].ids for index in open_items], limits):
                    chosen = [open_items[index] for index in batch]
                    yield Job(spec, cell, found.protocol, [prompts[index].ids for index in chosen], chosen)
                    if cell in failed:
                        break

    throughput = Throughput(pool.workers)
    with tqdm(total=sum(map(len, missing.values())), unit="item", smoothing=0.05) as progress:
        for job, generations, worker in pool.answers(jobs()):
            progress.set_description(f"{job.cell.model} {job.cell.task} {job.cell.strategy}", refresh=False)
            if isinstance(generations, str):
                failed[job.cell] = generations
                continue
            folder.append(_predictions(plan, job, asked[job.cell].prompts, generations))
            throughput.note(worker, len(generations))
            progress.update(len(generations))

    done = [cell for cell in cells if cell not in failed]
    if not done:
        raise ValueError(next(iter(failed.values())))
    records, predictions = [], []
    answers = by_item(folder.rows)
    for cell in done:
        rows = [answers[cell][item.id] for item in plan.items(cell).items if item.id in answers[cell]]
        records.append(record(plan, cell, rows, folder.manifest["models"][cell.model], asked[cell]))
        predictions += rows
    compared = comparisons(predictions, plan.request.seed)
    return folder.finish(records, predictions, compared, throughput.as_dict(), failed)


class _Asked(NamedTuple):
    """What is known of a cell before its first answer.

    Args:
        prompts: of its items, as the model reads them.
        state_bytes: of the model's state after a prompt of mean length.
        unreachable: the number of items of which the model can write no correct answer.
    """

    prompts: list[Encoded]
    state_bytes: int
    unreachable: int


def _asked(found: TaskItems, tokenizer: PreTrainedTokenizerBase, info: dict, pool: Pool, spec: ModelSpec) -> _Asked:
    """Raises ValueError if the model cannot be asked any of the items."""
    prompts = encode(
        tokenizer,
        [item.prompt for item in found.items],
        prompt_limit(found.protocol, info["max_length"]),
        info["vocabulary"],
        shortest=1 if info["mode"]["one_token"] else 2,
    )
    lengths = [len(prompt.ids) for prompt in prompts if not prompt.problem]
    if not lengths:
        raise ValueError(f"no item can be asked: the prompt of {found.items[0].id}: {prompts[0].problem}")
    unreachable = sum(not reachable(tokenizer, item.answers, found.protocol.stop) for item in found.items)
    return _Asked(prompts, pool.state_bytes(spec, round(sum(lengths) / len(lengths))), unreachable)


def _limits(spec: ModelSpec, info: dict, batch_size: int | None, new_tokens: int) -> Limits:
    if batch_size is not None:
        limits = Limits(batch_size)
    elif spec.device.startswith("cuda"):
        limits = ON_GPU
    else:
        limits = ON_CPU._replace(alone=CPU_ALONE if info["attends_to_all"] else None)
    mode = info["mode"]
    if not mode["batches"]:
        limits = limits._replace(size=1)
    together = None if info["batch_length"] is None else info["batch_length"] - new_tokens
    return limits._replace(shares=mode["sharing"], pads=mode["padding"], together=together)


def _predictions(plan: Plan, job: Job, prompts: list[Encoded], generations: list[Generation]) -> list[dict]:
    rows = []
    for index, generation in zip(job.items, generations, strict=True):
        item, prompt = plan.items(job.cell).items[index], prompts[index]
        rows.append(
            {
                **job.cell._asdict(),
                "id": item.id,
                "prompt": item.prompt,
                "answers": list(item.answers),
                "prediction": generation.text,
                "score": int(generation.finite and contains(generation.text, item.answers)),
                "position": item.position,
                "lost": item.lost,
                "prompt_tokens": len(prompt.ids),
                "truncated": prompt.truncated,
                "new_tokens": generation.new_tokens,
                "finite": generation.finite,
                "seconds": generation.seconds,
            }
        )
    return rows


def record(plan: Plan, cell: Cell, rows: list[dict], info: dict, asked: _Asked) -> dict:
    """The record of one cell, as it stands in results.json.

    Some of its fields: score, low and high (mean and 95% interval) lie between 0 and 1; seconds is compute time summed
    over batches; truncated counts items whose prompt was cut to a limit; nan counts items with a NaN logit (they score
    0); unreachable counts items of which the model can write no correct answer.

    info: of the model, as in the manifest."""
    found = plan.items(cell)
    problems = [prompt.problem for prompt in asked.prompts if prompt.problem]
    interval = bootstrap([row["score"] for row in rows], seed=plan.request.seed)
    longest = max(row["prompt_tokens"] for row in rows)
    train_length = info["train_length"]
    return {
        **cell._asdict(),
        "score": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": len(rows),
        "documents": found.documents,
        "dropped": found.dropped,
        "invalid": len(found.invalid) + len(problems),
        "lost": found.lost,
        "unreachable": asked.unreachable,
        "absent": found.absent,
        "truncated": sum(row["truncated"] > 0 for row in rows),
        "nan": sum(not row["finite"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows) / len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "state_bytes": asked.state_bytes,
        "beyond_training": train_length is not None and longest > train_length,
        "source": found.source,
        "version": found.protocol.version,
        "notes": [*info["notes"], *(f"not asked: {problem}" for problem in dict.fromkeys(problems))],
    }
