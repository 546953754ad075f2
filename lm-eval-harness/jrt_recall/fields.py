"""Fields of documents as they come: texts, and answers in the shapes that datasets give them.

What is read clearly is read. Anything else is a ValueError with its reason, which makes one document invalid and no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def checked_text(place: str, value: object) -> str:
    """A string that can be encoded. Raises ValueError that begins with `place`."""
    if not isinstance(value, str):
        raise ValueError(f"{place} must be a string, got {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half of a surrogate pair at character {error.start}: no text") from error
    return value


def answers_in(place: str, value: Any) -> tuple[str, ...]:
    """The answers in a field, any of which counts.

    A string is one answer, a list of strings is several. SQuAD's {"text": [...]} and lists of such, and TriviaQA's
    {"value": ..., "aliases": [...]} hold theirs. Raises ValueError for null, numbers, an empty list, a blank answer, and
    shapes that have no one meaning."""
    found = tuple(checked_text(f"{place}: an answer", answer) for answer in _spread(place, value))
    if not found:
        raise ValueError(f"{place}: the list of answers is empty")
    if any(not answer.strip() for answer in found):
        raise ValueError(f"{place}: an answer is blank, which says nothing of what a prediction must contain")
    return found


def _spread(place: str, value: Any) -> list:
    match value:
        case str():
            return [value]
        case Mapping() if "text" in value:
            return _strings(place, value["text"])
        case Mapping() if "value" in value or "aliases" in value:
            first = [value["value"]] if "value" in value else []
            return [*first, *_strings(place, value.get("aliases") or [])]
        case list() | tuple():
            spread = []
            for one in value:
                spread += _spread(place, one) if isinstance(one, Mapping) else [one]
            return spread
    raise ValueError(f"{place} must be a string or a list of strings, got {kind(value)}")


def _strings(place: str, value: Any) -> list:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return list(value)
    raise ValueError(f"{place} must hold a string or a list of strings, got {kind(value)}")


def kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
