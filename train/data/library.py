"""A small training text for trials, made from the documentation inside Python's standard library."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from jrt_recall import reference_pages

from train.data.batches import TextData
from train.prepare import NOTE, prepare

PAGES = 24


class LibraryText(TextData):
    """`TextData` that first fills its folder, in a few seconds.

    A folder that already holds a train.bin is used as it is."""

    def __init__(
        self, folder: str, length: int, seed: int, validation_windows: int, validation_rows: int, workers: int
    ) -> None:
        path = Path(str(folder)).expanduser()
        if (path / NOTE).is_file() or not any(path.glob("train*.bin")):  # NOTE: it was stopped before its end
            make_library_text(path)
        super().__init__(
            length,
            seed,
            folder,
            validation_windows=validation_windows,
            validation_rows=validation_rows,
            workers=workers,
        )


def make_library_text(folder: Path) -> None:
    """Writes pages of the standard library's documentation to `folder`, encoded with the mini models' vocabulary."""
    pages = reference_pages.library_pages()[:PAGES]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "library.jsonl"
        source.write_text("".join(json.dumps({"text": page.text}) + "\n" for page in pages), encoding="utf-8")
        prepare(str(source), folder, validation=0.1)
