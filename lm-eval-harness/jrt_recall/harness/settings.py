"""Refuses lm-eval settings that would contradict a protocol.

The checks look at what lm-eval parsed, not at the words that were typed. So an abbreviated option, a `--config` file
and a key=value string are treated alike."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from ..protocols import PASSAGES, PREFIX

METADATA = ("protocol", "n", "cut_with", "data", "seed", "max_items")
"""Keys of --metadata that the recall tasks read."""
OF_MODELS = ("pretrained", "tokenizer", "max_length")
"""Keys that lm-eval adds to the metadata from the model's arguments. They may also be given in --metadata."""
# Settings that change prompts or answers, and what the error message says about each. The first are refused in every
# run, the second where a recall task runs.
_CONTRADICT = {
    "gen_kwargs": "it contradicts the protocol, which fixes length, stop and greedy choice: leave it out",
    "cache_requests": "lm-eval's request cache does not tell protocols, seeds and data apart: leave it out",
}
_CONTRADICT_RECALL = {
    "apply_chat_template": "the prompts of the recall tasks are fixed: leave it out",
    "system_instruction": "the prompts of the recall tasks are fixed: leave it out",
    "fewshot_as_multiturn": "the prompts of the recall tasks are fixed: leave it out",
    "num_fewshot": "examples belong to the strategies 1shot, 2shot ... of `jrt eval`: leave it out",
}


def parsed(namespace: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of an lm-eval run, merged as lm-eval does: the command line overrides the `--config` file.

    Numbers in quotes become numbers. Raises ValueError if the file cannot be read or has keys that lm-eval does not know,
    and for a value of the wrong kind."""
    from dataclasses import fields

    from lm_eval.config.evaluate_config import EvaluatorConfig

    settings: dict[str, Any] = {}
    if namespace.config:
        try:
            settings = EvaluatorConfig.load_yaml_config(namespace.config)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"--config: {error}") from error
        known = {field.name for field in fields(EvaluatorConfig)}
        if unknown := sorted(map(str, set(settings) - known)):
            raise ValueError(f"--config {namespace.config}: lm-eval has no setting {', '.join(unknown)}")
    settings.update({name: value for name, value in vars(namespace).items() if value or value == 0})
    return checked(settings)


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with their numbers as numbers. Raises a ValueError that names a setting of the wrong kind.

    lm-eval checks the kinds on the command line, and not in a `--config` file."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    found = {name: value for name, value in settings.items() if value is not None}
    for name, expected in get_type_hints(EvaluatorConfig).items():
        value = found.get(name)
        if expected in (str, str | None) and not isinstance(value, str | None):
            raise ValueError(f"--{name}: expected text, got {value!r}")
        if expected is bool and not isinstance(value, bool | None):
            raise ValueError(f"--{name}: expected true or false, got {value!r}")
        if expected is dict:
            as_dict(name, value)
    if "limit" in found:
        found["limit"] = _positive("--limit", found["limit"])
    if "max_batch_size" in found:
        found["max_batch_size"] = whole_number("--max_batch_size", found["max_batch_size"], least=1)
    if "batch_size" in found and not re.fullmatch(r"auto(:[1-9]\d*)?", str(found["batch_size"])):
        found["batch_size"] = whole_number("--batch_size", found["batch_size"], least=1)
    if "samples" in found:
        found["samples"] = _samples(found["samples"])
    return found


def check(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting would change a protocol, or if --metadata has a key that nothing reads."""
    tasks = names_of(settings.get("tasks"))
    of_recall = [task for task in tasks if is_recall(task)]
    refused = _CONTRADICT | (_CONTRADICT_RECALL if of_recall else {})
    for name, why in refused.items():
        if settings.get(name):
            raise ValueError(f"--{name}: {why}")
    metadata = as_dict("metadata", settings.get("metadata"))
    unknown = [str(key) for key in metadata if key not in (*METADATA, *OF_MODELS)]
    if unknown and of_recall and len(of_recall) == len(tasks):  # other tasks in the same run may read other keys
        raise ValueError(f"--metadata: unknown key {', '.join(unknown)}; expected {', '.join(METADATA)}")


def response_cache(settings: Mapping[str, Any]) -> str | None:
    """Where lm-eval keeps responses for --use_cache: a name of its own for each model and its arguments.

    lm-eval tells responses apart by their prompts alone, so two models with one file would share their answers."""
    if not settings.get("use_cache"):
        return None
    model = [settings.get("model"), as_dict("model_args", settings.get("model_args"))]
    digest = hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode()).hexdigest()
    return f"{settings['use_cache']}-{digest[:12]}"


def is_recall(task: str) -> bool:
    """Whether a name on the command line (a task, a tag or a pattern) means recall tasks of this package."""
    if task.startswith(("recall_super_glue", "recall_record")):
        return False
    return task.startswith(PREFIX.rstrip("_")) or any(task.startswith(name) for name in PASSAGES)


def names_of(tasks: Any) -> list[str]:
    """Returns the task names in a list or in a string with commas. Raises ValueError for anything else."""
    parts = [tasks] if isinstance(tasks, str) else [] if tasks is None else tasks
    if not isinstance(parts, list | tuple):
        raise ValueError(f"--tasks: expected names, got {tasks!r}")
    if wrong := [part for part in parts if not isinstance(part, str)]:
        raise ValueError(f"--tasks: expected names, got {wrong[0]!r}")
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def as_dict(name: str, value: Any) -> dict:
    """Returns a setting as a dict. It may be a dict, a key=value string or empty; anything else raises ValueError."""
    from lm_eval.utils import simple_parse_args_string

    if not value:
        return {}
    if isinstance(value, str):
        try:
            return simple_parse_args_string(value)
        except ValueError as error:
            raise ValueError(f"--{name}: expected a JSON object or key=value pairs, got {value!r}") from error
    if isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"--{name}: expected a JSON object or key=value pairs, got {value!r}")


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """Returns a setting as a whole number; a string of digits is accepted.

    Raises a ValueError that names the setting."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.removeprefix("-").isdecimal() or not text.isascii():
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if int(text) < least:
        raise ValueError(f"{name}: expected a number of at least {least}, got {text}")
    return int(text)


def _positive(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return number


def _samples(value: Any) -> dict[str, list[int]]:
    """--samples: for each task the numbers of its documents; an object, its JSON text, or a file with it."""
    expected = "--samples: expected an object with a list of document numbers for each task"
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value)
        except (OSError, RecursionError, ValueError) as error:  # one of them: a text too long for a file's name
            raise ValueError(f"{expected}, or a file that holds one; got {value!r:.80}") from error
    if not isinstance(value, Mapping) or not all(isinstance(numbers, list) for numbers in value.values()):
        raise ValueError(f"{expected}, got {value!r:.80}")
    return {str(task): [whole_number("--samples", number) for number in numbers] for task, numbers in value.items()}
