"""Loads the documents of the tasks: the published datasets, or passages with questions from a folder of your own.

The published datasets (tasks `recall_*`) come from a local copy, the *mirror*, or from the Hugging Face hub. A mirror
is a folder with one `NAME.jsonl` for each dataset and a `manifest.json` with rows, columns, sha256 and source of each
file. Its path is an argument or the environment variable JRT_DATA. `fetch` (from the hub) and `import_file` (from a
file) fill it, `verify` checks it.

The passages (tasks `qa_*`) come from a folder with `squad.jsonl`, `nq.jsonl`, `triviaqa.jsonl`, `drop.jsonl` (columns
context, question, answers) and `fda.jsonl` (text, attributes). Its path is an argument or JRT_PASSAGES. Results on
passages are never shown beside published values: the published datasets ask with a statement to complete (a cloze
statement), not with a question.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .fields import kind
from .files import canonical_lines, digest, json_object, read_lines, read_rows, read_text, write_text
from .protocols import PASSAGES, PUBLISHED, Task, published_task

logger = logging.getLogger(__name__)

FOLDER_VARIABLE, PASSAGES_VARIABLE = "JRT_DATA", "JRT_PASSAGES"
MANIFEST = "manifest.json"
SPLIT = "validation"  # of the published datasets
PROBLEM = "jrt_recall: problem"  # the field that says why a row cannot be read; no column of a user has this name
_ENTRY = {"rows": int, "columns": list, "sha256": str, "source": str}  # what is read of a dataset's entry


class MissingDataset(ValueError):
    """A task's documents are not in a local folder, and the hub cannot be reached. The message says how to get them."""


class Documents(NamedTuple):
    """Documents in their published order, where they come from, and the sha256 of their `canonical_lines`."""

    rows: list[dict]
    source: str
    sha256: str


class Checked(NamedTuple):
    """What `verify` found for one dataset. If it is not ok, `message` says what is wrong."""

    task: str
    ok: bool
    message: str


def mirror_folder(folder: str | Path | None = None) -> Path | None:
    """Returns the mirror's path: `folder` if given, else the one in JRT_DATA, else None."""
    return _folder(folder, FOLDER_VARIABLE)


def load(task: str, folder: str | Path | None = None) -> Documents:
    """Returns all documents of a published task after a check of their columns.

    They come from the mirror if it has them. Otherwise they come from the hub, unless `folder` names the mirror.
    Raises MissingDataset if they cannot be found, and ValueError if the mirror's file is damaged or lacks a column."""
    spec = published_task(task)
    mirror = mirror_folder(folder)
    if mirror is not None:
        file = mirror / f"{spec.name}.jsonl"
        if file.is_file():
            checked = _verified(spec, mirror)
            if not checked.ok:
                raise ValueError(f"{checked.message}; bring it again with `jrt data fetch {spec.name}`")
            entry = _manifest(mirror)[spec.name]
            return Documents(read_lines(file), entry["source"], entry["sha256"])
        if folder is not None:
            raise MissingDataset(f"{spec.name}: {mirror} holds no {file.name}. {_how_to_get(spec)}")
    return _published(spec)


def load_passages(task: str, folder: str | Path | None = None) -> Documents:
    """Returns the documents of a `qa_*` task: one for each line of the file, or for fda one for each attribute of a
    line.

    A line that lacks a field becomes a row with a PROBLEM. Raises MissingDataset if the folder or its file is absent,
    and ValueError if all lines lack a field."""
    chosen = _folder(folder, PASSAGES_VARIABLE)
    name = f"{task.removeprefix('qa_')}.jsonl"
    if chosen is None or not (chosen / name).is_file():
        reason = "no folder of passages" if chosen is None else f"{chosen / name} is absent"
        raise MissingDataset(f"{task}: {reason}; set {PASSAGES_VARIABLE} to a folder with {name}")
    needed = PASSAGES[task].columns
    lines = read_lines(chosen / name)
    rows: list[dict] = []
    if lines and (absent := [field for field in needed if not any(field in line for line in lines)]):
        raise ValueError(f"{task}: line 1 of {chosen / name} lacks {', '.join(absent)}, and so do all others")
    for number, line in enumerate(lines):
        if missing := [field for field in needed if field not in line]:
            rows.append({**line, PROBLEM: f"line {number + 1} lacks {', '.join(missing)}"})
        else:
            rows.extend(_attribute_rows(line, number) if "attributes" in needed else [line])
    return Documents(rows, f"passages {name}", digest(lines))


def _attribute_rows(line: dict, number: int) -> list[dict]:
    """One row for each attribute of a page. If the attributes cannot be read, one row that says why, in PROBLEM."""
    document = line.get("doc_id")
    document = str(number) if document is None else str(document)
    attributes = line["attributes"]
    if not isinstance(attributes, dict):
        return [{"id": document, PROBLEM: f"field 'attributes' must be an object, got {kind(attributes)}"}]
    return [
        {"id": f"{document}/{key}", "text": line["text"], "key": key, "answers": v} for key, v in attributes.items()
    ]


def fetch(tasks: Iterable[str] = PUBLISHED, folder: str | Path | None = None) -> list[Path]:
    """Copies datasets from the hub to the mirror and returns the files. A file that is there and intact is kept."""
    mirror = _named(folder)
    files = []
    for spec in map(published_task, tasks):
        if _verified(spec, mirror).ok:
            logger.info("%s: already in %s", spec.name, mirror)
            files.append(mirror / f"{spec.name}.jsonl")
        else:
            documents = _published(spec)
            files.append(store(spec.name, documents.rows, documents.source, mirror))
    return files


