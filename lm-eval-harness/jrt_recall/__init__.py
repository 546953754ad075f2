"""jrt_recall: the recall tasks of "Just read twice" for any causal language model, as a plugin of stock lm-eval.

Pure functions make the prompts (`prompt`), cut long contexts (`cut`) and score (`contains`); `items` puts them
together for a task, a reading strategy and a named protocol. lm-eval reads the same tasks from `task_folder()`.
"""

from pathlib import Path

from .catalogue import PUBLISHED
from .cutting import cut
from .items import TASKS, Item, TaskItems, items
from .metric import contains
from .prompts import prompt
from .protocols import PROTOCOLS, Protocol, protocol_named
from .strategies import strategy_named

__version__ = "0.1.0"
__all__ = [
    "PROTOCOLS",
    "PUBLISHED",
    "TASKS",
    "Item",
    "Protocol",
    "TaskItems",
    "contains",
    "cut",
    "items",
    "prompt",
    "protocol_named",
    "strategy_named",
    "task_folder",
]


def task_folder() -> Path:
    """Folder of the lm-eval task files: `lm_eval --include_path $(jrt-recall --path) ...`."""
    return Path(__file__).parent / "tasks"
