"""`jrt-recall --repeat N`: runs lm-eval's own generation tasks with their context shown N times.

For each task a small task file is written that includes the original one and changes its prompt and its name. If the
prompt is a Jinja template, the new template is longer. If a function makes the prompt, a new function wraps it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from .. import task_folder
from ..prompts import strategy_named
from .settings import names_of

CONTEXT_COLUMNS = ("context", "passage", "document", "article")
"""Column names that mean context. `input` means context too if the template also has a `question` (babilong)."""


def repeated_template(template: str, copies: int, column: str | None = None) -> tuple[str, str]:
    """Repeats the context in a prompt's Jinja template, each copy on its own lines.

    Args:
        template: the task's prompt as a Jinja template.
        copies: how often the context is shown.
        column: the column that is the context. None: one of CONTEXT_COLUMNS that the template shows once; if there is
            none, the whole prompt is repeated.

    Returns:
        The new template, and what was repeated: "context" or "whole prompt".

    Raises:
        ValueError: the template does not show the named column, or shows it more than once.
    """

    shown_part = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)  # without Jinja's comments

    def places(name: str) -> list[str]:
        return re.findall(r"\{\{[-+]?\s*" + re.escape(name) + r"\b[^{}]*\}\}", shown_part)

    if column is not None and (times := len(places(column))) != 1:
        shows = f"shows the column {column!r} {times} times" if times else f"does not show the column {column!r}"
        raise ValueError(f"the template {template[:80]!r} {shows}: name another --context")
    candidates = [column] if column else [*CONTEXT_COLUMNS, *(["input"] if places("question") else [])]
    for name in candidates:
        found = places(name)
        if len(found) == 1:  # a column that is shown more than once is not taken for the context
            return template.replace(found[0], _on_lines(found[0], copies)), "context"
    return _on_lines(template, copies), "whole prompt"


def _on_lines(template: str, copies: int) -> str:
    """Joins the copies by line feeds, which a minus sign of Jinja at either end of a copy (`{{-`, `-%}`) cannot strip."""
    strips = template[:3] in ("{{-", "{%-", "{#-") or template[-3:] in ("-}}", "-%}", "-#}")
    return ("{{ '\n' }}" if strips else "\n").join([template] * copies)


def repeating(task_file: str, copies: int, column: str | None = None) -> Callable[[dict], str]:
    """Wraps the function that makes a task's prompts: the context is repeated, each copy on its own lines.

    Args:
        task_file: a task file whose `doc_to_text` is a function.
        copies: how often the context is shown.
        column: the document's column that is repeated; None repeats the whole prompt.

    Returns:
        A new `doc_to_text`. It raises ValueError if the column's text does not occur exactly once in a prompt.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    original = load_yaml(task_file)["doc_to_text"]

    def doc_to_text(doc: dict) -> str:
        text = original(doc)
        shown = text if column is None else str(doc.get(column, "")).strip()
        if not shown or text.count(shown) != 1:
            raise ValueError(
                f"the prompt {text[:80]!r} does not show the column {column!r} once: name another --context"
            )
        return text.replace(shown, "\n".join([shown] * copies))

    return doc_to_text


