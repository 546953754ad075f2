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
from .parquet import read_parquet
from .protocols import PASSAGES, PUBLISHED, Task, published_task

logger = logging.getLogger(__name__)

FOLDER_VARIABLE, PASSAGES_VARIABLE = "JRT_DATA", "JRT_PASSAGES"
MANIFEST = "manifest.json"
SPLIT = "validation"  # of the published datasets
PROBLEM = "jrt_recall: problem"  # the field that says why a row cannot be read; no column of a user has this name
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bzip2, xz, zstd
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
            return _from_mirror(spec, mirror, file)
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
    return store(spec.name, _read_rows(path, spec.columns), f"imported from {path.name}", _named(folder))


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
    check_columns(spec, rows, source)
    rows = _as_json_holds(spec, rows, source)
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


def check_columns(spec: Task, rows: Sequence[dict], source: str) -> None:
    """Raises ValueError if there are no rows, or if a row lacks a column of the task; the message names the column."""
    if not rows:
        raise ValueError(f"{spec.name}: {source} holds no documents")
    for number, row in enumerate(rows):
        if missing := [column for column in spec.columns if column not in row]:
            raise ValueError(
                f"{spec.name}: document {number} of {source} lacks the column{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)} (it has {', '.join(map(str, row))}; expected {', '.join(spec.columns)})"
            )


def canonical_lines(rows: Iterable[dict]) -> str:
    """The rows as text, one JSON object a line with sorted keys. Its sha256 identifies a set of documents."""
    return "".join(_canonical(row) + "\n" for row in rows)


def _canonical(row: dict) -> str:
    text = json.dumps(row, ensure_ascii=False, sort_keys=True)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: UTF-8 cannot encode it, a JSON escape can
        return json.dumps(row, sort_keys=True)
    return text


def digest(rows: Iterable[dict]) -> str:
    """The sha256 of `canonical_lines(rows)`."""
    return _sha256(canonical_lines(rows))


def read_lines(file: Path) -> list[dict]:
    """Returns the rows of a JSONL file. If a line is not a JSON object or not UTF-8, the ValueError has its number."""
    # str.splitlines would also split at U+2028 and the like, which may stand in JSON strings.
    lines = enumerate(read_text(file).split("\n"), start=1)
    return [_json_object(line, f"{file}, line {number}") for number, line in lines if line.strip()]


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


def _json_object(text: str, place: str) -> dict:
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


def _read_rows(path: Path, needed: Sequence[str]) -> list[dict]:
    match path.suffix:
        case ".jsonl":
            return read_lines(path)
        case ".json":
            rows = _json(read_text(path), str(path))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"{path}: expected a JSON list of objects")
            return rows
        case ".parquet":
            return read_parquet(path, needed)
    raise ValueError(f"{path}: expected a .jsonl, .json or .parquet file")


def _as_json_holds(spec: Task, rows: Sequence[dict], source: str) -> list[dict]:
    """Leaves out the columns that JSON cannot hold (timestamps, decimals, bytes) and that no task uses.

    Raises ValueError if the task uses such a column."""
    dropped: dict[str, str] = {}
    for row in rows:
        for column, value in row.items():
            if column not in dropped and not _fits_json(value):
                dropped[column] = type(value).__name__
    if unreadable := [f"{column} ({dropped[column]})" for column in spec.columns if column in dropped]:
        raise ValueError(f"{spec.name}: {source} has values that are no text in {', '.join(unreadable)}")
    if dropped:
        logger.warning("%s: left out, because JSON cannot hold them: %s", spec.name, ", ".join(dropped))
    return [{column: value for column, value in row.items() if column not in dropped} for row in rows]


def _fits_json(value: object) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    if isinstance(value, dict):
        return all(isinstance(key, str) and _fits_json(one) for key, one in value.items())
    return isinstance(value, list | tuple) and all(map(_fits_json, value))


def _from_mirror(spec: Task, mirror: Path, file: Path) -> Documents:
    checked = _verified(spec, mirror)
    if not checked.ok:
        raise ValueError(f"{checked.message}; bring it again with `jrt data fetch {spec.name}`")
    entry = _manifest(mirror)[spec.name]
    return Documents(read_lines(file), entry["source"], entry["sha256"])


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
    rows = from_hub(spec.name, str(spec.dataset), _how_to_get(spec), split=SPLIT).to_list()
    check_columns(spec, rows, source)
    rows = _as_json_holds(spec, rows, source)
    return Documents(rows, source, digest(rows))


def _how_to_get(spec: Task) -> str:
    return (
        f"With network, run `jrt data fetch {spec.name}` and set {FOLDER_VARIABLE} to that folder; without, bring a file "
        f"with the columns {', '.join(spec.columns)} and run `jrt data import {spec.name} FILE`"
    )


def _verified(spec: Task, mirror: Path) -> Checked:
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
    if not file.is_file():
        return {}
    manifest = _json_object(read_text(file), str(file))
    for name, entry in manifest.items():
        kinds = {field: type(entry.get(field)) for field in _ENTRY} if isinstance(entry, dict) else {}
        if kinds != _ENTRY:
            raise ValueError(
                f"{file} is damaged: expected {', '.join(_ENTRY)} in its entry {name!r}; remove it and bring the data again"
            )
    return manifest


def _write(file: Path, text: str) -> None:
    """Writes a file in one step, so that nobody reads a half-written one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(file)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
