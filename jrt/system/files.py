"""Writes small files atomically: to a temporary file in the same folder, which is then renamed in one step."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


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
