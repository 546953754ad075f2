"""`jrt-recall`: stock `lm_eval` with this package's tasks on its include path, and each task's protocol on the screen.

lm-eval finds external tasks by `--include_path` alone (it has no entry points). This command adds that option and calls
lm-eval's own command line; nothing in lm-eval is changed. `lm_eval --include_path $(jrt-recall --path) ...` is the same run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from .. import task_folder
from ..protocols import PREFIX, PROTOCOLS
from . import repeat, settings

_USAGE = """usage: jrt-recall [lm_eval's options]     runs lm_eval with the recall tasks
       jrt-recall --path                 prints the folder for lm_eval --include_path
       jrt-recall --protocols            prints the protocols
       jrt-recall --repeat N --tasks A,B [--context COLUMN] [--include_path FOLDER] [lm_eval's options]
                                         runs any tasks of lm-eval that generate, their context shown N times
       jrt-recall --help                 prints this and lm_eval's help

Tasks may be named with or without `recall_`: here `fda` is recall_fda. Upstream's own `fda` is run by lm_eval."""


def arguments(given: list[str]) -> list[str]:
    """lm_eval's arguments: `run`, the include path, then the given ones."""
    rest = given[1:] if given[:1] == ["run"] else given
    return ["run", "--include_path", str(task_folder()), *rest]


def full_name(task: str) -> str:
    """The one name of a task of this package, `recall_fda` for `fda`; any other name as it is."""
    return PREFIX + task if (task_folder() / f"{PREFIX}{task}.yaml").is_file() else task


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
            command_line(arguments(given), named=full_name)
    except ValueError as error:
        print(f"jrt-recall: {error}", file=sys.stderr)
        return 2
    return 0


def command_line(
    given: list[str],
    check_model: Callable[[dict], None] | None = None,
    folder: str | None = None,
    named: Callable[[str], str] = str,
) -> None:
    """lm-eval's own command line, with this package's messages shown: each task's protocol, source and counts.

    Args:
        given: lm-eval's arguments.
        check_model: looks at the parsed settings before anything runs.
        folder: of the task files; None: this package's.
        named: from a name on the command line to the task's own.

    Raises:
        ValueError: a setting that contradicts the protocols (see `settings`), or another include path: lm-eval takes one.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    logger = logging.getLogger("jrt_recall")  # lm-eval shows its own loggers only
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    sys.argv = ["lm_eval", *given]
    parser = HarnessCLI()
    namespace = parser.parse_args()
    namespace.tasks = namespace.tasks and [named(task) for task in namespace.tasks]
    found = settings.parsed(namespace)
    if str(found.get("include_path")) != (folder or str(task_folder())):
        raise ValueError("--include_path is set here; use lm_eval directly to name another folder")
    settings.check(found)
    if check_model is not None:
        check_model(found)
    if (cache := settings.response_cache(found)) is not None:
        namespace.use_cache = cache
    parser.execute(namespace)
