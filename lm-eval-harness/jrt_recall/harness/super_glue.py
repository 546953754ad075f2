"""Documents of SuperGLUE for lm-eval's own tasks: from a local folder if it holds them, else from the Hugging Face hub.

"Upstream" here means lm-eval. Its SuperGLUE tasks can read their data only from the hub. The group `recall_super_glue`
runs the same tasks with `documents` below as their `custom_dataset`, a hook of lm-eval, so prompts, choices and metrics
stay upstream's. In the local folder (the mirror, see `jrt_recall.data`), `super_glue/CONFIGURATION/SPLIT.jsonl` holds a
split.

One task has its own file. Upstream's `record` imports SQuAD metrics that transformers 5 no longer has, so it cannot be
loaded. `recall_record` is the same task with the functions below.
"""

import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

from ..data import from_hub, mirror_folder
from ..files import read_lines

DATASET = "aps/super_glue"
COLUMNS = {
    "boolq": ("question", "passage", "label"),
    "cb": ("premise", "hypothesis", "label"),
    "copa": ("premise", "choice1", "choice2", "question", "label"),
    "multirc": ("paragraph", "question", "answer", "label"),
    "record": ("passage", "query", "entities", "answers"),
    "rte": ("premise", "hypothesis", "label"),
    "wic": ("sentence1", "sentence2", "start1", "end1", "label"),
    "wsc.fixed": ("text", "span1_text", "span2_index", "span2_text", "label"),
}
"""The dataset configuration of each of the eight tasks, and the columns of it that upstream's prompts use."""
SPLITS = ("train", "validation")
TASKS = {name: {"record": "recall_record", "rte": "sglue_rte", "wsc.fixed": "wsc"}.get(name, name) for name in COLUMNS}
"""Task name by configuration. All are upstream's names except `recall_record`."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def documents(configuration: str, data: str | Path | None = None, **metadata: Any) -> dict[str, Any]:
    """lm-eval's `custom_dataset`: both splits of a configuration. data: mirror folder, else the one JRT_DATA names.

    Raises MissingDataset where they are neither there nor on the hub, ValueError for a missing column."""
    from datasets import Dataset

    if configuration not in COLUMNS:
        raise ValueError(f"unknown configuration {configuration!r}: choose one of {', '.join(COLUMNS)}")
    mirror = mirror_folder(data)
    folder = None if mirror is None else mirror / "super_glue" / configuration
    if folder is None or not folder.is_dir():
        place = f"$JRT_DATA/super_glue/{configuration}/train.jsonl and validation.jsonl"
        found = from_hub(configuration, DATASET, f"Without network, put its splits at {place}", name=configuration)
    else:
        found = {split: Dataset.from_list(read_lines(folder / f"{split}.jsonl")) for split in SPLITS}
    for split in SPLITS:
        if missing := [column for column in COLUMNS[configuration] if column not in found[split].column_names]:
            raise ValueError(f"{configuration}: the {split} split lacks {', '.join(missing)}")
    return found


# recall_record: a passage with its highlights, and a query whose placeholder takes the entity


def record_documents(dataset: Any) -> Any:
    """lm-eval's hook `process_docs`: removes repeated entities and answers, and sorts them."""
    return dataset.map(
        lambda doc: {"entities": sorted(set(doc["entities"])), "answers": sorted(set(doc["answers"]))},
    )


def record_text(doc: dict) -> str:
    """The passage, an empty line, and each highlight as a bullet."""
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{passage}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def record_choices(doc: dict) -> list[str]:
    """The choices: the query as a bullet, its placeholder filled with each entity in turn."""
    return [_record_answer(doc, entity) for entity in doc["entities"]]


def record_target(doc: dict) -> str:
    """The choice that is filled with the first answer."""
    return _record_answer(doc, doc["answers"][0])


def record_score(doc: dict, results: list[tuple[float, bool]]) -> dict:
    """lm-eval's hook `process_results`: token F1 and exact match of the likeliest entity, each with the best answer.

    results: (log-likelihood, is greedy) of each choice."""
    likelihoods = [likelihood for likelihood, _ in results]
    chosen = _words(doc["entities"][likelihoods.index(max(likelihoods))])
    answers = [_words(answer) for answer in doc["answers"]]
    return {"f1": max(_f1(chosen, answer) for answer in answers), "em": float(chosen in answers)}


def _record_answer(doc: dict, entity: str) -> str:
    return f"  - {doc['query']}".replace("@placeholder", entity)


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles, as SQuAD's metric compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(first: list[str], second: list[str]) -> float:
    if not first or not second:
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second))