def import_file(task: str, file: str | Path, folder: str | Path | None = None) -> Path:
    """Copies a task's documents from a .jsonl, .json or .parquet file to the mirror. Returns the new file.

    Raises ValueError if the file cannot be read or lacks a column of the task."""
    spec = published_task(task)
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return store(spec.name, read_rows(path, spec.columns), f"imported from {path.name}", _named(folder))


def verify(tasks: Iterable[str] | None = None, folder: str | Path | None = None) -> list[Checked]:
    """Compares files of the mirror with its manifest, and their columns with the task's.

    tasks None means all datasets."""
    mirror = _named(folder)
    if not mirror.is_dir():
        raise ValueError(f"{mirror} is not a folder")
    return [_verified(published_task(task), mirror) for task in (PUBLISHED if tasks is None else tasks)]


def store(task: str, rows: Sequence[dict], source: str, folder: str | Path) -> Path:
    """Writes a task's documents to the mirror, then their entry in its manifest. Returns the file.

    Each of the two files is replaced in one step. Raises ValueError if a column is missing or JSON cannot hold it."""
    spec = published_task(task)
    rows = usable_rows(spec, rows, source)
    mirror = _named(folder)
    mirror.mkdir(parents=True, exist_ok=True)
    file = mirror / f"{spec.name}.jsonl"
    write_text(file, canonical_lines(rows))
    entry = {
        "file": file.name,
        "rows": len(rows),
        "columns": sorted(rows[0]),
        "sha256": digest(rows),
        "source": source,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest = _manifest(mirror) | {spec.name: entry}
    write_text(mirror / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return file


def usable_rows(spec: Task, rows: Sequence[dict], source: str) -> list[dict]:
    """Returns the rows without the columns that JSON cannot hold (timestamps, decimals, bytes).

    Raises ValueError if there are no rows, or if a row lacks a column of the task, or JSON cannot hold it; the message
    names the column."""
    if not rows:
        raise ValueError(f"{spec.name}: {source} holds no documents")
    dropped: dict[str, str] = {}
    for number, row in enumerate(rows):
        if missing := [column for column in spec.columns if column not in row]:
            raise ValueError(
                f"{spec.name}: document {number} of {source} lacks the column{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)} (it has {', '.join(map(str, row))}; expected {', '.join(spec.columns)})"
            )
        for column, value in row.items():
            if column not in dropped and not _fits_json(value):
                dropped[column] = type(value).__name__
    if unreadable := [f"{column} ({dropped[column]})" for column in spec.columns if column in dropped]:
        raise ValueError(f"{spec.name}: {source} has values that are no text in {', '.join(unreadable)}")
    if dropped:
        logger.warning("%s: left out, because JSON cannot hold them: %s", spec.name, ", ".join(dropped))
    return [{column: value for column, value in row.items() if column not in dropped} for row in rows]


def _fits_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def from_hub(task: str, dataset: str, instead: str, **which: str) -> Any:
    """Loads a dataset from the hub or its local cache.

    Args:
        task: for the error message.
        dataset: name on the hub.
        instead: what the user can do if the dataset cannot be loaded, for the error message.
        which: `name` (the configuration) and `split`, as `datasets.load_dataset` takes them.

    Raises:
        MissingDataset: the dataset cannot be loaded.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return datasets.load_dataset(dataset, **which)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingDataset(f"{task}: {dataset} could not be read from the hub ({reason}). {instead}") from error


def _published(spec: Task) -> Documents:
    source = f"{spec.dataset} ({SPLIT})"
    rows = usable_rows(spec, from_hub(spec.name, str(spec.dataset), _how_to_get(spec), split=SPLIT).to_list(), source)
    return Documents(rows, source, digest(rows))


def _how_to_get(spec: Task) -> str:
    return (
        f"With network, run `jrt data fetch {spec.name}` and set {FOLDER_VARIABLE} to that folder; without, bring a file "
        f"with the columns {', '.join(spec.columns)} and run `jrt data import {spec.name} FILE`"
    )


def _verified(spec: Task, mirror: Path) -> Checked:
    file, entry = mirror / f"{spec.name}.jsonl", _manifest(mirror).get(spec.name)
    if not file.is_file():
        problem = f"{mirror} holds no {file.name}"
    elif entry is None:
        problem = f"{file} is not in {MANIFEST} (import it: `jrt data import {spec.name} {file}`)"
    elif (sha256 := hashlib.sha256(file.read_bytes()).hexdigest()) != entry["sha256"]:
        problem = f"{file} has sha256 {sha256[:12]}, not {entry['sha256'][:12]}"
    elif missing := [column for column in spec.columns if column not in entry["columns"]]:
        problem = f"{file} lacks the columns {', '.join(missing)}"
    else:
        return Checked(spec.name, True, f"{spec.name}: {entry['rows']} documents, {entry['source']}")
    return Checked(spec.name, False, f"{spec.name}: {problem}")


def _folder(folder: str | Path | None, variable: str) -> Path | None:
    chosen = folder if folder is not None else os.environ.get(variable)
    return Path(chosen).expanduser() if chosen else None


def _named(folder: str | Path | None) -> Path:
    mirror = mirror_folder(folder)
    if mirror is None:
        raise ValueError(f"no mirror folder: name one, or set {FOLDER_VARIABLE}")
    if mirror.exists() and not mirror.is_dir():
        raise ValueError(f"{mirror} is not a folder")
    return mirror


def _manifest(mirror: Path) -> dict:
    file = mirror / MANIFEST
    if not file.is_file():
        return {}
    manifest = json_object(read_text(file), str(file))
    for name, entry in manifest.items():
        kinds = {field: type(entry.get(field)) for field in _ENTRY} if isinstance(entry, dict) else {}
        if kinds != _ENTRY:
            raise ValueError(
                f"{file} is damaged: expected {', '.join(_ENTRY)} in its entry {name!r}; remove it and bring the data again"
            )
    return manifest
