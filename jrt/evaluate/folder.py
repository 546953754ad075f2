"""The folder of one run: a manifest of what was asked, predictions as they come, results at the end.

    manifest.json       identity of the run, versions, models' hashes, whether it is complete
    predictions.jsonl   one line for each item; appended a batch at a time, put in order at the end
    results.json        one record for each cell
    comparisons.json    paired differences
    run.lock            held while a process writes

A folder belongs to one run: another run is refused, the same one goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple

from jrt_recall import task_named
from jrt_recall.protocols import PAGES

from jrt.evaluate.shapes import CELL, PREDICTION, RECORD, check, check_each, check_finished, check_manifest
from jrt.system.files import json_lines, write_json, write_text

MANIFEST, PREDICTIONS, RESULTS, COMPARISONS = "manifest.json", "predictions.jsonl", "results.json", "comparisons.json"
_LOCK = "run.lock"


class Cell(NamedTuple):
    """One number of a table, by names."""

    model: str
    task: str
    strategy: str
    protocol: str


class RunFolder:
    """An output folder in use; a context manager that lets go of it.

    Args:
        path: made if absent, once the run is known to be sound.
        manifest: `identity` decides whether two runs are the same; the rest is kept for the record.
        resume: go on with what the folder holds.

    Raises:
        ValueError: the folder holds something else, is in use, or was left by the same run and `resume` is False.
    """

    def __init__(self, path: Path, manifest: dict, resume: bool) -> None:
        self.path = path
        try:
            former = former_manifest(path, manifest["identity"], resume)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be made or written ({error.strerror}): choose another folder") from error
        self.rows = _read_predictions(path / PREDICTIONS) if former else []
        self.manifest = {**manifest, "models": (former or {}).get("models", {}), "complete": False}
        write_json(path / MANIFEST, self.manifest)
        if former:  # a line that a crash cut off is dropped for good
            write_text(path / PREDICTIONS, json_lines(self.rows))
        self._stream = (path / PREDICTIONS).open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._lock.close()
        (self.path / _LOCK).unlink(missing_ok=True)

    def note_model(self, info: dict) -> None:
        """Records what a model is. Raises ValueError where the run was begun with other weights under that name."""
        known = self.manifest["models"].get(info["name"])
        if known is not None and known["sha256"] != info["sha256"]:
            raise ValueError(
                f"{info['name']} has other weights than when the run in {self.path} began: choose another folder"
            )
        self.manifest["models"][info["name"]] = info
        write_json(self.path / MANIFEST, self.manifest)

    def done(self, cell: Cell) -> set[str]:
        """Ids of the items of a cell that are answered."""
        return {row["id"] for row in self.rows if cell_of(row) == cell}

    def append(self, rows: list[dict]) -> None:
        """Keeps a batch, on disk before anything else happens."""
        self._stream.write(json_lines(rows))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.rows.extend(rows)

    def finish(
        self, rows: list[dict], records: list[dict], comparisons: list[dict], failed: dict[Cell, str] | None = None
    ) -> None:
        """Puts predictions in order and writes the results: the same files whoever answered what and when.

        failed: cells without a number, and why; the manifest keeps them, and the run stays open for them."""
        write_text(self.path / PREDICTIONS, json_lines(rows))
        write_json(self.path / COMPARISONS, comparisons)
        write_json(self.path / RESULTS, records)
        self.manifest["failed"] = [{**cell._asdict(), "reason": reason} for cell, reason in (failed or {}).items()]
        self.manifest["complete"] = not failed
        write_json(self.path / MANIFEST, self.manifest)


def cell_of(row: dict) -> Cell:
    """The cell that a prediction or a record belongs to."""
    return Cell(row["model"], row["task"], row["strategy"], row["protocol"])


def read_run(path: Path) -> tuple[list[dict], list[dict], dict]:
    """Records, predictions and manifest of a finished run.

    Raises ValueError where the folder holds none, or files that do not belong together."""
    files = [path / name for name in (RESULTS, PREDICTIONS, MANIFEST)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{path} holds no finished run ({', '.join(missing)} absent): go on with `jrt eval ... --resume`"
        )
    found, manifest = read_json(files[0]), read_json(files[2])
    check_each(str(files[0]), found, RECORD, (*CELL, "score", "n"))
    check_manifest(str(files[2]), manifest)
    records = _renamed(found)
    check_finished(str(files[2]), manifest, records)
    predictions = _read_predictions(files[1])
    counted = Counter(map(cell_of, predictions))
    for record in records:
        if (found := counted[cell_of(record)]) != record["n"]:
            raise ValueError(
                f"{path} is damaged: {RESULTS} rests on {record['n']} answers of {record['model']} {record['task']} "
                f"{record['strategy']}, {PREDICTIONS} holds {found}: go on with `jrt eval ... --resume`"
            )
    return records, predictions, manifest


def former_manifest(path: Path, identity: dict, resume: bool) -> dict | None:
    """The manifest of the same run, None for an empty or absent folder.

    Raises ValueError where the folder holds something else, or the same run and `resume` is False."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: --output names a folder")
    if not path.is_dir() or not any(entry.name != _LOCK for entry in path.iterdir()):
        return None
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{path} is not empty and holds no run of `jrt eval` ({MANIFEST} absent): choose another folder"
        )
    former = read_json(file)
    check_manifest(str(file), former)
    known = former["identity"]
    cells = known.get("cells", [])
    check_each(f"{file}, cells", cells, CELL, ("task", "protocol"))
    known = {**known, "cells": _renamed(cells)}
    identity = json.loads(json.dumps(identity))
    if different := [key for key in identity if known.get(key) != identity[key]]:
        raise ValueError(f"{path} holds another run (it differs in {', '.join(different)}): choose another folder")
    if not resume:
        state = "finished" if former.get("complete") else "unfinished"
        raise ValueError(
            f"{path} already holds this run, {state}: add --resume to go on with it, or choose another folder"
        )
    return former


def _renamed(rows: list[dict]) -> list[dict]:
    """Rows under the one name of their task. Version 0.1 wrote `fda` for recall_fda, and `reference_pages` beside the
    protocol pages-512 for recall_reference_pages_512."""
    found = []
    for row in rows:
        task = task_named(row["task"])
        if task == PAGES:
            task += "_" + row["protocol"].split("+")[0].removeprefix("pages-")
        found.append({**row, "task": task})
    return found


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply
        raise ValueError(f"{file} is damaged ({error}): choose another folder") from error


def _locked(path: Path) -> IO[str]:
    stream = (path / _LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise ValueError(f"another process is writing to {path}: wait for it, or choose another folder") from error
    return stream


def _read_predictions(file: Path) -> list[dict]:
    """All whole lines; the last one may have been cut off by a crash."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line.decode("utf-8")) if line else None
        except (ValueError, RecursionError) as error:
            if number + 1 < len(lines):
                raise ValueError(f"{file}, line {number + 1}: not JSON ({error})") from error
            continue
        if line:
            check(f"{file}, line {number + 1}", row, PREDICTION, (*CELL, "id", "score"))
            rows.append(row)
    return _renamed(rows)
