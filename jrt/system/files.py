"""Reads JSON, and writes small files atomically: to a temporary file in the same folder, which is then renamed in one
step."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from jrt.system.breaks import first_line

LARGEST_JSON = 16 << 20  # bytes; parsed, JSON takes up to twenty times as much memory


def read_object(file: Path) -> dict:
    """The JSON object in a file of settings.

    Raises ValueError if the file holds something else, or is far larger than any settings."""
    if file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} is too large for a configuration or index: {file.stat().st_size} bytes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a JSON object")
    return content


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees either the former content or the new one, also after a crash."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def write_text(file: Path, text: str) -> None:
    """As `write_bytes`, for text in UTF-8; line ends are left as they are."""
    write_bytes(file, text.encode("utf-8"))


def write_json(file: Path, value: object) -> None:
    """As `write_bytes`, for a value as indented JSON. Raises ValueError for NaN and infinity, which JSON does not
    have."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    """The rows as text in JSON Lines: one object a line. Raises ValueError for NaN and infinity."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
