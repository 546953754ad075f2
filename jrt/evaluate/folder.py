"""The output folder of one run of `jrt eval`.

manifest.json       what was asked (the run's identity), versions, models' hashes, how fast the last start of the run
                    answered (see `jrt.evaluate.workers.Throughput`), whether the run is complete
predictions.jsonl   one line for each answered item; appended batch by batch, sorted at the end
results.json        one record for each cell: a model, task, strategy and protocol
comparisons.json    paired differences between cells
run.lock            locked while a process writes
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import jrt_recall
from jrt_recall import Protocol, task_named
from jrt_recall.protocols import PAGES

import jrt
from jrt.evaluate.shapes import CELL, PREDICTION, RECORD, check, check_each, check_finished, check_manifest
from jrt.system.files import json_lines, write_json, write_text
from jrt.system.provenance import code_sha256, commit, device_name, versions

MANIFEST, PREDICTIONS, RESULTS, COMPARISONS = "manifest.json", "predictions.jsonl", "results.json", "comparisons.json"
_LOCK = "run.lock"
ALL_ITEMS = "all"  # in the settings of a cell: all items of its task were asked


class Cell(NamedTuple):
    """The names that identify one score: which model answered which task, with which reading strategy (the context once
    or twice), under which protocol (prompt format and limits)."""

    model: str
    task: str
    strategy: str
    protocol: str


def cell_of(row: dict) -> Cell:
    """The cell that a prediction or a record belongs to."""
    return Cell(row["model"], row["task"], row["strategy"], row["protocol"])


def by_item(predictions: Iterable[dict]) -> defaultdict[Cell, dict[str, dict]]:
    """Predictions by cell and by the id of their item. If an item was answered twice, the first answer counts."""
    found: defaultdict[Cell, dict[str, dict]] = defaultdict(dict)
    for row in predictions:
        found[cell_of(row)].setdefault(row["id"], row)
    return found


@dataclass(frozen=True)
class Results:
    """The results of one run, or of several together.

    Args:
        records: one for each cell that has a score, as in results.json.
        predictions: one for each answered item, as in predictions.jsonl.
        manifest: as in manifest.json.
        comparisons: paired differences between cells, as in comparisons.json.
        settings: for each cell, the dtype, items and package versions with which it was computed.
    """

    records: list[dict]
    predictions: list[dict]
    manifest: dict
    comparisons: list[dict] = field(default_factory=list)
    settings: dict[Cell, dict[str, str]] = field(default_factory=dict)

    @property
    def by_cell(self) -> dict[Cell, dict]:
        """The records by cell."""
        return {cell_of(record): record for record in self.records}

    @property
    def models(self) -> list[str]:
        """The names of the models that have a record, in their order."""
        return list(dict.fromkeys(record["model"] for record in self.records))

    @property
    def protocols(self) -> list[Protocol]:
        """The protocols that the manifest describes."""
        known = self.manifest["identity"]["protocols"]
        return [Protocol(**{**protocol, "stop": tuple(protocol["stop"])}) for protocol in known]

    @property
    def failed(self) -> dict[Cell, str]:
        """The cells without a score, with the reason on one line."""
        return {cell_of(row): " ".join(row["reason"].split()) for row in self.manifest.get("failed", ())}


def origin(device: str) -> dict[str, object]:
    """Where a run's numbers come from, for its manifest: versions, a hash of the code, device, commit and date."""
    return {
        "versions": {**versions(), "code": code_sha256(jrt, jrt_recall)},
        "device": device_name(device),
        "commit": commit(Path(jrt.__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class RunFolder:
    """An output folder that this process writes to. Leaving the context (`with RunFolder(...)`) releases its lock.

    Args:
        path: created if absent.
        manifest: two runs are the same if their manifests' `identity` is the same; other entries are only recorded.
        resume: continue the run that the folder holds.

    Raises:
        ValueError: the folder holds something else, another process writes to it, or it holds the same run and `resume`
            is False.
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
        if former:  # written again without the last line, if a crash cut that off
            write_text(path / PREDICTIONS, json_lines(self.rows))
        self._stream = (path / PREDICTIONS).open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._lock.close()
        (self.path / _LOCK).unlink(missing_ok=True)

    def note_model(self, info: dict) -> None:
        """Records a model's description. Raises ValueError if the run began with other weights under that name."""
        known = self.manifest["models"].get(info["name"])
        if known is not None and known["sha256"] != info["sha256"]:
            raise ValueError(
                f"{info['name']} has other weights than when the run in {self.path} began: choose another folder"
            )
        self.manifest["models"][info["name"]] = info
        write_json(self.path / MANIFEST, self.manifest)

    def append(self, rows: list[dict]) -> None:
        """Adds the predictions of a batch; they are on disk when this returns."""
        self._stream.write(json_lines(rows))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.rows += rows

    def finish(
        self,
        records: list[dict],
        predictions: list[dict],
        comparisons: list[dict],
        throughput: dict[str, float],
        failed: dict[Cell, str],
    ) -> Results:
        """Writes the predictions in order, and the results. The order of answering leaves no trace in these files.

        failed: cells without a score, with the reason. The manifest records them, and the run counts as unfinished."""
        self.manifest["throughput"] = throughput
        self.manifest["failed"] = [{**cell._asdict(), "reason": reason} for cell, reason in failed.items()]
        self.manifest["complete"] = not failed
        write_text(self.path / PREDICTIONS, json_lines(predictions))
        write_json(self.path / COMPARISONS, comparisons)
        write_json(self.path / RESULTS, records)
        write_json(self.path / MANIFEST, self.manifest)
        return Results(records, predictions, self.manifest, comparisons)


def read_run(path: Path) -> Results:
    """The results of a finished run, without its comparisons.

    Raises ValueError if the folder holds no finished run, or files that do not fit together."""
    files = [path / name for name in (RESULTS, PREDICTIONS, MANIFEST)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{path} holds no finished run ({', '.join(missing)} absent): go on with `jrt eval ... --resume`"
        )
    found, manifest = read_json(files[0]), read_json(files[2])
    check_each(str(files[0]), found, RECORD, (*CELL, "score", "n"))
    check_manifest(str(files[2]), manifest)
    later = {"version": 1, "unreachable": 0, "notes": []}  # fields that older versions did not write
    records = [{**record, **later, **record} for record in _renamed(found)]
    check_finished(str(files[2]), manifest, records)
    predictions = _read_predictions(files[1])
    counted = Counter(map(cell_of, predictions))
    for record in records:
        if (found := counted[cell_of(record)]) != record["n"]:
            raise ValueError(
                f"{path} is damaged: {RESULTS} rests on {record['n']} answers of {record['model']} {record['task']} "
                f"{record['strategy']}, {PREDICTIONS} holds {found}: go on with `jrt eval ... --resume`"
            )
    settings = _settings(manifest)
    return Results(
        records, predictions, manifest, settings={cell_of(record): settings[record["model"]] for record in records}
    )


def _settings(manifest: dict) -> dict[str, dict[str, str]]:
    """For each model of a run, the dtype, items and package versions with which its cells were computed."""
    identity = manifest["identity"]
    versions = {name: str(value) for name, value in manifest.get("versions", {}).items() if name != "platform"}
    items = ALL_ITEMS if identity.get("limit") is None else f"the first {identity['limit']}"
    return {model["name"]: {"dtype": model["dtype"], "items": items, **versions} for model in identity["models"]}


def former_manifest(path: Path, identity: dict, resume: bool) -> dict | None:
    """The manifest that an earlier start of the same run left in the folder; None for an empty or absent folder.

    Raises ValueError if the folder holds something else, or the same run and `resume` is False."""
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
    """Rows with today's task names. Version 0.1 wrote `fda` for recall_fda, and `reference_pages` with the protocol
    pages-512 for recall_reference_pages_512."""
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
    """The predictions in a file. An incomplete last line, which a crash leaves, is skipped."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    rows: list[dict] = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line.decode("utf-8")) if line else {}
        except (ValueError, RecursionError) as error:
            if number + 1 < len(lines):
                raise ValueError(f"{file}, line {number + 1}: not JSON ({error})") from error
            continue
        if line:
            check(f"{file}, line {number + 1}", row, PREDICTION, (*CELL, "id", "score"))
            rows.append(row)
    return _renamed(rows)
