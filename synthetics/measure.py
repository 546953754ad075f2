"""Measures how fast examples are drawn and models are trained: ``python -m synthetics.measure --out FILE``.

The data part draws the examples of the paper's task in two ways: with the released code's loop, and as whole tensors.
The training part times steps of some stacks of the `figure2` sweep at every length they train on, with recorded CUDA
graphs (as in the sweep) and without. From these speeds it estimates how long the whole sweep would take if no model
ended early.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from jrt.system.provenance import command
from synthetics import sweeps
from synthetics.data import generator
from synthetics.folder import provenance
from synthetics.graphs import FIRST
from synthetics.permutations import draw_distinct
from synthetics.released import disjoint_sets
from synthetics.runs import HEADS, Run, groups
from synthetics.set_disjointness import SetDisjointness, draw_pair
from synthetics.tasks import TASKS
from synthetics.training import Segment, Training
from synthetics.workers import check_device

LOOP_EXAMPLES = 300  # examples of each pair that the released loop draws
FEWEST = 4  # least number of timed steps of each length
WAYS = ("recorded", "launched")  # with CUDA graphs, as in the sweep; without


def seconds(function: Callable[[], object], times: int, device: torch.device) -> float:
    """Returns the seconds of one call, the mean of `times` calls after one warm-up call."""
    function()
    start = clock(device)
    for _ in range(times):
        function()
    return (clock(device) - start) / times


def clock(device: torch.device) -> float:
    """Returns a time in seconds.

    On a CPU it is the processor time of all threads of this process. On a GPU it is wall-clock time after all work is
    done.
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def data(task: SetDisjointness, device: torch.device) -> dict:
    """Measures how many seconds the task's training examples take, with the released loop and as whole tensors."""
    loop = whole = 0.0
    pairs = []
    for pair in task.train:
        start = clock(torch.device("cpu"))
        disjoint_sets(task.vocab_size, LOOP_EXAMPLES, *pair, seed=1)
        one = (clock(torch.device("cpu")) - start) / LOOP_EXAMPLES
        all_at_once = seconds(
            lambda pair=pair: draw_pair(task.vocab_size, task.train_examples, pair, generator(1), device), 3, device
        )
        loop, whole = loop + one * task.train_examples, whole + all_at_once
        pairs.append({"pair": pair, "loop_us": 1e6 * one, "tensors_us": 1e6 * all_at_once / task.train_examples})
    return {"task": task.name, "loop_seconds": loop, "tensor_seconds": whole, "speedup": loop / whole, "pairs": pairs}


def training(runs: list[Run], deadline: float, device: torch.device) -> dict:
    """Measures milliseconds of a step of one stack at each length, seconds of a test, and seconds of an epoch."""
    stack = Training(runs, device)
    lengths: dict[int, list[Segment]] = {}
    for segment in stack.train:
        lengths.setdefault(segment.tokens.shape[2], []).append(segment)
    rows, epoch = [], dict.fromkeys(WAYS, 0.0)
    for length, segments in lengths.items():
        batch = segments[0].batch(stack.places, slice(0, stack.batch))
        steps = sum(len(range(0, each.tokens.shape[1], stack.batch)) for each in segments)
        row: dict[str, float] = {"tokens": length}
        for way in WAYS:
            call = partial(stack.steps, stack.step) if way == "recorded" else stack.step
            times = FEWEST if time.monotonic() > deadline or device.type == "cpu" else 5 * FEWEST
            for _ in range(FIRST + 1):
                call(*batch)
            row[f"{way}_ms"] = 1e3 * seconds(lambda call=call, batch=batch: call(*batch), times, device)
            epoch[way] += row[f"{way}_ms"] / 1e3 * steps
        rows.append(row)
    test = seconds(stack.test_accuracy, 1, device)
    first = runs[0]
    tokens = sum(each.tokens[0].numel() for each in stack.train) * len(runs)
    return {
        "method": first.method.name,
        "width": first.width,
        "feature_dim": first.shape.feature_dim,
        "models": len(runs),
        "lengths": rows,
        "epoch_seconds": epoch,
        "test_seconds": test,
        "model_tokens_per_second": {way: tokens / value for way, value in epoch.items()},
        "gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def widest_and_narrowest(method: str) -> list[list[Run]]:
    """Returns a method's stacks of the largest and of the smallest width in `figure2`."""
    own = [group for group in groups(sweeps.figure2) if group[0].method.name == method]
    widths = {group[0].width for group in own}
    return [group for group in own if group[0].width in (max(widths), min(widths))]


def figure2_minutes(measured: list[dict]) -> dict[str, float]:
    """Estimates the minutes that all stacks of `figure2` would take, by method.

    Time is taken to be linear in the size of a batch's activations.

    Args:
        measured: results of `training`. A method needs at least two of different sizes.
    """
    total: dict[str, float] = {}
    for method in {row["method"] for row in measured}:
        own = [row for row in measured if row["method"] == method]
        sizes = [_numbers(row["models"], row["width"], row["feature_dim"]) for row in own]
        if len(set(sizes)) < 2:
            continue
        seconds = [row["epoch_seconds"]["recorded"] + row["test_seconds"] for row in own]
        slope, start = np.polyfit(sizes, seconds, 1)
        stacks = [group for group in groups(sweeps.figure2) if group[0].method.name == method]
        total[method] = sum(
            group[0].epochs * (start + slope * _numbers(len(group), group[0].width, group[0].shape.feature_dim)) / 60
            for group in stacks
        )
    return total


def _numbers(models: int, width: int, feature_dim: int) -> int:
    """Numbers that one token takes in all models: residual stream, queries and keys."""
    return models * (width + 2 * HEADS * feature_dim)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m synthetics.measure", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4, help="about how long to measure training; 0: data only")
    methods = list(dict.fromkeys(run.method.name for run in sweeps.figure2))
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    options = parser.parse_args()
    try:
        check_device(options.device, workers=1)
        if not options.minutes >= 0:
            raise ValueError(f"--minutes {options.minutes:g}: expected at least 0")
        if options.out.is_dir():
            raise ValueError(f"--out {options.out}: expected a file, and this is a folder")
        options.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of work
    except (ValueError, OSError) as error:
        parser.error(str(error))
    device = torch.device(options.device)
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)  # a CPU's figures are those of one thread
    task = TASKS["paper"]
    assert isinstance(task, SetDisjointness)
    draw_distinct(8, 8, 0, 2048, generator(1), device)  # sets the device up
    report = {"command": command("-m", "synthetics.measure", *sys.argv[1:]), **provenance(options.device)}
    report["data"] = data(task, device)
    print(f"data: {report['data']['speedup']:.0f} x the released loop", flush=True)
    report["training"] = []
    stacks = [group for name in options.methods for group in widest_and_narrowest(name)]
    for runs in stacks if options.minutes > 0 else ():
        if time.monotonic() > deadline:
            print(f"time is over before {runs[0].shape.name}")
            break
        report["training"].append(training(runs, deadline, device))
        print(json.dumps(report["training"][-1]), flush=True)
        report["figure2_minutes"] = figure2_minutes(report["training"])
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if "figure2_minutes" in report:
        print(f"figure2, minutes: {report['figure2_minutes']}")


if __name__ == "__main__":
    main()
