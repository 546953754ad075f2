"""Documents of the tasks: published datasets from a mirror folder or the Hugging Face hub, passages from a local folder.

A mirror is a folder with one `NAME.jsonl` for each dataset and `manifest.json` (rows, columns, sha256 and source of each
file). An argument or the environment variable JRT_DATA names it. `fetch` (from the hub) and `import_file` (from a file)
fill it, `verify` checks it.

The folder of passages holds `squad.jsonl`, `nq.jsonl`, `triviaqa.jsonl`, `drop.jsonl` (context, question, answers) and
`fda.jsonl` (text, attributes). An argument or JRT_PASSAGES names it. The published datasets carry cloze statements instead
of questions, so results on passages never stand beside published values.
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

from .protocols import PASSAGES, PUBLISHED, PublishedTask, published_task

logger = logging.getLogger(__name__)

FOLDER_VARIABLE, PASSAGES_VARIABLE = "JRT_DATA", "JRT_PASSAGES"
MANIFEST = "manifest.json"


class MissingDataset(ValueError):
    """A task's documents are neither in a local folder nor reachable on the hub. The message says how to get them."""


class Documents(NamedTuple):
    """Documents in their published order, where they come from, and the sha256 of their canonical JSON lines."""

    rows: list[dict]
    source: str
    sha256: str


class Checked(NamedTuple):
    """What `verify` found for one dataset: ok, or the problem in words."""

    task: str
    ok: bool
    message: str


def text_field(task: str, doc: dict, field: str) -> str:
    """doc[field], a string. Raises ValueError that names the task and the field if it is missing or no string."""
    value = _field(task, doc, field)
    if not isinstance(value, str):
        raise ValueError(f"{task}: field {field!r} must be a string, got {type(value).__name__}")
    return value


def answers_of(task: str, doc: dict) -> list[str]:
    """What a right generation contains: [value] for swde, fda and squad, else the list `answers` (may be empty)."""
    field = published_task(task).labels
    if field == "value":
        return [text_field(task, doc, field)]
    answers = _field(task, doc, field)
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{task}: field {field!r} must be a list of strings, got {answers!r:.80}")
    return list(answers)


def _field(task: str, doc: dict, field: str) -> Any:
    if field not in doc:
        raise ValueError(f"{task}: the document has no field {field!r} (it has {', '.join(map(str, doc)) or 'none'})")
    return doc[field]


def mirror_folder(folder: str | Path | None = None) -> Path | None:
    """The mirror: `folder`, else the one JRT_DATA names, else None."""
    return _folder(folder, FOLDER_VARIABLE)


def load(task: str, folder: str | Path | None = None) -> Documents:
    """All documents of a published task, columns checked.

    Raises MissingDataset where they cannot be had, ValueError if the mirror's file is damaged or lacks a column."""
    spec = published_task(task)
    mirror = mirror_folder(folder)
    if mirror is not None:
        file = mirror / f"{spec.name}.jsonl"
        if file.is_file():
            return _from_mirror(spec, mirror, file)
        if folder is not None:
            raise MissingDataset(_how_to_get(spec, f"{mirror} holds no {file.name}"))
    return _from_hub(spec)


def load_passages(task: str, folder: str | Path | None = None) -> Documents:
    """Documents of a `qa_*` task: squad's columns, or fda's with one row for each attribute.

    Raises MissingDataset where the folder or its file is absent, ValueError where a line lacks a field."""
    chosen = _folder(folder, PASSAGES_VARIABLE)
    name = f"{task.removeprefix('qa_')}.jsonl"
    if chosen is None or not (chosen / name).is_file():
        absent = "no folder of passages" if chosen is None else f"{chosen / name} is absent"
        raise MissingDataset(f"{task}: {absent}; set {PASSAGES_VARIABLE} to a folder with {name}")
    of_attributes = PASSAGES[task] == "fda"
    needed = ("text", "attributes") if of_attributes else ("context", "question", "answers")
    lines = read_lines(chosen / name)
    rows: list[dict] = []
    for number, line in enumerate(lines):
        if missing := [field for field in needed if field not in line]:
            raise ValueError(f"{task}: line {number + 1} of {chosen / name} lacks {', '.join(missing)}")
        rows.extend(_attribute_rows(line, number) if of_attributes else [_question_row(line, number)])
    return Documents(rows, f"passages {name}", digest(lines))


def _question_row(line: dict, number: int) -> dict:
    return {
        "id": str(line.get("id", number)),
        "text": f"{line['context']}\nQuestion: {line['question']}\nAnswer:",
        "context": line["context"],
        "question": line["question"],
        "value": line["answers"][0] if line["answers"] else "",
    }


def _attribute_rows(line: dict, number: int) -> list[dict]:
    document = str(line.get("doc_id", number))
    return [
        {"id": f"{document}/{key}", "text": line["text"], "key": key, "value": value}
        for key, value in line["attributes"].items()
    ]


def fetch(tasks: Iterable[str] = PUBLISHED, folder: str | Path | None = None) -> list[Path]:
    """Copies datasets from the hub into the mirror; one that is there and intact is kept. Returns the files."""
    mirror = _named(folder)
    files = []
    for spec in map(published_task, tasks):
        if _verified(spec, mirror).ok:
            logger.info("%s: already in %s", spec.name, mirror)
            files.append(mirror / f"{spec.name}.jsonl")
        else:
            documents = _from_hub(spec)
            files.append(store(spec.name, documents.rows, documents.source, mirror))
    return files


