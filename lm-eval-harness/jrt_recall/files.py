"""Reads rows from JSONL, JSON and Parquet files, writes them as JSONL, and names the place of what cannot be read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .fields import is_text, kind

logger = logging.getLogger(__name__)

_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bzip2, xz, zstd


def read_rows(path: Path, needed: Sequence[str]) -> list[dict]:
    """Returns the rows of a .jsonl, .json or .parquet file.

    needed: the columns that must be readable. Raises a ValueError that names the place of what cannot be read."""
    match path.suffix:
        case ".jsonl":
            return read_lines(path)
        case ".json":
            rows = _json(read_text(path), str(path))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"{path}: expected a JSON list of objects")
            return rows
        case ".parquet":
            return _read_parquet(path, needed)
    raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file")


def canonical_lines(rows: Iterable[dict]) -> str:
    """The rows as text, one JSON object a line with sorted keys. Its sha256 identifies a set of documents."""
    return "".join(_canonical(row) + "\n" for row in rows)


def _canonical(row: dict) -> str:
    text = json.dumps(row, ensure_ascii=False, sort_keys=True)
    # UTF-8 cannot encode half of a surrogate pair; a JSON escape can.
    return text if is_text(text) else json.dumps(row, sort_keys=True)


def digest(rows: Iterable[dict]) -> str:
    """The sha256 of `canonical_lines(rows)`."""
    return hashlib.sha256(canonical_lines(rows).encode("utf-8")).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Writes a file in one step, so that nobody reads a half-written one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(file)


def read_lines(file: Path) -> list[dict]:
    """Returns the rows of a JSONL file. If a line is not a JSON object or not UTF-8, the ValueError has its number."""
    # str.splitlines would also split at U+2028 and the like, which may stand in JSON strings.
    lines = enumerate(read_text(file).split("\n"), start=1)
    return [json_object(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def read_text(file: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark."""
    content = file.read_bytes()
    if content.startswith(_COMPRESSED):
        raise ValueError(f"{file}: the file is compressed; unpack it")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:  # with or without a byte order mark
        raise ValueError(f"{file}, line 1: the file is UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from error


def json_object(text: str, place: str) -> dict:
    """Returns the JSON object that `text` holds. Otherwise raises a ValueError whose message begins with `place`."""
    row = _json(text, place)
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {kind(row)}")
    return row


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        raise ValueError(f"{place}: JSON that cannot be read ({type(error).__name__})") from error


def _read_parquet(path: Path, needed: Sequence[str]) -> list[dict]:
    """The rows of a Parquet file. A column that nobody needs is left out if Python cannot hold one of its values."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as Parquet: {reason:.120}") from error
    columns: dict[str, list] = {}
    for name in table.column_names:
        values = []
        try:
            for cell in table.column(name):
                values.append(cell.as_py())
        # Dates after the year 9999, unknown time zones, bytes that are not UTF-8 ...
        except (ArithmeticError, LookupError, ValueError, pyarrow.ArrowException) as error:
            if name in needed:
                raise ValueError(f"{path}, column {name!r}, row {len(values)}: cannot be read ({error})") from error
            logger.warning("%s: column %r is left out, because it cannot be read (%s)", path, name, error)
        else:
            columns[name] = values
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
