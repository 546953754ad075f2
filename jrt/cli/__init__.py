"""The command line: `jrt demo | eval | report | generate | info | convert | data | doctor | lm-eval`.

A user's mistake becomes one line on stderr and exit status 2. The modules that a command imports do all the computing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from jrt.cli import evaluation, models
from jrt.cli.options import INTERRUPTED, OK, USAGE, Parser

COMMANDS = (
    evaluation.add_demo,
    evaluation.add_eval,
    evaluation.add_report,
    models.add_generate,
    models.add_info,
    models.add_convert,
    evaluation.add_data,
    models.add_doctor,
)
"""Functions that add one command with its options. They name the function that runs it by
`set_defaults(command=...)`."""


def main(given: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if given is None else given)
    if arguments[:1] == ["lm-eval"]:
        return _reported(lambda: _lm_eval(arguments[1:]))
    parsed = _parser().parse_args(arguments)
    if not parsed.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(message)s")
    return _reported(lambda: parsed.command(parsed), getattr(parsed, "kept", ""))


def _reported(command: Callable[[], int | None], kept: str = "") -> int:
    """Runs a command and reports its errors. Returns the exit status.

    kept: what to tell the user, after "stopped", about the work of an interrupted command."""
    try:
        return command() or OK
    except KeyboardInterrupt:
        print(f"jrt: stopped{kept}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the program that reads our output has ended, as `head` does
        sys.stderr.close()
        return OK
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(f"jrt: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE


def _parser() -> Parser:
    parser = Parser(
        prog="jrt", description="Recall of language models: evaluate it, and close the gap by reading twice."
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="say what is done")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for add in COMMANDS:
        add(commands)
    commands.add_parser(
        "lm-eval", help="stock lm-eval with `--model jrt` and the recall tasks; all options are lm_eval's"
    )
    return parser


def _lm_eval(given: list[str]) -> int:
    from jrt.evaluate import harness

    return harness.command(given)
