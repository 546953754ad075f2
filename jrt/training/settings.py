"""Checks settings that come from a configuration file or a command line."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


def check_fields(settings: Any, group: str) -> None:
    """Raises ValueError for a field of a dataclass that does not have its annotated type.

    Fields may be of the types in WORDS, tuples of them, or None. A whole number can stand for a float, and a list for a
    tuple. `true` and `false` are no numbers, and words such as "no" are neither.

    Args:
        settings: an instance of a dataclass.
        group: of the settings, for the message: "trainer".
    """
    for name, kind in get_type_hints(type(settings)).items():
        if name in {field.name for field in dataclasses.fields(settings)}:
            check_kind(f"{group}.{name}", getattr(settings, name), kind)


def check_kind(name: str, value: object, kind: Any) -> None:
    """Raises ValueError if a setting does not have this type. Arguments as in `check_fields`."""
    if not _fits(value, kind):
        raise ValueError(f"{name} is {_shown(value)}: expected {_in_words(kind)}")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises ValueError if a setting is no whole number, or outside of least to most."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {_shown(value)}: expected a whole number {limit}")


def check_seed(name: str, value: object) -> None:
    """Raises ValueError if a setting is no seed: PyTorch and NumPy take different numbers, and these are in both."""
    check_whole(name, value, 0, (1 << 63) - 1)


def _shown(value: object) -> str:
    """A value as the user may have typed it."""
    return reprlib.repr(value).strip("'") if isinstance(value, str) else reprlib.repr(value)


def _fits(value: object, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is kind


def _in_words(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of " + " and ".join(map(_in_words, get_args(kind)))
    return "null" if kind is NoneType else WORDS[kind]
