"""Small files that are never half written."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Writes a file in one step: a reader sees the former content or the new one."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def write_bytes(file: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def write_json(file: Path, value: object) -> None:
    """Indented JSON; NaN is refused, because other readers would refuse it."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
