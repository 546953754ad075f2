"""Measures training on several GPUs of one machine: speed, memory and losses of `train/run.py`, started as users do.

    python benchmarks/train_scaling.py --gpus 1 2                   # both models, DDP and FSDP2, to results/train_scaling.json
    python benchmarks/train_scaling.py --gpus 1 2 --resume          # a run that changes from 2 GPUs to 1 and back
    python benchmarks/train_scaling.py --gpus 1 2 --cpu --presets debug --steps 6 --length 128     # tries the script

Tokens are synthetic. In "weak" scaling each GPU has the same number of rows in a step, so the batch grows with the
number of GPUs. In "strong" scaling the batch is always the same, and fewer GPUs split it into more passes; then the
losses must agree.

    efficiency = tokens/s of N GPUs / (N x tokens/s of the same rows or batch on one)
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from record import write

from jrt.config import presets

RUN = Path(__file__).resolve().parents[1] / "train" / "run.py"
ROWS = {"jrt-360m": 16, "jrt-1.3b": 8}  # of a pass on one GPU; other presets: 4
STRATEGIES = ("ddp", "fsdp")
TOLERANCE = 1e-3  # between the losses of one GPU and of several, relative


@dataclass(frozen=True)
class Setting:
    """One run: how a batch of `batch` rows is divided among the GPUs."""

    preset: str
    strategy: str
    gpus: int
    batch: int

    @property
    def rows(self) -> int:
        """Rows of a pass on one GPU."""
        return min(ROWS.get(self.preset, 4), self.batch // self.gpus)

    def scaling(self, most: int) -> list[str]:
        """Returns the scaling curves ("weak", "strong") that the run belongs to."""
        weak = self.batch == self.gpus * ROWS.get(self.preset, 4)
        strong = self.batch == most * ROWS.get(self.preset, 4)
        return ["weak"] * weak + ["strong"] * strong


def settings(names: list[str], strategies: list[str], gpus: list[int]) -> list[Setting]:
    """Returns every run once. On one GPU all strategies are the same, so only one of them is run."""
    found = []
    for preset in names:
        rows, most = ROWS.get(preset, 4), max(gpus)
        for count in gpus:
            for strategy in strategies if count > 1 else strategies[:1]:
                for batch in sorted({count * rows, most * rows}):
                    found.append(Setting(preset, strategy, count, batch))
    return found


def make_text(folder: Path, length: int, vocabulary: int) -> None:
    """Writes token files of 2,000 windows of random ids, more than any run here reads."""
    generator = np.random.default_rng(0)
    for split, windows in (("train", 2000), ("validation", 8)):
        ids = generator.integers(0, vocabulary, windows * length + 1, dtype=np.uint16)
        ids.tofile(folder / f"{split}.bin")
    (folder / "manifest.json").write_text(json.dumps({"dtype": "uint16"}), encoding="utf-8")


def run(setting: Setting, text: Path, output: Path, options: argparse.Namespace, *more: str) -> list[dict[str, float]]:
    """Trains, and returns the rows of metrics.csv.

    Raises:
        SystemExit: the run failed. The message has its output.
    """
    command = [sys.executable, str(RUN), f"preset={setting.preset}", "name=scaling", f"steps={options.steps}"]
    command += [f"output={output}", f"data.folder={text}", f"data.length={options.length}", "export=false"]
    command += [f"trainer={'cpu' if options.cpu else 'gpu'}", f"trainer.devices={setting.gpus}"]
    command += [f"trainer.strategy={setting.strategy}", f"trainer.global_batch={setting.batch}"]
    command += [f"trainer.rows={setting.rows}", f"trainer.log_every={options.every}", "task.schedule.warmup=10"]
    command += ["trainer.validate_every=1000000", "data.validation_windows=1", "trainer.checkpoint_every=0", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{setting}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    with (output / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def measured(setting: Setting, text: Path, output: Path, options: argparse.Namespace, most: int) -> dict:
    start = time.monotonic()
    rows = run(setting, text, output, options)
    steady = rows[len(rows) // 2 :]  # compiling is over
    memory = [row["train/memory_gib"] for row in rows if "train/memory_gib" in row]
    mfu = [row["train/mfu"] for row in steady if "train/mfu" in row]
    return {
        "method": setting.preset,
        "strategy": setting.strategy if setting.gpus > 1 else "one device",
        "gpus": setting.gpus,
        "shape": {"B": setting.batch, "T": options.length},
        "rows_a_pass": setting.rows,
        "scaling": setting.scaling(most),
        "tokens_per_s": round(statistics.median(row["train/tokens_per_s"] for row in steady), 1),
        "mfu": round(statistics.median(mfu), 4) if mfu else None,
        "memory_gib": round(max(memory), 2) if memory else None,
        "losses": {int(row["step"]): row["train/loss"] for row in rows},
        "seconds": round(time.monotonic() - start, 1),
    }


def compare(rows: list[dict]) -> None:
    """Adds to each row its efficiency and the difference of its losses, compared with one GPU."""
    for row in rows:
        alone = [r for r in rows if r["method"] == row["method"] and r["gpus"] == 1]
        same = [r for r in alone if r["shape"] == row["shape"]]
        for kind in row["scaling"]:
            base = same if kind == "strong" else [r for r in alone if r["rows_a_pass"] == r["shape"]["B"]]
            if base:
                row[f"{kind}_efficiency"] = round(row["tokens_per_s"] / base[0]["tokens_per_s"] / row["gpus"], 4)
        if same and row["gpus"] > 1:
            row["loss_difference"] = difference(row["losses"], same[0]["losses"])
            row["losses_agree"] = row["loss_difference"] <= TOLERANCE


def difference(losses: dict[int, float], expected: dict[int, float]) -> float:
    """Returns the largest relative difference."""
    if losses.keys() != expected.keys():
        raise ValueError(f"losses of steps {sorted(losses)} and {sorted(expected)} cannot be compared")
    return max(abs(losses[step] - value) / abs(value) for step, value in expected.items())


def resumed(preset: str, strategy: str, text: Path, folder: Path, options: argparse.Namespace) -> dict:
    """Compares a run on one GPU with a run that changes: a third on many GPUs, a third on one, a third on many."""
    most, third = max(options.gpus), options.steps // 3
    batch = most * ROWS.get(preset, 4)
    alone = run(Setting(preset, strategy, 1, batch), text, folder / "alone", options)
    kept = "trainer.checkpoint_every=1000000"  # at the end of each part
    changes = ((most, third), (1, 2 * third), (most, options.steps))
    for gpus, last in changes:
        setting = Setting(preset, strategy, gpus, batch)
        changed = run(setting, text, folder / "changed", options, kept, f"trainer.max_steps={last}")
    losses = {int(row["step"]): row["train/loss"] for row in alone}
    others = {int(row["step"]): row["train/loss"] for row in changed if int(row["step"]) in losses}
    found = difference(others, losses)
    return {
        "method": preset,
        "strategy": strategy,
        "shape": {"B": batch, "T": options.length},
        "gpus_until_step": {str(last): gpus for gpus, last in changes},
        "losses_of_one_gpu": losses,
        "losses": others,
        "loss_difference": found,
        "losses_agree": found <= TOLERANCE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--presets", nargs="+", default=list(ROWS), choices=list(presets()), metavar="PRESET")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=5, help="steps between two figures")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--resume", action="store_true", help="change the number of GPUs on the way instead")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU (gloo) instead of GPUs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.steps < 2 * options.every or (options.resume and options.steps % 3):
        parser.error("expected at least two figures a run (--steps, --every), and with --resume a multiple of 3 steps")
    name = "train_resume" if options.resume else "train_scaling"
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        vocabulary = min(presets()[preset].vocab_rows for preset in options.presets) - 1
        make_text(folder, options.length, min(50257, vocabulary))
        if options.resume:
            for preset in options.presets:
                for strategy in options.strategies:
                    rows.append(resumed(preset, strategy, folder, folder / f"{preset}-{strategy}", options))
                    print(rows[-1], flush=True)
                    write(name, rows, options.output)
            return
        for number, setting in enumerate(settings(options.presets, options.strategies, sorted(options.gpus))):
            rows.append(measured(setting, folder, folder / f"run-{number}", options, max(options.gpus)))
            compare(rows)
            print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
            path = write(name, rows, options.output, tolerance=TOLERANCE)
    print(path)


if __name__ == "__main__":
    main()
