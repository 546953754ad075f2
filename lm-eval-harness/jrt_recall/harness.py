"""`jrt-recall`: stock `lm_eval` with this package's tasks on its include path, and each task's protocol on the screen.

lm-eval finds external tasks by `--include_path` alone (it has no entry points). This command adds that option and calls
lm-eval's own command line; nothing in lm-eval is changed. `lm_eval --include_path $(jrt-recall --path) ...` is the same run.

`--repeat N` runs any other task of lm-eval that generates with its context shown N times: each task becomes a small task file that
includes the original and changes its prompt's template and its name.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import task_folder
from .prompts import strategy_named
from .protocols import PREFIX, PROTOCOLS

_USAGE = """usage: jrt-recall [lm_eval's options]     runs lm_eval with the recall tasks
       jrt-recall --path                 prints the folder for lm_eval --include_path
       jrt-recall --protocols            prints the protocols
       jrt-recall --repeat N --tasks A,B [--context COLUMN] [--include_path FOLDER] [lm_eval's options]
                                         runs any tasks of lm-eval that generate, their context shown N times
       jrt-recall --help                 prints this and lm_eval's help

Tasks may be named with or without `recall_`: here `fda` is recall_fda. Upstream's own `fda` is run by lm_eval."""


def arguments(given: list[str]) -> list[str]:
    """lm_eval's arguments: `run`, the include path, then the given ones.

    Raises ValueError for an include path (lm-eval takes one only) and for settings of generation (the protocol's)."""
    options = {word.split("=", maxsplit=1)[0] for word in given}
    if "--include_path" in options:
        raise ValueError("jrt-recall sets --include_path itself; use lm_eval directly to name another folder")
    if "--gen_kwargs" in options:
        raise ValueError(
            "--gen_kwargs contradicts the protocol, which fixes length, stop and greedy choice: leave it out"
        )
    rest = given[1:] if given[:1] == ["run"] else given
    return ["run", "--include_path", str(task_folder()), *rest]


def with_full_names(given: list[str]) -> list[str]:
    """The arguments with this package's tasks under their one name: `--tasks fda,qa_nq` is `--tasks recall_fda,qa_nq`."""
    words = []
    of_tasks = False  # lm-eval takes several words after --tasks
    for word in given:
        option, equals, value = word.partition("=")
        if word.startswith("-"):
            of_tasks = option in ("--tasks", "-t")
            words.append(f"{option}={_full_names(value)}" if of_tasks and equals else word)
        else:
            words.append(_full_names(word) if of_tasks else word)
    return words


def _full_names(names: str) -> str:
    files = {file.stem for file in task_folder().glob("*.yaml")}
    return ",".join(PREFIX + name if PREFIX + name in files else name for name in names.split(","))


def main() -> None:
    """The console script."""
    given = sys.argv[1:]
    match given:
        case ["--path"]:
            print(task_folder())
        case ["--protocols"]:
            print("\n".join(protocol.describe() for protocol in PROTOCOLS.values()))
        case [] | ["--help"] | ["-h"]:
            print(_USAGE)
        case _:
            sys.exit(_run(given))


def _run(given: list[str]) -> int:
    try:
        if any(word.split("=", maxsplit=1)[0] == "--repeat" for word in given):
            _run_repeated(given)
        else:
            command_line(arguments(with_full_names(given)))
    except ValueError as error:
        print(f"jrt-recall: {error}", file=sys.stderr)
        return 2
    return 0


def command_line(given: list[str]) -> None:
    """lm-eval's own command line, with this package's messages shown: each task's protocol, source and counts."""
    from lm_eval.__main__ import cli_evaluate

    logger = logging.getLogger(__package__)  # lm-eval shows its own loggers only
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    sys.argv = ["lm_eval", *given]
    cli_evaluate()


# Repeated contexts for tasks that are not of this package

CONTEXT_COLUMNS = ("context", "passage", "document", "article")
"""Columns that are context by their name. `input` is one beside a `question` in the same template (babilong)."""


def repeated_template(template: str, copies: int, column: str | None = None) -> tuple[str, str]:
    """A prompt's Jinja template with its context, or the whole prompt, `copies` times, a line each; and which of the two.

    column: the context's column; None: found by name in the template, else the whole prompt is repeated.
    Raises ValueError where the named column is not in the template."""

    def places(name: str) -> list[str]:
        return re.findall(r"\{\{\s*" + re.escape(name) + r"\b[^{}]*\}\}", template)

    if column is not None and not places(column):
        raise ValueError(f"the template {template[:80]!r} does not show the column {column!r}: name another --context")
    candidates = [column] if column else [*CONTEXT_COLUMNS, *(["input"] if places("question") else [])]
    for name in candidates:
        found = places(name)
        if len(found) == 1:  # a context that already stands there twice is not repeated again
            return template.replace(found[0], "\n".join([found[0]] * copies)), "context"
    return "\n".join([template] * copies), "whole prompt"


def write_repeated(
    index: Mapping[str, Any], names: Sequence[str], copies: int, folder: Path, column: str | None
) -> list[str]:
    """Writes a task file for each named task (groups and tags: for each member) to `folder`; returns the new names.

    index: lm-eval's `TaskManager.task_index`. A name carries the strategy, so that no result passes for the plain task's.
    Raises ValueError for unknown tasks, tasks that do not generate, and prompts that are made by code."""
    strategy = strategy_named(f"{copies}x")
    members = [member for name in names for member in _members(index, name)]
    new_names = []
    for name in dict.fromkeys(members):
        original = index[name]
        settings = original.cfg or {}
        template = settings.get("doc_to_text")
        if settings.get("output_type") != "generate_until":
            raise ValueError(
                f"{name} does not generate text (output_type {settings.get('output_type')}): --repeat needs that"
            )
        if "class" in settings or not isinstance(template, str) or template.startswith(str(original.yaml_path.parent)):
            raise ValueError(f"{name} makes its prompt by code, not by a template: --repeat cannot see its context")
        if "{{" not in template and "{%" not in template:
            template = "{{" + template + "}}"  # the name of a column
        text, what = repeated_template(template, copies, column)
        new_name = f"{name}_{copies}x"
        metadata = {**(settings.get("metadata") or {}), "strategy": strategy.name, "repeated": what}
        new = {
            "include": str(original.yaml_path),
            "task": new_name,
            "tag": [],
            "doc_to_text": text,
            "metadata": metadata,
        }
        (folder / f"{new_name}.yaml").write_text(yaml.safe_dump(new, allow_unicode=True), encoding="utf-8")
        new_names.append(new_name)
    return new_names


def _members(index: Mapping[str, Any], name: str) -> list[str]:
    if name not in index:
        raise ValueError(f"unknown task {name!r}: `lm_eval ls tasks` lists those that are here")
    entry = index[name]
    match entry.kind.name:
        case "TAG":
            return [one.name for one in index.values() if name in one.tags and one.kind.name.endswith("TASK")]
        case "GROUP":
            listed = [member for member in (entry.cfg or {}).get("task", []) if isinstance(member, str)]
            return [leaf for member in listed for leaf in _members(index, member)]
    return [name]


def _run_repeated(given: list[str]) -> None:
    from lm_eval.tasks import TaskManager

    parser = argparse.ArgumentParser(prog="jrt-recall", allow_abbrev=False)
    parser.add_argument("--repeat", type=int, required=True)
    parser.add_argument("--tasks", "-t", nargs="+", required=True)
    parser.add_argument("--context")
    parser.add_argument("--include_path")
    own, rest = parser.parse_known_args([word for word in given if word != "run"])
    if not 2 <= own.repeat <= 64:
        raise ValueError(f"--repeat takes 2 to 64, got {own.repeat}")
    names = [name for words in own.tasks for name in words.split(",") if name]
    if ours := [name for name in names if name in {file.stem for file in task_folder().glob("*.yaml")}]:
        raise ValueError(
            f"{ours[0]} is a task of this package: its second reading is {ours[0]}_twice or {ours[0]}_n_times"
        )
    index = TaskManager(include_path=own.include_path).task_index
    with tempfile.TemporaryDirectory() as folder:
        repeated = write_repeated(index, names, own.repeat, Path(folder), own.context)
        command_line(["run", "--include_path", folder, "--tasks", ",".join(repeated), *rest])