def write_repeated(
    index: Mapping[str, Any], names: Sequence[str], copies: int, folder: Path, column: str | None
) -> list[str]:
    """Writes one task file with a repeated context for each task, and returns the new task names.

    A new name ends in the number of copies (`NAME_2x`), so its result cannot be mistaken for the original task's.

    Args:
        index: lm-eval's `TaskManager.task_index`.
        names: tasks, groups or tags; a group or tag stands for all its members.
        copies: how often the context is shown.
        folder: where the files are written.
        column: as in `repeated_template` and `repeating`.

    Raises:
        ValueError: a task is unknown, does not generate text, is a Python class, or takes its prompt from
            elsewhere; a group is empty or contains itself.
    """
    strategy = strategy_named(f"{copies}x")
    members = [member for name in names for member in _members(index, name)]
    if not members:
        raise ValueError(f"{', '.join(names) or '--tasks'}: no task in it, so nothing to repeat")
    new_names: list[str] = []
    for name in dict.fromkeys(members):
        original = index[name]
        settings = original.cfg or {}
        template = settings.get("doc_to_text")
        output_type = settings.get("output_type", "generate_until")  # as lm-eval's own default
        if output_type != "generate_until":
            raise ValueError(f"{name} does not generate text (output_type {output_type}): --repeat needs that")
        if not isinstance(template, str):
            raise ValueError(
                f"{name} has no text in doc_to_text (such as a Python class): --repeat cannot see its prompt"
            )
        if settings.get("use_prompt") is not None:
            raise ValueError(f"{name} takes its prompt from promptsource (use_prompt): --repeat cannot see its prompt")
        new_name = f"{name}_{copies}x"
        if new_name in index:
            raise ValueError(f"there is a task {new_name} already: rename it, because {name} repeated has this name")
        task_file = str(original.yaml_path.resolve())
        new: dict[str, Any] = {"include": task_file, "task": new_name, "tag": []}
        if Path(template).is_absolute():  # a prompt function: the index stores its file and name
            what = "whole prompt" if column is None else "context"
            module = f"repeated_{len(new_names)}"
            arguments = f"{task_file!r}, {copies}, {column!r}"
            code = f"from {__name__} import repeating\n\ndoc_to_text = repeating({arguments})\n"
            (folder / f"{module}.py").write_text(code, encoding="utf-8")
            prompt = f"doc_to_text: !function {module}.doc_to_text\n"
        else:
            if "{{" not in template and "{%" not in template:
                if not template.isidentifier():
                    raise ValueError(f"{name} has the same prompt for every document ({template!r}): nothing to repeat")
                template = "{{" + template + "}}"  # the name of a column
            text, what = repeated_template(template, copies, column)
            prompt = yaml.safe_dump({"doc_to_text": text}, allow_unicode=True)
        new["metadata"] = {**(settings.get("metadata") or {}), "strategy": strategy.name, "repeated": what}
        if (settings.get("fewshot_config") or {}).get("doc_to_text") is not None:
            new["metadata"]["examples"] = "once"  # they have a prompt of their own, which stays
        (folder / f"{quote(new_name, safe='')}.yaml").write_text(
            yaml.safe_dump(new, allow_unicode=True) + prompt, encoding="utf-8"
        )
        new_names.append(new_name)
    return new_names


def _members(index: Mapping[str, Any], member: str | dict, around: tuple[str, ...] = ()) -> list[str]:
    """The tasks behind a name, or behind a member of a group's list, in which a group can be written out as a dict.

    around: the groups that contain it."""
    if isinstance(member, dict):
        listed = member.get("task") or []
        if isinstance(listed, str):
            raise ValueError(f"group {around[-1]} runs {listed} with settings of its own: name its tasks one by one")
    else:
        if member not in index:
            raise ValueError(f"unknown task {member!r}: `lm_eval ls tasks` lists those that are here")
        if member in around:
            raise ValueError(f"group {member} contains itself: {' > '.join((*around, member))}")
        entry = index[member]
        if entry.kind.name == "TAG":
            return [one.name for one in index.values() if member in one.tags and one.kind.name.endswith("TASK")]
        if entry.kind.name != "GROUP":
            return [member]
        around, listed = (*around, member), (entry.cfg or {}).get("task", [])
    return [task for one in listed for task in _members(index, one, around)]


def run(given: list[str]) -> None:
    """Runs `jrt-recall --repeat N ...`, where `given` is the whole command line.

    Raises ValueError as `write_repeated` does, and for tasks of this package, which have repeated forms of their
    own."""
    from lm_eval.tasks import TaskManager

    from .command import command_line

    parser = argparse.ArgumentParser(prog="jrt-recall", allow_abbrev=False)
    parser.add_argument("--repeat", type=int, required=True)
    parser.add_argument("--tasks", "-t", nargs="+", required=True)
    parser.add_argument("--context")
    parser.add_argument("--include_path")
    own, rest = parser.parse_known_args([word for word in given if word != "run"])
    for word in (word.split("=", maxsplit=1)[0] for word in rest):
        if len(word) > 3 and "--tasks".startswith(word):  # lm-eval would take it for a second --tasks, not repeated
            raise ValueError(f"{word}: write --tasks in full, once, where contexts are repeated")
    if not 2 <= own.repeat <= 64:
        raise ValueError(f"--repeat takes 2 to 64, got {own.repeat}")
    names = names_of(own.tasks)
    if ours := [name for name in names if name in {file.stem for file in task_folder().glob("*.yaml")}]:
        raise ValueError(
            f"{ours[0]} is a task of this package: its second reading is {ours[0]}_twice or {ours[0]}_n_times"
        )
    index = TaskManager(include_path=own.include_path).task_index
    with tempfile.TemporaryDirectory() as folder:
        repeated = write_repeated(index, names, own.repeat, Path(folder), own.context)
        command_line(["run", "--include_path", folder, "--tasks", ",".join(repeated), *rest], folder=folder)
