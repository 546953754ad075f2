"""Estimates how long one H100 takes for the paper's tables, from the measured speeds of whole models.

    python benchmarks/table_times.py

For each model, question and strategy: the time to read the prompt and to decode an answer of 48 tokens, in batches of
16, from benchmarks/results/generation.json, and for each model the time to its first answer, from cold_start.json.
Models that were not measured count as the measured one of their family, times the ratio of parameters. Numbers of
questions and lengths are those of the paper's Table 7. Downloads are not in it.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import record

BATCH, ANSWER, QUESTION = 16, 48, 30  # prompts of a batch; tokens of an answer; tokens of a prompt besides its document
DOCUMENTS = {  # task: (questions, mean tokens of a document)
    "fda": (1102, 2000),
    "swde": (1111, 1036),
    "squad": (2984, 152),
    "triviaqa": (1698, 310),
    "drop": (2084, 237),
    "nq_512": (3157, 512),
    "nq_1024": (3157, 1024),
    "nq_2048": (3157, 2048),
}
QA = ("squad", "drop", "triviaqa")


class Model(NamedTuple):
    measured: str  # in generation.json
    times: float = 1.0  # parameters over those of the measured model


FAMILIES = [Model(f"{name}-360m") for name in ("jrt", "based", "mamba", "attention")]
LARGE = [Model("jrt-1.3b")] * 4
HF = [Model("jrt-1.3b", n) for n in (1.0, 2.1)]  # GLA
HF += [Model("mamba-360m", n / 0.36) for n in (0.13, 0.37, 1.4, 2.8, 0.13, 0.37, 1.3, 2.7)]
MAMBA = [Model("mamba-360m", n / 0.36) for n in (0.13, 0.37, 1.4, 2.8)]
Read = tuple[str, int, int]  # task, window in tokens, readings of the document


def _table1() -> list[Read]:
    return [(task, 1000, readings) for task in ("swde", "fda", "nq_1024", *QA) for readings in (1, 2)]


def _table2() -> list[Read]:
    windows = [(task, window, 1) for task in ("swde", "fda", *QA) for window in (512, 1024, 2048)]
    return windows + [(f"nq_{length}", 2000, 1) for length in (512, 1024, 2048)]


TABLES: dict[str, tuple[list[Model], list[Read]]] = {
    "1, `run_jrt_prompt_hazy.sh`": (LARGE[:3], _table1()),
    "1, `run_jrt_prompt_hf.sh`": (HF, _table1()),
    "2 and 3, `run_jrt_rnn.sh`": (FAMILIES + LARGE, _table2()),
    "4, `short_prompts.sh`": (
        [Model("jrt-360m"), Model("jrt-1.3b")],
        3 * [("fda", 512, 1), ("swde", 512, 1), ("nq_512", 2000, 1)],
    ),
    "13 and 14, `few_shot.sh`": (
        MAMBA,
        [(task, 1000, readings) for task in ("fda", "swde", "squad") for readings in (1, 2, 3)],
    ),
}


def minutes(models: list[Model], reads: list[Read]) -> float:
    """Minutes for all questions of these models. Two shots count as two more readings."""
    rows = json.loads((record.RESULTS / "generation.json").read_text())["rows"]
    speed = {
        row["method"]: (row["first_token_ms"] / (BATCH * row["shape"]["N"]), row["ms_per_token"])
        for row in rows
        if (row["shape"]["B"], row["shape"]["N"]) == (BATCH, 1024)
    }
    opening = json.loads((record.RESULTS / "cold_start.json").read_text())["rows"][0]["first_s"]
    total = 0.0
    for model in models:
        read_ms, step_ms = speed[model.measured]
        total += opening
        for task, window, readings in reads:
            questions, tokens = DOCUMENTS[task]
            prompt = readings * min(window, tokens) + QUESTION
            total += model.times * questions / BATCH * (BATCH * prompt * read_ms + ANSWER * step_ms) / 1000
    return total / 60


def estimates() -> list[list[str]]:
    """Rows of table and minutes."""
    return [
        [f"{table}, {len(models)} models", f"{minutes(models, reads):.0f}"] for table, (models, reads) in TABLES.items()
    ]


if __name__ == "__main__":
    for row in estimates():
        print(*row, sep=": ")
