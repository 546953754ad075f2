"""What each batching trick of `jrt eval` is worth: items a second with all tricks, with one left out, and with several left out.

    python benchmarks/batching_tricks.py --passages FOLDER --device cpu --json part.json
    python benchmarks/batching_tricks.py --merge part.json ...      # writes results/batching_tricks.json

All variants answer the same items with the same model in one process. They take turns for `--rounds` rounds, and the median of
a variant's rounds is its time. A variant that changes an answer in fp32 gets no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import record

from jrt.evaluate import LocalPool, ModelSpec, Request, decoding, plan, run
from jrt.evaluate.batching import Limits
from jrt.evaluate.shared_prefix import groups, groups_of_one

TASKS = {
    "recall_reference_pages_512": ("reference_pages", "pages-512"),
    "recall_reference_pages_2048": ("reference_pages", "pages-2048"),
    "qa_drop": ("qa_drop", None),
    "qa_squad": ("qa_squad", None),
    "qa_nq": ("qa_nq", None),
}
RUN = "jrt.evaluate.run"


def filled(rows: list[list[int]], limits: Limits) -> list[list[int]]:
    """Rows that begin alike side by side, longest first; a batch ends where the next row would go over a limit."""
    return _fill(rows, limits, groups(rows) if limits.shares else groups_of_one(rows), counts_shared=True)


def filled_by_length(rows: list[list[int]], limits: Limits) -> list[list[int]]:
    """As `filled`, but rows are sorted by length alone."""
    return _fill(rows, limits, groups_of_one(rows), counts_shared=False)


def filled_by_rectangle(rows: list[list[int]], limits: Limits) -> list[list[int]]:
    """As `filled`, but a batch costs its rows times its longest row, whatever they share."""
    return _fill(rows, limits, groups(rows) if limits.shares else groups_of_one(rows), counts_shared=False)


def _fill(rows: list[list[int]], limits: Limits, alike: list, counts_shared: bool) -> list[list[int]]:
    found: list[list[int]] = []
    longest = apart = rest = 0
    last = None
    for number, group in enumerate(alike):
        for index in group.rows:
            length = len(rows[index])
            if counts_shared and found and last == number:
                after = (max(longest, length), apart, rest + length - group.common)
            else:
                after = (max(longest, length), apart + 1, rest)
            over = found and (
                len(found[-1]) == limits.size
                or (limits.tokens is not None and after[1] * after[0] + after[2] > limits.tokens)
                or (limits.alone is not None and after[1] > 1 and after[0] > limits.alone)
            )
            if not found or over:
                found.append([])
                after = (length, 1, 0)
            found[-1].append(index)
            longest, apart, rest = after
            last = number
    return found


class NeverEarly(decoding.Pause):
    """A batch goes on until its last row has ended."""

    def __init__(self, tokens, forced, limits, early) -> None:
        super().__init__(tokens, forced, limits, early=False)


SEARCH = [(f"{RUN}.batches", filled)]
ALONE = [(f"{RUN}.CPU_ALONE", None)]
BUDGET = [(f"{RUN}.ON_CPU", Limits(size=16, overhead=1024))]
SHARING = [("jrt.evaluate.shared_prefix.read", lambda *_: None)]
PAUSE = [("jrt.evaluate.decoding.Pause", NeverEarly)]
WEIGHING = [("jrt.evaluate.shared_prefix.outweighs", lambda *_, **__: True)]
VARIANTS: dict[str, list[tuple[str, object]]] = {
    "all tricks": [],
    "no search for the best cuts": SEARCH,
    "no long prompts alone": ALONE,
    "no token budget": BUDGET,
    "no shared beginnings": SHARING,
    "no pause when half have ended": PAUSE,
    "no weighing of shared beginnings": WEIGHING,
    "no grouping of prompts that begin alike": [(f"{RUN}.batches", filled_by_length)],
    "no search, no long prompts alone": [*SEARCH, *ALONE],
    "no search, sharing not counted": [(f"{RUN}.batches", filled_by_rectangle)],
    "no search, no alone, sharing not counted": [(f"{RUN}.batches", filled_by_rectangle), *ALONE],
    "no search, no alone, budget 4096": [*SEARCH, *ALONE, (f"{RUN}.ON_CPU", Limits(size=16, tokens=4096))],
    "no search, no alone, budget 2048": [*SEARCH, *ALONE, (f"{RUN}.ON_CPU", Limits(size=16, tokens=2048))],
    "no search, no alone, no pause": [*SEARCH, *ALONE, *PAUSE],
    "no trick": [
        (f"{RUN}.batches", filled_by_length),
        *ALONE,
        *BUDGET,
        *SHARING,
        *PAUSE,
    ],
}
CPU_ONLY = ("alone", "budget", "pause")
GPU_ONLY = ("weighing",)


@contextmanager
def variant(changes: list[tuple[str, object]]) -> Iterator[None]:
    """The evaluation without some of its tricks."""
    with ExitStack() as stack:
        for name, value in changes:
            stack.enter_context(patch(name, value))
        yield


def measure(spec: ModelSpec, names: list[str], limit: int, rounds: int) -> Iterator[dict]:
    """A row for each task and variant."""
    pool = LocalPool()
    on_gpu = spec.device.startswith("cuda")
    skipped = CPU_ONLY if on_gpu else GPU_ONLY
    variants = {
        name: changes
        for name, changes in VARIANTS.items()
        if name == "no trick" or not any(word in name for word in skipped)
    }
    for name in names:
        task, protocol = TASKS[name]
        chosen = plan(Request((spec,), (task,), ("once",), protocol, limit))
        with tempfile.TemporaryDirectory() as folder:
            run(chosen, pool, Path(folder) / "warm-up")
        seconds: dict[str, list[float]] = {one: [] for one in variants}
        answers: dict[str, list[str]] = {}
        for turn in range(-1 if on_gpu else 0, rounds):  # on a GPU the first round warms up and does not count
            for one, changes in variants.items():
                with variant(changes), tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    outcome = run(chosen, pool, Path(folder) / "run")
                    elapsed = time.perf_counter() - start
                answers[one] = [row["prediction"] for row in outcome.predictions]
                if turn >= 0:
                    seconds[one].append(elapsed)
        full = seconds["all tricks"]
        for one, elapsed in seconds.items():
            ratio = statistics.median(own / base for own, base in zip(elapsed, full, strict=True))
            differing = sum(a != b for a, b in zip(answers[one], answers["all tricks"], strict=True))
            yield {
                "method": one,
                "shape": {"model": spec.name, "task": name, "items": len(answers[one])},
                "seconds": statistics.median(elapsed),
                "seconds_of_rounds": elapsed,
                "times_all_tricks": ratio,
                "differing_answers": differing,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mini-based", "mini-attention"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--passages", type=Path, help="folder of the qa_ tasks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.merge:
        parts = [json.loads(file.read_text()) for file in arguments.merge]
        rows = [{"device": part["device"], **row} for part in parts for row in part["rows"]]
        first = {key: parts[0][key] for key in ("versions", "commit", "date")}
        whole = {"benchmark": "batching_tricks", "commands": [part["command"] for part in parts], **first, "rows": rows}
        (record.RESULTS / "batching_tricks.json").write_text(json.dumps(whole, indent=1) + "\n")
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.passages is not None:
        os.environ["JRT_PASSAGES"] = str(arguments.passages)
    rows: list[dict] = []
    for model in arguments.models:
        for row in measure(ModelSpec(model, arguments.device), arguments.tasks, arguments.limit, arguments.rounds):
            rows.append(row)
            record.write("batching_tricks", rows, arguments.json, limit=arguments.limit, rounds=arguments.rounds)
            shape = row["shape"]
            print(
                f"{shape['model']:15}{shape['task']:29}{row['method']:44}{row['seconds']:7.2f} s "
                f"{row['times_all_tricks']:5.2f} x  {row['differing_answers']} differ",
                flush=True,
            )


if __name__ == "__main__":
    main()
