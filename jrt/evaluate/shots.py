"""Few-shot prompts, to hold reading twice against (the paper's Table 14): other items with their answers, then the item."""

import re
from dataclasses import replace

from jrt_recall import TaskItems

_NAME = re.compile(r"(\d+)-shot")


def shots_named(strategy: str) -> int | None:
    """2 for "2-shot"; None for a name that is no such strategy. Raises ValueError for "0-shot", which is "once"."""
    match = _NAME.fullmatch(strategy.strip().lower())
    if match is None:
        return None
    if int(match[1]) < 1:
        raise ValueError("0-shot is the strategy once")
    return int(match[1])


def few_shot(once: TaskItems, shots: int) -> TaskItems:
    """The items read once, each after the next `shots` items of the task (from the first again after the last).

    The datasets have no training split. Raises ValueError where there are too few items."""
    count = len(once.items)
    if count <= shots:
        raise ValueError(f"{shots}-shot prompts need more than {shots} items; {once.task} has {count} here")
    found = []
    for index, item in enumerate(once.items):
        others = (once.items[(index + step) % count] for step in range(1, shots + 1))
        examples = "".join(f"{other.prompt} {other.answers[0]}\n\n" for other in others)
        found.append(item._replace(prompt=examples + item.prompt))
    return replace(once, strategy=f"{shots}-shot", items=tuple(found))
