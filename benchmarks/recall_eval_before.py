"""Compares the time of `jrt eval` here with that of an older commit, on the same machine and questions.

    git worktree add ../before COMMIT
    python benchmarks/recall_eval_before.py ../before --passages FOLDER [--models mini-based mini-attention]

Both commits run in a process of their own, with two threads, and answer each task in turns for `--rounds` rounds; the
median counts. Opening the model and the data is not timed. Answers are compared: they are counted where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("recall_reference_pages_512", "recall_reference_pages_2048", "qa_drop", "qa_squad", "qa_nq")
THREADS = "2"


def serve(tree: str) -> None:
    """Answers requests (a JSON line each: model, task, limit) with seconds and predictions, until the input ends."""
    sys.path[:0] = [tree, f"{tree}/lm-eval-harness"]
    results, sys.stdout = sys.stdout, sys.stderr  # whatever is printed meanwhile
    from jrt import evaluate

    # Older commits have other names.
    opening = evaluate.open_model if hasattr(evaluate, "open_model") else evaluate.open_subject
    pools: dict[str, Any] = {}
    for line in sys.stdin:
        model, task, limit = json.loads(line)
        spec = evaluate.ModelSpec(model, "cpu", None)
        if model not in pools:
            pools[model] = evaluate.LocalPool()
            pools[model]._model = pools[model]._subject = opening(spec)
        name, protocol = task, None
        if not hasattr(evaluate, "open_model") and task.startswith("recall_reference_pages_"):
            name, protocol = "reference_pages", f"pages-{task.rpartition('_')[2]}"
        plan = evaluate.plan(evaluate.Request((spec,), (name,), ("once",), protocol, limit))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            outcome = evaluate.run(plan, pools[model], Path(folder) / "run")
            seconds = time.perf_counter() - start
        print(json.dumps([seconds, [row["prediction"] for row in outcome.predictions]]), file=results, flush=True)


class Side:
    """A process with the code of one commit."""

    def __init__(self, tree: Path, passages: Path) -> None:
        environment = os.environ | {"JRT_PASSAGES": str(passages.resolve()), "OMP_NUM_THREADS": THREADS}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(tree), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=tree,
        )

    def answer(self, model: str, task: str, limit: int) -> tuple[float, list[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        time.sleep(0.5)  # the other side's threads fall asleep
        print(json.dumps([model, task, limit]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.process.args} ended with {self.process.wait()}")
        seconds, predictions = json.loads(line)
        return seconds, predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of the older commit")
    parser.add_argument("--passages", type=Path, help="folder of the qa_ tasks")
    parser.add_argument("--models", nargs="+", default=["mini-based", "mini-attention"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--limit", type=int, default=64, help="items a task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(str(arguments.before.resolve()))
        return
    if arguments.passages is None:
        parser.error("the qa_ tasks need --passages FOLDER")
    commit = subprocess.run(
        ["git", "-C", arguments.before, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    sides = {"before": Side(arguments.before.resolve(), arguments.passages), "now": Side(ROOT, arguments.passages)}
    import record  # imports jrt, which `serve` has to find in its own tree

    rows = []
    for model in arguments.models:
        for side in sides.values():
            side.answer(model, TASKS[0], 4)
        for task in arguments.tasks:
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            answers: dict[str, list[str]] = {}
            for _ in range(arguments.rounds):
                for name, side in sides.items():
                    elapsed, answers[name] = side.answer(model, task, arguments.limit)
                    seconds[name].append(elapsed)
            before, now = (statistics.median(seconds[name]) for name in ("before", "now"))
            differing = sum(one != other for one, other in zip(answers["before"], answers["now"], strict=False))
            rows.append(
                {"model": model, "task": task, "seconds": now, "seconds_before": before, "times_before": now / before}
                | {"rounds": seconds, "items": len(answers["now"]), "differing_answers": differing}
            )
            record.write(
                "recall_eval_before", rows, arguments.output, "cpu", commit_before=commit, limit=arguments.limit
            )
            print(f"{model:16}{task:30}{before:7.2f} s, now {now:7.2f} s: {now / before:.2f} x, {differing} differ")


if __name__ == "__main__":
    main()
