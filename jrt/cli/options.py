"""What the commands share: exit codes, parsers of values, and the options that say how to compute with a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jrt.config import LARGEST

if TYPE_CHECKING:  # the commands import what they need, so that `jrt --help` is quick
    from jrt.evaluate import ModelSpec

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error on one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Listed(argparse.Action):
    """Names that are separated by commas. If the option is given again, its names are added."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


def add_names(parser: argparse.ArgumentParser, option: str, help: str, **more: Any) -> None:
    """Adds an option that takes names, separated by commas."""
    parser.add_argument(option, type=_names, action=_Listed, help=help, **more)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def path(text: str) -> Path:
    """A path. `~` is expanded here, because no shell does it in `--output=~/run`."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: there is no user of that name on this machine")
    return Path(expanded)


def positive(text: str) -> int:
    number = _whole(text, 1)
    if number >= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number below {LARGEST}, not {text}")
    return number


def seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.strip().removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a number of at least {least}, not {text}")
    return int(text)


def model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    add("--dtype", help="float32 (default), bfloat16, float16, float64")
    add("--compat", choices=("released",), help="compute as the published numbers were measured")
    add(
        "--short-prompt", choices=("none", "pad", "repeat", "iterate"), help="rule for prompts shorter than the encoder"
    )


def model_spec(arguments: argparse.Namespace, name: str) -> ModelSpec:
    """The model `name`, with the settings that the user gave by `model_options`."""
    from jrt.evaluate import ModelSpec

    return ModelSpec(name, arguments.device, arguments.dtype, arguments.compat, arguments.short_prompt)
