"""Reads the text and answer fields of dataset documents, and checks their types.

Datasets store answers in several shapes. The shapes that have one clear meaning are accepted. Everything else raises a
ValueError that says why; the caller counts that document as invalid and goes on with the next one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from .protocols import document_task


def checked_text(place: str, value: object) -> str:
    """Returns `value` if it is a string that UTF-8 can encode.

    Otherwise raises a ValueError whose message begins with `place`, the name of the field."""
    if not isinstance(value, str):
        raise ValueError(f"{place} must be a string, got {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half of a surrogate pair at character {error.start}: no text") from error
    return value


def is_text(text: str) -> bool:
    """False for a string with a lone surrogate, which no encoding of text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def answers_in(place: str, value: Any) -> tuple[str, ...]:
    """Returns the answers in a field. A prediction is right if it contains any of them.

    Args:
        place: the name of the field, for error messages.
        value: a string (one answer), a list of strings (several), SQuAD's {"text": [...]} or a list of these, or
            TriviaQA's {"value": ..., "aliases": [...]}.

    Raises:
        ValueError: null, a number, an empty list, a blank answer, or any other shape.
    """
    found = tuple(checked_text(f"{place}: an answer", answer) for answer in _spread(place, value))
    if not found:
        raise ValueError(f"{place}: the list of answers is empty")
    if any(is_blank(answer) for answer in found):
        raise ValueError(f"{place}: an answer is blank, which says nothing of what a prediction must contain")
    return found


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, control characters, marks of no width."""
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in text)


def _spread(place: str, value: Any) -> list:
    match value:
        case str():
            return [value]
        case Mapping() if "text" in value:
            return _strings(place, value["text"])
        case Mapping() if "value" in value or "aliases" in value:
            first = [value["value"]] if "value" in value else []
            aliases = value.get("aliases")
            return [*first, *(_strings(place, aliases) if aliases is not None else [])]
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
    """The JSON name of a value's type, for error messages."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def text_field(task: str, doc: dict, field: str) -> str:
    """Returns doc[field]. If it is missing or not text, the ValueError names the task and the field."""
    return checked_text(f"{task}: field {field!r}", _field(task, doc, field))


def whole_field(task: str, doc: dict, field: str) -> int:
    """doc[field], a whole number of at least 0. Raises ValueError that names the task and the field."""
    value = _field(task, doc, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{task}: field {field!r} must be a whole number of at least 0, got {value!r:.40}")
    return value


def answers_of(task: str, doc: dict) -> tuple[str, ...]:
    """Returns the answers of a document; a right generation contains any of them.

    They are the field `value` for swde, fda and squad, else the field `answers`. Raises ValueError if the field is
    missing or holds no answer."""
    field = document_task(task).labels
    value = text_field(task, doc, field) if field == "value" else _field(task, doc, field)
    return answers_in(f"{task}: field {field!r}", value)


def _field(task: str, doc: dict, field: str) -> Any:
    if field not in doc:
        raise ValueError(f"{task}: the document has no field {field!r} (it has {', '.join(map(str, doc)) or 'none'})")
    return doc[field]
