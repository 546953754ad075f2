"""The command `jrt-recall`: stock `lm_eval` with this package's tasks, which also prints each task's protocol.

lm-eval finds external tasks only through its option `--include_path`; it has no entry points for plugins. This command
adds the option and calls lm-eval's own command line, so nothing in lm-eval is changed. `lm_eval --include_path
$(jrt-recall --path) ...` is the same run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from .. import task_folder
from ..protocols import PREFIX, PROTOCOLS
from . import hf_models, repeat, settings

_USAGE = """usage: jrt-recall [lm_eval's options]     runs lm_eval with the recall tasks
       jrt-recall --path                 prints the folder for lm_eval --include_path
       jrt-recall --protocols            prints the protocols
       jrt-recall --repeat N --tasks A,B [--context COLUMN] [--include_path FOLDER] [lm_eval's options]
                                         runs any tasks of lm-eval that generate, their context shown N times
       jrt-recall --help                 prints this and lm_eval's help

Tasks may be named with or without `recall_`: here `fda` is recall_fda. Upstream's own `fda` is run by lm_eval."""


def arguments(given: list[str]) -> list[str]:
    """Returns the arguments for lm_eval: `run`, the include path of this package, then the given ones."""
    rest = given[1:] if given[:1] == ["run"] else given
    return ["run", "--include_path", str(task_folder()), *rest]


def full_name(task: str) -> str:
    """Returns the full name of a task of this package, `recall_fda` for `fda`. Other names are returned unchanged."""
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
    """Runs lm-eval's own command line and shows this package's messages: each task's protocol, source and counts.

    Args:
        given: arguments for lm-eval, as `arguments` returns them.
        check_model: called with the parsed settings before anything runs; it may raise ValueError.
        folder: folder of the task files; None for this package's.
        named: maps a task name on the command line to the task's full name.

    Raises:
        ValueError: a setting contradicts the protocols (see `settings`), or `given` names a second include path, of
            which lm-eval takes only one.
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
    hf_models.register(found)
    if (told := hf_models.acting_settings(found)) is not None:
        logger.warning(told)
    # lm-eval reads the `--config` file again, whose numbers may be text: what was read here comes first.
    vars(namespace).update(found, use_cache=settings.response_cache(found))
    try:
        parser.execute(namespace)
    except AssertionError as error:  # lm-eval's own check of the numbers in --samples
        if "samples" not in found:
            raise
        raise ValueError(f"--samples: {' '.join(str(error).split())}") from error