def import_file(task: str, file: str | Path, folder: str | Path | None = None) -> Path:
    """Copies a task's documents from a .jsonl, .json or .parquet file into the mirror, after a check of its columns."""
    spec = published_task(task)
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return store(spec.name, _read_rows(path), f"imported from {path.name}", _named(folder))


def verify(tasks: Iterable[str] | None = None, folder: str | Path | None = None) -> list[Checked]:
    """Checks files of the mirror against its manifest, and their columns against the task's. None: all datasets."""
    mirror = _named(folder)
    if not mirror.is_dir():
        raise ValueError(f"{mirror} is not a folder")
    return [_verified(published_task(task), mirror) for task in (PUBLISHED if tasks is None else tasks)]


def store(task: str, rows: Sequence[dict], source: str, folder: str | Path) -> Path:
    """Writes a task's documents and their entry of the manifest; an interrupted call leaves the former state."""
    spec = published_task(task)
    check_columns(spec, rows, source)
    mirror = _named(folder)
    mirror.mkdir(parents=True, exist_ok=True)
    text = canonical_lines(rows)
    file = mirror / f"{spec.name}.jsonl"
    _write(file, text)
    entry = {
        "file": file.name,
        "rows": len(rows),
        "columns": sorted(rows[0]),
        "sha256": _sha256(text),
        "source": source,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest = _manifest(mirror) | {spec.name: entry}
    _write(mirror / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return file


def check_columns(spec: PublishedTask, rows: Sequence[dict], source: str) -> None:
    """Raises ValueError that names the columns which `spec` reads and some row lacks, or if there are no rows."""
    if not rows:
        raise ValueError(f"{spec.name}: {source} holds no documents")
    for number, row in enumerate(rows):
        if missing := [column for column in spec.columns if column not in row]:
            raise ValueError(
                f"{spec.name}: document {number} of {source} lacks the column{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)} (it has {', '.join(map(str, row))}; expected {', '.join(spec.columns)})"
            )


def canonical_lines(rows: Iterable[dict]) -> str:
    """One JSON object a line, keys sorted: the text whose sha256 names a set of documents."""
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)


def digest(rows: Iterable[dict]) -> str:
    """sha256 of the canonical lines of `rows`."""
    return _sha256(canonical_lines(rows))


def read_lines(file: Path) -> list[dict]:
    """Rows of a JSONL file. Raises ValueError with the line number where a line is no JSON object."""
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    lines = enumerate(file.read_text(encoding="utf-8").split("\n"), start=1)
    return [_json_object(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def _json_object(text: str, place: str) -> dict:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def _read_rows(path: Path) -> list[dict]:
    match path.suffix:
        case ".jsonl":
            return read_lines(path)
        case ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"{path}: expected a JSON list of objects")
            return rows
        case ".parquet":
            from datasets import Dataset

            return Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
    raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file")


def _from_mirror(spec: PublishedTask, mirror: Path, file: Path) -> Documents:
    checked = _verified(spec, mirror)
    if not checked.ok:
        raise ValueError(f"{checked.message}; bring it again with `jrt data fetch {spec.name}`")
    entry = _manifest(mirror)[spec.name]
    return Documents(read_lines(file), entry["source"], entry["sha256"])


def _from_hub(spec: PublishedTask) -> Documents:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        loaded = datasets.load_dataset(spec.dataset, split=spec.split)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingDataset(_how_to_get(spec, f"{spec.dataset} could not be read from the hub ({reason})")) from error
    rows = loaded.to_list()
    source = f"{spec.dataset} ({spec.split})"
    check_columns(spec, rows, source)
    return Documents(rows, source, digest(rows))


def _how_to_get(spec: PublishedTask, reason: str) -> str:
    return (
        f"{spec.name}: {reason}. With network, run `jrt data fetch {spec.name}` and set {FOLDER_VARIABLE} to that "
        f"folder; without, bring a file with the columns {', '.join(spec.columns)} and run "
        f"`jrt data import {spec.name} FILE`"
    )


def _verified(spec: PublishedTask, mirror: Path) -> Checked:
    file = mirror / f"{spec.name}.jsonl"
    entry = _manifest(mirror).get(spec.name)

    def found(problem: str) -> Checked:
        return Checked(spec.name, False, f"{spec.name}: {problem}")

    if not file.is_file():
        return found(f"{mirror} holds no {file.name}")
    if entry is None:
        return found(f"{file} is not in {MANIFEST} (import it: `jrt data import {spec.name} {file}`)")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != entry["sha256"]:
        return found(f"{file} has sha256 {sha256[:12]}, not {entry['sha256'][:12]}")
    if missing := [column for column in spec.columns if column not in entry["columns"]]:
        return found(f"{file} lacks the columns {', '.join(missing)}")
    return Checked(spec.name, True, f"{spec.name}: {entry['rows']} documents, {entry['source']}")


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
    return _json_object(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else {}


def _write(file: Path, text: str) -> None:
    """Writes a file in one step: a reader sees the former content or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(file)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
