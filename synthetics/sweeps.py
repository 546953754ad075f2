"""Lists of runs, and a command that does those not done yet: ``python synthetics/sweeps.py laptop --workers 2``.

Each run's result is one JSON file, written when it ends; an interrupted run goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # so that this file finds its package wherever it is started

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from synthetics.methods import METHODS  # noqa: E402
from synthetics.train import Run, provenance, train  # noqa: E402

SWEEPS = {
    # Figure 2: 60 models, two seeds; jrt-prompt is ours to add
    "paper": [
        Run(method, "paper", width, feature_dim, rate, epochs=48, seed=seed)
        for method, width, feature_dim, rate, seed in product(
            METHODS, (36, 48, 64, 96, 128), (4, 8, 16, 24), (1e-4, 5e-4, 8e-4), (123, 2)
        )
    ],
    "laptop": [
        Run(method, "laptop", width, feature_dim, rate=5e-3, epochs=12, seed=seed)
        for width, feature_dim in ((16, 2), (24, 2), (16, 4), (32, 2), (24, 4), (32, 4))
        for seed in (123, 2)
        for method in METHODS
    ],
    "debug": [Run(method, "debug", width=8, feature_dim=2, rate=5e-3, epochs=1) for method in METHODS],
}


def result_file(output: Path, run: Run) -> Path:
    return output / f"{run.name}.json"


def do(run: Run, output: Path, accelerator: str) -> Path:
    """Trains one model and writes its row, all of it or nothing."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if accelerator == "cpu":
        torch.set_num_threads(1)
    row = train(run, output / "checkpoints" / run.name, accelerator, quiet=True)
    file = result_file(output, run)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({**row, **provenance()}, indent=1) + "\n")
    return part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--output", type=Path, help="folder of the results; default: runs/synthetics/SWEEP")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--accelerator", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}: expected at least 1")
    output = arguments.output or Path("runs/synthetics") / arguments.sweep
    output.mkdir(parents=True, exist_ok=True)
    missing = [run for run in SWEEPS[arguments.sweep] if not result_file(output, run).exists()]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(do, run, output, arguments.accelerator) for run in missing]
        for done in tqdm(as_completed(waiting), total=len(waiting), desc=arguments.sweep):
            done.result()
    print(f"{len(SWEEPS[arguments.sweep])} results in {output}; next: python synthetics/plot.py {output}")


if __name__ == "__main__":
    main()
