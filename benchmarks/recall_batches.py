"""Counts answers that change with the batch size: the same items in batches of 1, 8 and 32, in fp32 and in bf16.

    python benchmarks/recall_batches.py [--models mini-jrt FOLDER ...] [--limit 64] [--device cuda]

In fp32 no answer may change. The items are answered by `jrt eval` and by lm-eval's `hf` model class with the plugin.
Models of this project cannot be run by the `hf` class, so they are answered by `jrt eval` only.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import record
from jrt_recall import task_folder
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from recall_eval import LLAMA, write_llama

from jrt.evaluate import LocalPool, ModelSpec, Request, open_model, plan, run
from jrt.evaluate.demo import MINIS

BATCHES = (1, 8, 32)
TASK = "recall_reference_pages_512"


def ours(spec: ModelSpec, limit: int, size: int) -> dict[str, str]:
    """Returns the answers of `jrt eval`, by item."""
    chosen = plan(Request((spec,), (TASK,), ("once",), None, limit))
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(chosen, LocalPool(), Path(folder) / "run", size)
    return {row["id"]: row["prediction"] for row in outcome.predictions}


def theirs(spec: ModelSpec, limit: int, size: int) -> dict[str, str]:
    """Returns the answers of lm-eval's hf class, by item."""
    opened = open_model(spec)
    lm = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=size, backend="causal")
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False, metadata={"max_items": limit})
    found = evaluator.evaluate(lm, manager.load([TASK])["tasks"], log_samples=True, bootstrap_iters=0)
    return {sample["doc"]["id"]: sample["filtered_resps"][0] for sample in found["samples"][TASK]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*MINIS, LLAMA])
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            place = name
            if name == LLAMA:
                place = f"{folder}/{LLAMA}"
                write_llama(Path(place))
            for dtype in ("float32", "bfloat16"):
                spec = ModelSpec(place, arguments.device, dtype)
                ways = {"jrt eval": ours} if name in MINIS else {"jrt eval": ours, "lm-eval hf": theirs}
                for way, answers in ways.items():
                    found = {size: answers(spec, arguments.limit, size) for size in BATCHES}
                    differing = {size: sum(found[size][i] != text for i, text in found[1].items()) for size in BATCHES}
                    rows.append(
                        {
                            "method": way,
                            "shape": {"model": name, "dtype": dtype, "items": len(found[1])},
                            "differing_answers": {f"batch {size}": differing[size] for size in BATCHES[1:]},
                        }
                    )
                    print(way, rows[-1]["shape"], rows[-1]["differing_answers"], flush=True)
    print(record.write("recall_batches", rows, arguments.json, arguments.device, limit=arguments.limit))


if __name__ == "__main__":
    main()
