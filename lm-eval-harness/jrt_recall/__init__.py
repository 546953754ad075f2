"""jrt_recall: the recall tasks of "Just read twice" for any causal language model, as a plugin of stock lm-eval.

Three pure functions do the work: `prompt` makes a prompt, `cut` shortens a long document, `contains` scores an answer.
`items` combines them for one task, one reading strategy (read once, twice, ...) and one protocol (a named set of all
other settings that a score depends on). lm-eval reads the same tasks from the YAML files in `task_folder()`.
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
