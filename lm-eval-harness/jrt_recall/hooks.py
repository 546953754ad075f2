"""What the task files in `tasks/` call: lm-eval's hooks, each a few lines around `items` and `contains`.

A row that lm-eval sees already holds its prompt and its answers, so the questions are those of every other runner.
Settings come from `--metadata`, which lm-eval hands to `documents` together with the model's arguments:

    protocol   name of a protocol (default: the task file's)
    n          number of readings for the *_n_times tasks (default 3)
    cut_with   another cutting tokenizer: gpt2, shipped, a folder or a hub name; the protocol's name then says so
    data       mirror folder of the published datasets, or folder of the passages
    seed       selection of reference_pages (default 0)
    max_items  at most that many items are made (lm-eval's --limit only looks at fewer of those made)
"""

import logging

from .items import TaskItems, items
from .metric import contains
from .strategies import times

logger = logging.getLogger(__name__)

N_TIMES = "n_times"


def task_items(
    recall_task: str,
    reading: str,
    protocol: str | None = None,
    n: int = 3,
    cut_with: str | None = None,
    data: str | None = None,
    seed: int = 0,
    max_items: int | None = None,
) -> TaskItems:
    """The items that a task file asks for. Raises ValueError as `items`."""
    strategy = times(int(n)) if reading == N_TIMES else reading
    return items(recall_task, strategy, protocol, cut_with, max_items, int(seed), data)


_SETTINGS = ("protocol", "n", "cut_with", "data", "seed", "max_items")


def documents(recall_task: str, reading: str, **metadata) -> dict:
    """lm-eval's `custom_dataset`: {"test": Dataset} with one row per item.

    The rest of `metadata` (lm-eval adds the model's arguments) is not ours and is left alone."""
    from datasets import Dataset

    found = task_items(recall_task, reading, **{key: metadata[key] for key in _SETTINGS if key in metadata})
    logger.info("%s, %s; %s", recall_task, found.protocol.describe(), _counts(found))
    shared = {
        "task": found.task,
        "strategy": found.strategy,
        "protocol": found.protocol.name,
        "protocol_version": found.protocol.version,
        "window": found.protocol.window or 0,
        "answer_room": found.protocol.answer_room,
        "source": found.source,
        "sha256": found.sha256,
        "python": found.python or "",
        "documents": found.documents,
        "dropped": found.dropped,
        "invalid": len(found.invalid),
    }
    rows = [
        {
            "id": item.id,
            "prompt": item.prompt,
            "answers": list(item.answers),
            "position": -1.0 if item.position is None else item.position,
            "lost": item.lost,
            **shared,
        }
        for item in found.items
    ]
    return {"test": Dataset.from_list(rows)}


def target(row: dict) -> str:
    """lm-eval's `doc_to_target`: the first answer."""
    return row["answers"][0]


def score(row: dict, results: list[str]) -> dict:
    """lm-eval's `process_results`: the published metric, and what a score must state beside it.

    lm-eval prints numbers only, so its table shows the protocol's window (0: documents whole) and answer room; each
    logged sample has the protocol's name."""
    shared = {name: row[name] for name in ("window", "answer_room", "documents", "dropped", "invalid")}
    return {"contains": float(contains(results[0], row["answers"])), "lost": int(row["lost"]), **shared}


def first(values: list) -> float:
    """Aggregation of a count that is the same in every row."""
    return values[0]


def total(values: list) -> float:
    """Aggregation of a count over rows."""
    return sum(values)


def _counts(found: TaskItems) -> str:
    return (
        f"{len(found.items)} items of {found.documents} documents from {found.source}: {found.dropped} dropped by the "
        f"published rule, {len(found.invalid)} invalid, {found.lost} with the answer cut away"
    )
