"""The functions that the task files in `tasks/` name as lm-eval's hooks, built on `items` and `contains`.

`documents` makes the prompts and answers with `items`, as `jrt eval` does, so both commands ask the same questions.
"""

from __future__ import annotations

import logging
from typing import Any

from ..items import items
from ..protocols import Protocol
from ..scoring import contains
from ..tokenizers import model_tokenizer, reachable
from .settings import whole_number

logger = logging.getLogger(__name__)

N_TIMES = "n_times"
UNKNOWN = "unknown"
STATED = ("protocol", "documents", "dropped", "invalid", "lost", "unreachable", "truncated", "prompt_tokens")
"""Columns that lm-eval's table shows beside each score, so that a score is never shown without its protocol."""


def documents(
    recall_task: str,
    reading: str,
    protocol: str | None = None,
    n: int | str = 3,
    cut_with: str | None = None,
    data: str | None = None,
    seed: int | str = 0,
    max_items: int | str | None = None,
    **arguments: Any,
) -> dict:
    """lm-eval's hook `custom_dataset`: returns {"test": Dataset} with one row for each item.

    The task file gives `recall_task` and `reading`. The other arguments are the settings of `--metadata`.

    Args:
        recall_task: task name.
        reading: a strategy's name or "n_times".
        protocol: name of a protocol; default: the task file's.
        n: how often the *_n_times tasks show the context.
        cut_with: another cutting tokenizer: gpt2, shipped, a folder or a hub name; the protocol's name then says so.
        data: folder with copies of the published datasets (a mirror, see `data`), or folder of the passages.
        seed: of the selection of reference pages.
        max_items: most items that are made (lm-eval's --limit makes all of them and then uses fewer).
        arguments: the model's arguments, which lm-eval adds, and settings meant for other tasks. With `pretrained` or
            `tokenizer`, prompt tokens are counted, and answers that the tokenizer cannot spell. With `max_length`, the
            prompts that lm-eval will truncate are counted.

    Raises:
        ValueError: a setting has the wrong type, or `items` refuses the settings.
    """
    from datasets import Dataset

    for name, value in (("protocol", protocol), ("cut_with", cut_with), ("data", data)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}: expected a name, got {value!r}")
    strategy = f"{whole_number('n', n)}x" if reading == N_TIMES else reading
    most = None if max_items is None else whole_number("max_items", max_items, least=1)
    found = items(recall_task, strategy, protocol, cut_with, most, whole_number("seed", seed), data)
    counts = (
        f"{len(found.items)} items of {found.documents} documents from {found.source}: {found.dropped} dropped by the "
        f"published rule, {len(found.invalid)} invalid, {found.lost} with the answer cut away"
    )
    logger.info("%s, %s; %s", found.task, found.protocol.describe(), counts)
    named = arguments.get("tokenizer") or arguments.get("pretrained")
    tokenizer = model_tokenizer(named) if isinstance(named, str) else None
    prompts = [item.prompt for item in found.items]
    lengths = [None] * len(prompts) if tokenizer is None else [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    limit = _limit(found.protocol, arguments)
    shared = {**found.summary(), "protocol": found.protocol.label()}
    rows = [
        {
            **shared,
            "id": item.id,
            "prompt": item.prompt,
            "answers": list(item.answers),
            "position": -1.0 if item.position is None else item.position,
            "lost": int(item.lost),
            "unreachable": int(not reachable(tokenizer, item.answers, found.protocol.stop)),
            "prompt_tokens": length if limit is None or length is None else min(length, limit),
            "truncated": None if limit is None or length is None else int(length > limit),
        }
        for item, length in zip(found.items, lengths, strict=True)
    ]
    return {"test": Dataset.from_list(rows)}


def target(row: dict) -> str:
    """lm-eval's hook `doc_to_target`: the first answer."""
    return row["answers"][0]


def score(row: dict, results: list[str]) -> dict:
    """lm-eval's hook `process_results`: the published metric and the row's values of the columns STATED."""
    return {"contains": float(contains(results[0], row["answers"])), **{name: row[name] for name in STATED}}


def first(values: list) -> float | str:
    """Aggregates a value that is the same in every row: the first one."""
    return values[0]


def total(values: list) -> float | str:
    """Aggregates counts by their sum; "unknown" if any row has none."""
    return UNKNOWN if None in values else sum(values)


def average(values: list) -> float | str:
    """Aggregates lengths by their mean; "unknown" if any row has none."""
    return UNKNOWN if None in values else sum(values) / len(values)


def _limit(protocol: Protocol, arguments: dict) -> int | None:
    """Most prompt tokens that lm-eval keeps, or None if the model's arguments do not give `max_length`."""
    length = arguments.get("max_length")
    if length is None:
        return None
    room = whole_number("max_length", length) - protocol.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_length={length} leaves no prompt beside the {protocol.max_new_tokens} new tokens of {protocol.name}"
        )
    return room
