"""Measures items per second of `jrt eval` and of plain lm-eval with the same model, questions and machine.

    python benchmarks/recall_eval.py --passages FOLDER [--device cuda --dtype bfloat16] [--limit 128]

lm-eval runs its own `hf` model class on the plugin's tasks, with batch sizes 1 (the usual choice), 16, and on a GPU
also `auto`. All run in one process. Each first answers one warm-up task; then they take turns for `--rounds` rounds,
and the median of the rounds is reported. On a GPU each task has one round more, which is not timed: kernels are
compiled in it for the shapes of its batches. Only the evaluation is timed, not opening the model and the data. In fp32 at
most 1% of the answers may differ (because two logits are nearly equal), else no figure is written. In lower precision
their number is reported.

The models are the mini models, and `llama-135m`, a Llama of SmolLM2-135M's sizes with random weights. Its answers
seldom have a line end, so it decodes all its tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch
from jrt_recall import task_folder
from jrt_recall.tokenizers import shipped_tokenizer
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM

from jrt.evaluate import LocalPool, ModelSpec, Request, open_model, plan, run

LLAMA = "llama-135m"
TASKS = ("recall_reference_pages_512", "recall_reference_pages_2048", "qa_drop", "qa_squad", "qa_nq")
WARM_UP = "recall_reference_pages_512"
DIFFERING = 0.01  # of the answers, at most, in fp32


def write_llama(folder: Path) -> None:
    """A Llama of SmolLM2-135M's sizes with random weights and the shipped tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)


def lm_eval_answers(lm: HFLM, name: str, limit: int) -> tuple[float, dict[str, str]]:
    """Seconds, and the answers by item."""
    manager = TaskManager(
        include_path=str(task_folder()), include_defaults=False, metadata={"max_items": limit, "pretrained": ""}
    )
    tasks = manager.load([name])["tasks"]
    start = time.perf_counter()
    found = evaluator.evaluate(lm, tasks, log_samples=True)
    seconds = time.perf_counter() - start
    (samples,) = found["samples"].values()
    return seconds, {sample["doc"]["id"]: sample["filtered_resps"][0] for sample in samples}


def jrt_answers(pool: LocalPool, spec: ModelSpec, name: str, limit: int) -> tuple[float, dict[str, str]]:
    """Seconds, and the answers by item."""
    chosen = plan(Request((spec,), (name,), ("once",), None, limit))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outcome = run(chosen, pool, Path(folder) / "run")
        seconds = time.perf_counter() - start
    return seconds, {row["id"]: row["prediction"] for row in outcome.predictions}


def measure(
    spec: ModelSpec, label: str, names: list[str], limit: int, ways: list[int | str], rounds: int
) -> list[dict]:
    opened = open_model(spec)
    pool = LocalPool()
    pool._model = opened  # one copy of the weights serves all ways

    def lm_eval_way(size: int | str) -> Callable[[str, int], tuple[float, dict[str, str]]]:
        def answers(name: str, count: int) -> tuple[float, dict[str, str]]:
            lm = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=size, backend="causal")
            return lm_eval_answers(lm, name, count)

        return answers

    runners = {"jrt eval": lambda name, count: jrt_answers(pool, spec, name, count)}
    runners |= {f"lm-eval, batch {size}": lm_eval_way(size) for size in ways}
    rows = []
    for runner in runners.values():
        runner(WARM_UP, 4)
    for name in names:
        answers: dict[str, dict[str, str]] = {}
        rounds_of: dict[str, list[float]] = {way: [] for way in runners}
        untimed = 1 if spec.device.startswith("cuda") else 0
        for turn in range(untimed + rounds):
            for way, runner in runners.items():
                torch.cuda.empty_cache()
                elapsed, answers[way] = runner(name, limit)
                if turn >= untimed:
                    rounds_of[way].append(elapsed)
        seconds = {way: statistics.median(elapsed) for way, elapsed in rounds_of.items()}
        ours = answers["jrt eval"]
        for way, theirs in answers.items():
            differing = sum(theirs[item].strip() != text.strip() for item, text in ours.items())
            row = {
                "method": way,
                "shape": {"model": label, "task": name, "items": len(ours), "dtype": spec.dtype or "float32"},
                "items_per_second": len(ours) / seconds[way],
                "seconds": seconds[way],
                "seconds_of_rounds": rounds_of[way],
                "speedup_of_jrt_eval": seconds[way] / seconds["jrt eval"],
                "differing_answers": differing,
                "differing_bound": None if spec.dtype else DIFFERING * len(ours),
                "reason": "",
            }
            if differing > DIFFERING * len(ours) and not spec.dtype:
                row |= {"items_per_second": None, "reason": f"{differing} answers differ in fp32"}
            rows.append(row)
            print(
                f"{label:16}{name:30}{way:20}{row['items_per_second'] or 0:8.2f} items/s  {seconds[way]:7.1f} s"
                f"  jrt eval {row['speedup_of_jrt_eval']:5.2f} x  {differing} of {len(ours)} answers differ",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mini-based", "mini-attention", LLAMA])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--limit", type=int, default=128, help="items a task")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way; the median counts")
    parser.add_argument("--batches", nargs="+", help="of lm-eval (default: 1 16, and auto on a GPU)")
    parser.add_argument("--passages", type=Path, help="folder of the qa_ tasks; none: those are left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="bfloat16 ... (default: float32)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = arguments.tasks
    if arguments.passages is None:
        names = [name for name in names if not name.startswith("qa_")]
    else:
        os.environ["JRT_PASSAGES"] = str(arguments.passages)
    on_gpu = arguments.device.startswith("cuda")
    ways = [int(way) if way.isdigit() else way for way in arguments.batches or ["1", "16", *["auto"] * on_gpu]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            place = model
            if model == LLAMA:
                place = f"{folder}/{LLAMA}"
                write_llama(Path(place))
            spec = ModelSpec(place, arguments.device, arguments.dtype)
            rows += measure(spec, model, names, arguments.limit, ways, arguments.rounds)
            path = record.write(
                "recall_eval", rows, arguments.json, arguments.device, limit=arguments.limit, rounds=arguments.rounds
            )
    print(path)


if __name__ == "__main__":
    main()
