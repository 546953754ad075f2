"""Measures `jrt eval` on several GPUs: items per second with 1, 2 and 4 Ray workers, and with one of them killed.

    python benchmarks/eval_scaling.py --device cuda --dtype bfloat16         # JRT-360M with random weights, 2,000 items
    python benchmarks/eval_scaling.py --workers 1 2 --model mini-jrt --items 24 --batch 2 --window 512     # on a CPU

The documents are generated (`jrt_recall.fixtures`) and cut to the window; an answer has at most 48 tokens.
The command is run as users type it: first without Ray on one device, then with each number of workers, and once more
with the largest number, while one worker's process is killed after a third of the answers. All runs must give the same
predictions and results. The time counts from the moment when every worker has answered once to the last answer
(`jrt.evaluate.workers.Throughput`), so starting Ray and opening the models is left out; `seconds_of_command` has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import record
import torch
from jrt_recall import data, fixtures
from jrt_recall.tokenizers import shipped_tokenizer

from jrt import JRTConfig, JRTForCausalLM, presets
from jrt.checkpoints.names import shipped

TASK, ROOM = "drop", 48  # the task whose documents are cut at their end, and the tokens of a window left for the answer
TOKENS = 29  # fewer than the shipped tokenizer gives to any document's sentences on average
WORKER = "ray::Worker"  # Ray names a process after its actor class
REPLACED = "another takes its place"  # what a run says when it replaces a worker


def write_random_model(preset: str, folder: Path, dtype: torch.dtype) -> None:
    """Saves a model of a preset's size with random weights and the shipped tokenizer."""
    torch.manual_seed(0)
    model = JRTForCausalLM(JRTConfig(architecture=presets()[preset].to_dict()))
    model.to(dtype).save_pretrained(folder)
    shipped_tokenizer().save_pretrained(folder)


def command(model: str, folder: Path, output: Path, workers: int | None, options: argparse.Namespace) -> list[str]:
    found = [sys.executable, "-m", "jrt", "eval", "--model", model, "--tasks", TASK, "--data", str(folder)]
    found += ["--protocol", f"w{options.window}-a{ROOM}", "--cut-with", "shipped", "--output", str(output)]
    found += ["--device", options.device, "--dtype", options.dtype, "--batch-size", str(options.batch)]
    return found if workers is None else [*found, "--workers", str(workers)]


def measured(
    model: str, folder: Path, output: Path, workers: int | None, kill: bool, options: argparse.Namespace
) -> dict:
    """Runs the command once, and returns the row of the results.

    Raises:
        SystemExit: the command failed, or no worker was killed. The message has its output.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        run = subprocess.Popen(command(model, folder, output, workers, options), stdout=log, stderr=subprocess.STDOUT)
        if kill:
            kill_a_worker(run, output / "predictions.jsonl", options.items // 3)
        code = run.wait()
        log.seek(0)
        told = log.read()
    if code or (REPLACED in told) != kill:
        raise SystemExit(f"workers {workers}, kill {kill}: exit code {code}\n{told[-4000:]}")
    throughput = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["throughput"]
    return {
        "method": "this process" if workers is None else "ray",
        "workers": throughput["workers"],
        "killed": kill,
        "items": throughput["items"],
        "seconds": round(throughput["seconds"], 3),
        "items_per_s": round(throughput["items"] / throughput["seconds"], 2) if throughput["items"] else None,
        "seconds_of_command": round(time.monotonic() - start, 1),
    }


def kill_a_worker(run: subprocess.Popen, predictions: Path, after: int) -> None:
    """Kills one worker of a run (SIGKILL) when `after` items are answered; does nothing if the run ends before."""
    while run.poll() is None:
        if predictions.is_file() and predictions.read_bytes().count(b"\n") >= after:
            with suppress(psutil.NoSuchProcess):  # one that ended since it was listed
                children = psutil.Process(run.pid).children(recursive=True)
                workers = [child for child in children if (child.cmdline() or [""])[0].startswith(WORKER)]
                if workers:
                    workers[-1].kill()
                    return
        time.sleep(0.05)


def answers(output: Path) -> tuple[list[dict], list[dict]]:
    """Returns a run's predictions and results without their seconds."""
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    predictions, records = ([{**row, "seconds": 0} for row in rows] for rows in (map(json.loads, lines), results))
    return predictions, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="jrt-360m", help="a preset (random weights), or any model of `jrt eval`")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a document")
    parser.add_argument("--batch", type=int, default=50, help="items of a batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    most = max(options.workers)
    if most < 2:
        parser.error("expected at least 2 workers, because one is killed")
    if options.items < 6 * most * options.batch:
        parser.error(f"expected at least {6 * most * options.batch} items: six batches for each of {most} workers")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = options.model
        if model in presets() and model not in shipped():
            write_random_model(model, folder / model, getattr(torch, options.dtype))
            model = str(folder / model)
        documents = fixtures.documents(TASK, options.items, sentences=options.window // TOKENS)
        data.store(TASK, documents, fixtures.SOURCE, folder)
        runs = [(None, False), *((workers, False) for workers in sorted(options.workers)), (most, True)]
        for number, (workers, kill) in enumerate(runs):
            output = folder / f"run-{number}"
            row = measured(model, folder, output, workers, kill, options)
            found = answers(output)
            if not rows:
                expected = found
            base = rows[0]["items_per_s"] if rows else row["items_per_s"]
            row["speedup"] = round(row["items_per_s"] / base, 3) if base and row["items_per_s"] else None
            row["equal"] = found == expected
            rows.append(row)
            print(row, flush=True)
            distinct = len({one["prediction"] for one in expected[0]})
            path = record.write(
                "eval_scaling",
                rows,
                options.output,
                options.device,
                model=options.model,
                shape={"B": options.batch, "T": options.window, "items": options.items, "dtype": options.dtype},
                distinct_predictions=distinct,
            )
    print(path)


if __name__ == "__main__":
    main()
