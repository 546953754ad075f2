"""The published recall tasks: where each dataset lies and which columns its prompts and its scoring read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTask:
    """One published task.

    context: the column that is cut around the answer; answer_keys: the columns whose value locates the answer there
    (none: the window is the document's beginning); labels: the column that holds what a right generation contains."""

    name: str
    dataset: str
    columns: tuple[str, ...]
    context: str
    answer_keys: tuple[str, ...]
    labels: str
    split: str = "validation"


_CLOZE = ("context", "question", "orig_question", "answers")


def _cloze(name: str, dataset: str, answer_keys: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> PublishedTask:
    return PublishedTask(name, dataset, _CLOZE + more, "context", answer_keys, "answers")


_TASKS = (
    PublishedTask("swde", "hazyresearch/based-swde-v2", ("text", "key", "value"), "text", ("key", "value"), "value"),
    PublishedTask("fda", "hazyresearch/based-fda", ("text", "key", "value"), "text", ("key", "value"), "value"),
    PublishedTask(
        "squad", "hazyresearch/based-squad", ("text", "context", "question", "value"), "text", ("value",), "value"
    ),
    _cloze("drop", "hazyresearch/based_drop"),
    _cloze("nq_512", "hazyresearch/based_nq_512", ("answers",)),
    _cloze("nq_1024", "hazyresearch/based_nq_1024", ("answers",)),
    _cloze("nq_2048", "hazyresearch/based_nq_2048", ("answers",)),
    _cloze("triviaqa", "hazyresearch/based_triviaqa", more=("doc_id",)),
)
PUBLISHED = {task.name: task for task in _TASKS}
"""The published tasks by their bare names (lm-eval knows them as `recall_NAME`)."""


def published_task(name: str) -> PublishedTask:
    """The published task of that bare name; `nq` stands for any of the three NQ sizes, which share their rules.

    Raises ValueError for any other name."""
    task = PUBLISHED.get("nq_1024" if name == "nq" else name)
    if task is None:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(PUBLISHED)}")
    return task


def text_field(task: str, doc: dict, field: str) -> str:
    """doc[field], a string. Raises ValueError that names the task and the field if it is missing or no string."""
    if field not in doc:
        raise ValueError(f"{task}: the document has no field {field!r} (it has {', '.join(map(str, doc)) or 'none'})")
    value = doc[field]
    if not isinstance(value, str):
        raise ValueError(f"{task}: field {field!r} must be a string, got {type(value).__name__}")
    return value


def answers_of(task: str, doc: dict) -> list[str]:
    """What a right generation contains: [value] for swde, fda and squad, else the list `answers` (may be empty)."""
    field = published_task(task).labels
    if field == "value":
        return [text_field(task, doc, field)]
    if field not in doc:
        raise ValueError(f"{task}: the document has no field {field!r} (it has {', '.join(map(str, doc)) or 'none'})")
    answers = doc[field]
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{task}: field {field!r} must be a list of strings, got {answers!r:.80}")
    return list(answers)
