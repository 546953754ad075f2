"""`jrt-recall`: stock `lm_eval` with this package's tasks on its include path, and each task's protocol on the screen.

lm-eval finds external tasks by `--include_path` alone (it has no entry points). This command adds that option and calls
lm-eval's own command line; nothing in lm-eval is changed. `lm_eval --include_path $(jrt-recall --path) ...` is the same run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from . import repeat, settings, task_folder
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

    Raises ValueError for an include path: lm-eval takes one only."""
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
            repeat.run(given)
        else:
            command_line(arguments(with_full_names(given)))
    except ValueError as error:
        print(f"jrt-recall: {error}", file=sys.stderr)
        return 2
    return 0


def command_line(
    given: list[str], check_model: Callable[[dict], None] | None = None, folder: str | None = None
) -> None:
    """lm-eval's own command line, with this package's messages shown: each task's protocol, source and counts.

    check_model: looks at the parsed settings before anything runs. folder: of the task files; None: this package's. Raises ValueError for settings that contradict the
    protocols (see `settings`)."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    logger = logging.getLogger(__package__)  # lm-eval shows its own loggers only
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    sys.argv = ["lm_eval", *given]
    parser = HarnessCLI()
    namespace = parser.parse_args()
    found = settings.parsed(namespace)
    if str(found.get("include_path")) != (folder or str(task_folder())):
        raise ValueError("--include_path is set here; use lm_eval directly to name another folder")
    settings.check(found)
    if check_model is not None:
        check_model(found)
    parser.execute(namespace)
