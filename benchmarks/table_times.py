"""Estimates how long one H100 takes for the paper's tables, from the measured speeds of whole models.

    python benchmarks/table_times.py

For each model, question and strategy: the time to read the prompt and to decode an answer of 48 tokens, in batches of
16, from benchmarks/results/generation.json, and for each model the time to its first answer, from cold_start.json.
Models that were not measured count as the measured one of their family, times the ratio of parameters. Numbers of
questions and lengths are those of the paper's Table 7. Downloads are not in it.

SuperGLUE (Tables 8 and 9): each answer choice is read with its prompt, in batches of 16. Such a batch takes at least as
long as one prompt of 1,024 tokens alone, because starting the kernels takes that long. Figure 3: 3,200 sequences of
2,048 tokens are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

import record

BATCH, ANSWER, QUESTION = (
    16,
    48,
    30,
)  # prompts, or answer choices, of a batch; tokens of an answer; tokens of a prompt besides its document
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
SUPER_GLUE = {  # task: (examples of the validation set: SuperGLUE's Table 1; answer choices; tokens of an example: rough)
    "boolq": (3270, 2, 150),
    "cb": (57, 3, 90),
    "copa": (100, 2, 25),
    "multirc": (4848, 2, 330),
    "record": (10_000, 15, 280),  # an entity of the text is a choice: 15 is a guess
    "rte": (278, 2, 80),
    "wic": (638, 2, 40),
    "wsc": (104, 2, 50),
}
SHOTS = (0, 1, 5)
SEQUENCES, LENGTH = 3200, 2048  # of Figure 3


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


def _speeds() -> dict[str, tuple[float, float, float]]:
    """For each measured model, in ms: a token that is read in batches of 16, a token of an answer in such a batch, and
    the reading of one prompt of 1,024 tokens."""
    rows = json.loads((record.RESULTS / "generation.json").read_text())["rows"]
    found = {(row["method"], row["shape"]["B"]): row for row in rows if row["shape"]["N"] == 1024}
    return {
        method: (
            row["first_token_ms"] / (BATCH * 1024),
            row["ms_per_token"],
            found[method, 1]["first_token_ms"],
        )
        for (method, batch), row in found.items()
        if batch == BATCH
    }


def _opening_ms() -> float:
    return 1000 * json.loads((record.RESULTS / "cold_start.json").read_text())["rows"][0]["first_s"]


def minutes(models: list[Model], reads: list[Read]) -> float:
    """Minutes for all questions of these models. Two shots count as two more readings."""
    speeds, total = _speeds(), 0.0  # ms
    for model in models:
        read, step, _ = speeds[model.measured]
        total += _opening_ms()
        for task, window, readings in reads:
            questions, tokens = DOCUMENTS[task]
            prompt = readings * min(window, tokens) + QUESTION
            total += model.times * questions / BATCH * (BATCH * prompt * read + ANSWER * step)
    return total / 60_000


def minutes_of_super_glue(models: list[Model], tasks: Iterable[str]) -> float:
    """Minutes for all answer choices of the tasks with 0, 1 and 5 examples, each number in a run of its own."""
    speeds, total = _speeds(), 0.0  # ms
    for model in models:
        read, _, least = speeds[model.measured]
        for shots in SHOTS:
            total += _opening_ms()
            for questions, choices, tokens in (SUPER_GLUE[task] for task in tasks):
                batch = max(least, BATCH * (shots + 1) * tokens * read)
                total += model.times * questions * choices / BATCH * batch
    return total / 60_000


def minutes_of_figure3(models: list[Model]) -> float:
    """Minutes to read all sequences of Figure 3."""
    speeds = _speeds()
    return sum(_opening_ms() + SEQUENCES * LENGTH * speeds[model.measured][0] for model in models) / 60_000


def estimates() -> list[list[str]]:
    """Rows of table and minutes."""
    found = {f"{table}, {len(models)} models": minutes(models, reads) for table, (models, reads) in TABLES.items()}
    without_record = [task for task in SUPER_GLUE if task != "record"]
    found |= {
        "8, `super_glue_tables.sh`, 4 models of 360M": minutes_of_super_glue(FAMILIES, SUPER_GLUE),
        "9, `super_glue_tables.sh`, 4 models of 1.3B": minutes_of_super_glue(LARGE, without_record),
        "Figure 3, 4 models of 360M": minutes_of_figure3(FAMILIES),
    }
    return [[table, f"{value:.0f}"] for table, value in found.items()]


def compared() -> str:
    """The estimate beside the one measured time of this kind, that of benchmarks/eval_scaling.py on one GPU."""
    found = json.loads((record.RESULTS / "eval_scaling.json").read_text())
    alone, (read, step, _) = found["rows"][0], _speeds()["jrt-360m"]
    prompt = found["shape"]["T"] - ANSWER
    seconds = alone["items"] / BATCH * (BATCH * prompt * read + ANSWER * step) / 1000
    return f"{alone['items']:,} prompts of JRT-360M: {seconds:.0f} s estimated, {alone['seconds']:.1f} s measured"


if __name__ == "__main__":
    for row in estimates():
        print(*row, sep=": ")
    print(compared())
