"""Generated documents with the exact columns of each published dataset, for tests and dry runs without the datasets.

A document is random prose in which a few sentences state made-up facts; one of them is asked. The same task and seed
give the same documents. The mirror (see `data`) records them as generated, so that a score on them cannot be mistaken
for one on the published data.
"""

import random
from pathlib import Path

from .data import store
from .files import canonical_lines
from .harness.super_glue import COLUMNS, SPLITS
from .protocols import PUBLISHED, published_task

SOURCE = "generated fixtures"
_SYLLABLES = ("ba", "del", "ki", "lor", "men", "na", "os", "per", "qui", "ros", "sta", "tul", "ver", "wen", "zo")
_PROSE = """
the old harbour opened before winter and its keeper wrote every ship into a long ledger while rain fell on the market
square where traders from distant valleys sold copper lanterns wool maps and small clocks to travellers
"""
_WORDS = _PROSE.split()
_ATTRIBUTES = ("director", "runtime", "publisher", "fuel economy", "purpose for submission", "applicant", "genre")
_ROLES = ("founder", "captain", "architect", "librarian", "engineer", "composer", "editor", "gardener")


def documents(task: str, count: int = 24, seed: int = 0, sentences: int = 40) -> list[dict]:
    """Returns `count` documents of a published task, each of about `sentences` sentences of 20 GPT-2 tokens."""
    name = published_task(task).name
    generator = random.Random(f"{name}/{seed}")
    rows = [_document(name, generator, sentences) for _ in range(count)]
    if name == "triviaqa":
        for number, row in enumerate(rows):
            row |= {"context": f"[DOC] [TLE] {row['context']} [PAR] ", "doc_id": f"doc-{number}"}
    return rows


def write(folder: str | Path, count: int = 24, seed: int = 0, sentences: int = 40) -> Path:
    """Writes generated documents for every published task to a mirror folder (see `data`), and returns the folder."""
    for task in PUBLISHED:
        store(task, documents(task, count, seed, sentences), f"{SOURCE} (seed {seed})", folder)
    return Path(folder)


def write_super_glue(folder: str | Path, count: int = 6, seed: int = 0) -> Path:
    """Writes generated documents for SuperGLUE's eight tasks to a mirror folder, and returns the folder.

    Each split gets `count` documents (see `harness.super_glue`)."""
    for configuration in COLUMNS:
        place = Path(folder) / "super_glue" / configuration
        place.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            generator = random.Random(f"{configuration}/{split}/{seed}")
            rows = [_super_glue_row(configuration, number, generator) for number in range(count)]
            (place / f"{split}.jsonl").write_text(canonical_lines(rows), encoding="utf-8", newline="\n")
    return Path(folder)


def _super_glue_row(configuration: str, number: int, generator: random.Random) -> dict:
    """A sentence in each column, where upstream's prompt needs nothing else."""
    row: dict = {column: _sentence(generator) for column in COLUMNS[configuration]}
    row |= {"idx": number, "label": number % (3 if configuration == "cb" else 2)}
    names = [_name(generator) for _ in range(3)]
    match configuration:
        case "copa":
            row["question"] = ("cause", "effect")[number % 2]
        case "record":
            highlights = f"@highlight\n{row['query']}\n@highlight\n{_sentence(generator)}"
            row["passage"] = f"{names[0]} met {names[1]}. {row['passage']}\n{highlights}"
            row |= {"query": "Later @placeholder left.", "entities": names, "answers": names[:1]}
        case "wic":
            row |= {"word": "clock", "sentence1": f"The clock {row['sentence1']}", "start1": 4, "end1": 9}
            row |= {"sentence2": f"A clock {row['sentence2']}", "start2": 2, "end2": 7}
        case "wsc.fixed":
            row |= {"span1_index": 0, "span1_text": names[0].split()[0], "span2_index": 3, "span2_text": "she"}
            row["text"] = f"{names[0]} said she {row['text'].lower()}"
    return row


def _name(generator: random.Random) -> str:
    return " ".join("".join(generator.choices(_SYLLABLES, k=generator.randint(2, 3))).capitalize() for _ in range(2))


def _sentence(generator: random.Random) -> str:
    words = generator.choices(_WORDS, k=generator.randint(12, 20))
    return " ".join(words).capitalize() + "."


def _prose(generator: random.Random, sentences: int, statements: list[str]) -> str:
    lines = [_sentence(generator) for _ in range(sentences)]
    for statement in statements:
        lines.insert(generator.randint(0, len(lines)), statement)
    return " ".join(lines)


def _document(name: str, generator: random.Random, sentences: int) -> dict:
    """One document of a published task. Four facts are stated in its prose, and the first of them is asked."""
    of_pages = name in ("swde", "fda")
    subjects = generator.sample(_ATTRIBUTES if of_pages else _ROLES, 4)
    answers = [_name(generator) for _ in subjects]
    form = "{}: {}." if of_pages else "The {} was {}."
    asked, answer = subjects[0], answers[0]
    shown = [subject.capitalize() for subject in subjects] if of_pages else subjects
    prose = _prose(generator, sentences, [form.format(*fact) for fact in zip(shown, answers, strict=True)])
    if of_pages:
        return {"text": f"{prose} {asked}:", "key": asked, "value": answer}
    cloze, question = f"The {asked} was", f"Who was the {asked}?"
    if name == "squad":
        return {"text": f"{prose}\n{cloze}", "context": prose, "question": question, "value": answer}
    return {"context": prose, "question": cloze, "orig_question": question, "answers": [answer, answer.split()[-1]]}
