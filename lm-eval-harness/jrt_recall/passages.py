"""`qa_*` tasks: real passages with real questions from a local folder, in the shape of the published documents.

The folder holds `squad.jsonl`, `nq.jsonl`, `triviaqa.jsonl`, `drop.jsonl` (context, question, answers) and
`fda.jsonl` (text, attributes), and is named by an argument or by the environment variable JRT_PASSAGES. The published
datasets carry cloze statements instead of questions, so these results never stand beside published values.
"""

import os
from pathlib import Path

from .data import Documents, MissingDataset, digest, read_lines

FOLDER_VARIABLE = "JRT_PASSAGES"
TASKS = {"qa_squad": "squad", "qa_nq": "squad", "qa_triviaqa": "squad", "qa_drop": "squad", "qa_fda": "fda"}
"""Each task and the published task whose prompts and cutting rule it takes."""


def load(task: str, folder: str | Path | None = None) -> Documents:
    """Documents of a `qa_*` task: squad's columns, or fda's with one item per attribute.

    Raises MissingDataset where the folder or its file is absent, ValueError where a line lacks a field."""
    chosen = folder if folder is not None else os.environ.get(FOLDER_VARIABLE)
    file = Path(chosen).expanduser() / f"{task.removeprefix('qa_')}.jsonl" if chosen else None
    if file is None or not file.is_file():
        raise MissingDataset(
            f"{task}: {'no folder of passages' if file is None else f'{file} is absent'}; set {FOLDER_VARIABLE} to a "
            f"folder with {task.removeprefix('qa_')}.jsonl"
        )
    lines = read_lines(file)
    rows = []
    for number, line in enumerate(lines):
        needed = ("text", "attributes") if TASKS[task] == "fda" else ("context", "question", "answers")
        if missing := [field for field in needed if field not in line]:
            raise ValueError(f"{task}: line {number + 1} of {file} lacks {', '.join(missing)}")
        rows.extend(_attribute_items(line, number) if TASKS[task] == "fda" else [_question_item(line, number)])
    return Documents(rows, f"passages {file.name}", digest(lines))


def _question_item(line: dict, number: int) -> dict:
    return {
        "id": str(line.get("id", number)),
        "text": f"{line['context']}\nQuestion: {line['question']}\nAnswer:",
        "context": line["context"],
        "question": line["question"],
        "value": line["answers"][0] if line["answers"] else "",
    }


def _attribute_items(line: dict, number: int) -> list[dict]:
    document = str(line.get("doc_id", number))
    return [
        {"id": f"{document}/{key}", "text": line["text"], "key": key, "value": value}
        for key, value in line["attributes"].items()
    ]
