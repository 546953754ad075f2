"""Reads Parquet files column by column, so that a column that nobody reads cannot spoil the file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# What pyarrow raises for values that Python's types cannot hold: dates after the year 9999, unknown time zones, bytes
# that are not UTF-8 ...
_NOT_HELD = (ArithmeticError, LookupError, ValueError)


def read_parquet(path: Path, needed: Sequence[str]) -> list[dict]:
    """Returns the rows of a Parquet file, without the columns whose values Python cannot hold.

    needed: the columns that must be readable. Raises ValueError if one is not (with its first unreadable row, from 0),
    or if the file is no Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as Parquet: {reason:.120}") from error
    columns: dict[str, list] = {}
    for name in table.column_names:
        column = table.column(name)
        try:
            columns[name] = column.to_pylist()
        except (*_NOT_HELD, pyarrow.ArrowException) as error:
            if name in needed:
                row = next(number for number in range(len(column)) if not _held(column[number]))
                raise ValueError(f"{path}, column {name!r}, row {row}: cannot be read ({error})") from error
            logger.warning("%s: column %r is left out, because it cannot be read (%s)", path, name, error)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _held(value: Any) -> bool:
    import pyarrow

    try:
        value.as_py()
    except (*_NOT_HELD, pyarrow.ArrowException):
        return False
    return True
