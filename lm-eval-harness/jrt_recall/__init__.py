"""jrt_recall: the recall tasks of "Just read twice" for any causal language model, as a plugin of stock lm-eval.

Pure functions make the prompts (`prompt`), cut long contexts (`cut`) and score (`contains`); `items` puts them
together for a task, a reading strategy and a named protocol. lm-eval reads the same tasks from `task_folder()`.
"""

from pathlib import Path

from .items import Item, TaskItems, items
from .prompts import prompt, strategy_named
from .protocols import PROTOCOLS, PUBLISHED, TASKS, Protocol, protocol_named, task_named
from .scoring import contains
from .tokenizers import cut

__version__ = "0.2.0"
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
    "task_named",
]


def task_folder() -> Path:
    """Folder of the lm-eval task files: `lm_eval --include_path $(jrt-recall --path) ...`."""
    return Path(__file__).parent / "tasks"
