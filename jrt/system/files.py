"""Small files that are never half written: each is written beside its place and then moved there in one step."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file in one step: a reader sees the former content or the new one, also after a crash."""
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
    """Indented JSON. NaN is a ValueError, because other readers would refuse it."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
