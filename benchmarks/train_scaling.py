"""Measures training on several GPUs of one machine: speed, memory and losses of `train/run.py`.

    python benchmarks/train_scaling.py --gpus 1 2 4                 # both models, DDP and FSDP2, to results/train_scaling.json
    python benchmarks/train_scaling.py --gpus 1 2 4 --keep          # goes on: runs that the file already has are not repeated
    python benchmarks/train_scaling.py --gpus 1 4 --resume          # a run that changes from 4 GPUs to 1 and back
    python benchmarks/train_scaling.py --gpus 1 2 --cpu --presets debug --steps 6 --every 3 --length 128     # tries the script

Tokens are synthetic. In "weak" scaling each GPU has the same number of rows in a step, so the batch grows with the
number of GPUs: "weak" has the rows that a GPU has when the largest number of GPUs shares the recipes' batch of
RECIPE_BATCH rows, in several passes (DDP only); "one pass" has the rows of a single pass, so that gradients are summed
as often as can be. In "strong" scaling the batch is always the same, one pass of the largest number of GPUs, and fewer
GPUs split it into more passes; then the losses must agree. Runs that measure only speed have fewer steps.

    efficiency = tokens/s of N GPUs / (N x tokens/s of the same rows or batch on one)

One process is started for each GPU, as torchrun does. Runs that need fewer GPUs than the largest one share the machine:
they run side by side, each on GPUs of its own. A row's `beside` is the largest number of other GPUs that trained during
the run. A run that fails is named in the results as `failed`, and the others go on.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from record import RESULTS, write

from jrt.config import presets
from jrt.system.processes import PARENT
from jrt.system.provenance import commit, device_name

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "run.py"
ROWS = {"jrt-360m": 16, "jrt-1.3b": 8}  # of a pass on one GPU; other presets: 4
RECIPE_BATCH = 256  # rows of a step, of all GPUs: train/configs/experiment/baselines
STRATEGIES = ("ddp", "fsdp")
SCALINGS = ("weak", "one pass", "strong")
SPEED_STEPS = 45  # of which the second half is measured
RECIPE_STEPS = 15  # the same for steps of several passes
PATIENCE = 240  # seconds: longer than compiling takes, and than steps between two figures
TOLERANCE = 1e-3  # between the losses of one GPU and of several, relative


@dataclass(frozen=True)
class Setting:
    """One run: how a batch of `batch` rows is divided among the GPUs, and the step where the run ends."""

    preset: str
    strategy: str
    gpus: int
    batch: int
    steps: int

    @property
    def rows(self) -> int:
        """Rows of a pass on one GPU."""
        return min(ROWS.get(self.preset, 4), self.batch // self.gpus)

    def facts(self, length: int) -> dict:
        """What tells the run's row of the results from others."""
        return {
            "method": self.preset,
            "strategy": self.strategy if self.gpus > 1 else "one device",
            "gpus": self.gpus,
            "shape": {"B": self.batch, "T": length},
            "rows_a_pass": self.rows,
            "steps": self.steps,
        }

    def scaling(self, most: int) -> list[str]:
        """Returns the curves (of SCALINGS) that the run belongs to."""
        return [kind for kind in SCALINGS if self.batch == batch_of(kind, self.preset, self.gpus, most)]


def batch_of(kind: str, preset: str, gpus: int, most: int) -> int:
    """Rows of a step of all GPUs. kind: of SCALINGS; most: the largest number of GPUs that is measured."""
    rows = ROWS.get(preset, 4)
    return {"weak": gpus * RECIPE_BATCH // most, "one pass": gpus * rows, "strong": most * rows}[kind]


def settings(options: argparse.Namespace) -> list[Setting]:
    """Returns every run once, in the order in which `side_by_side` should start them.

    On one GPU all strategies are the same, so only one is run. Runs that need all GPUs come first, because they would
    wait for ever behind smaller ones; then the runs on one GPU, with which the others are compared."""
    found = dict[Setting, None]()
    most = max(options.gpus)
    for strategy, preset, kind in product(options.strategies, options.presets, options.scaling):
        for count in sorted(options.gpus, reverse=True):
            batch, strong = (batch_of(each, preset, count, most) for each in (kind, "strong"))
            if kind == "weak" and strategy != options.strategies[0]:
                continue
            compared = batch == strong and "strong" in options.scaling
            steps = options.steps if compared else min(options.steps, RECIPE_STEPS if kind == "weak" else SPEED_STEPS)
            found[Setting(preset, strategy if count > 1 else options.strategies[0], count, batch, steps)] = None
    return sorted(found, key=lambda setting: (setting.gpus != most, setting.gpus != 1, -setting.gpus))


def make_text(folder: Path, length: int, vocabulary: int) -> None:
    """Writes token files of random ids, more windows than any run here reads."""
    generator = np.random.default_rng(0)
    for split, windows in (("train", 4000), ("validation", 8)):
        ids = generator.integers(0, vocabulary, windows * length + 1, dtype=np.uint16)
        ids.tofile(folder / f"{split}.bin")
    (folder / "manifest.json").write_text(json.dumps({"dtype": "uint16"}), encoding="utf-8")


class RunFailed(Exception):
    """A run ended with an error, or wrote no figures for PATIENCE seconds."""


class Run:
    """A training run that was started: one process for each GPU. `problem` says why it failed, if it did.

    Args:
        devices: the GPUs, by their numbers among those that this process sees.
        more: further arguments of train/run.py.
    """

    def __init__(
        self, setting: Setting, devices: list[int], text: Path, output: Path, options: argparse.Namespace, *more: str
    ) -> None:
        self.setting, self.devices, self.output = setting, devices, output
        self.start, self.beside, self.problem = time.monotonic(), 0, ""
        self._moved, self._written = self.start, 0  # when metrics.csv last grew, and its time of change then
        command = [sys.executable, str(SCRIPT), f"preset={setting.preset}", "name=scaling", f"steps={options.steps}"]
        command += [f"output={output}", f"data.folder={text}", f"data.length={options.length}", "export=false"]
        command += [f"trainer={'cpu' if options.cpu else 'gpu'}", f"trainer.devices={setting.gpus}"]
        command += [f"trainer.strategy={setting.strategy}", f"trainer.global_batch={setting.batch}"]
        command += [f"trainer.rows={setting.rows}", f"trainer.log_every={options.every}"]
        command += [f"task.schedule.warmup={min(10, options.steps)}"]
        command += ["trainer.validate_every=1000000", "data.validation_windows=1", "trainer.checkpoint_every=0"]
        command += [f"trainer.max_steps={setting.steps}", *more]
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [seen[device] if device < len(seen) and seen[0] else str(device) for device in devices]
        # PARENT: the run ends with this benchmark, even if that is killed.
        shared = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names), PARENT: str(os.getpid())}
        if setting.gpus > 1:
            shared |= {"WORLD_SIZE": str(setting.gpus), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        self._processes, self._logs = [], []
        for rank in range(setting.gpus):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if setting.gpus > 1 else {}
            self._logs.append(output.with_name(f"{output.name}-{rank}.log"))
            with self._logs[-1].open("w") as log:
                self._processes.append(
                    subprocess.Popen(command, env=shared | own, stdout=log, stderr=subprocess.STDOUT)
                )

    def ended(self) -> bool:
        """Whether all processes have ended. If one failed, or there were no figures for PATIENCE seconds, the others
        are killed, and `problem` has its output."""
        codes = [process.poll() for process in self._processes]
        metrics = self.output / "metrics.csv"
        if metrics.is_file() and metrics.stat().st_mtime_ns != self._written:
            self._written, self._moved = metrics.stat().st_mtime_ns, time.monotonic()
        if None in codes and time.monotonic() - self._moved > PATIENCE:
            self.problem = f"{self.setting}: no figures for {PATIENCE} s"
        for code, log in zip(codes, self._logs, strict=True):
            if code and not self.problem:
                self.problem = f"{self.setting}: exit code {code}\n{log.read_text(errors='replace')[-6000:]}"
        if self.problem:
            self.kill()
        return bool(self.problem) or None not in codes

    def kill(self) -> None:
        """Ends the processes. Shows the last lines of those that were still running."""
        for process, log in zip(self._processes, self._logs, strict=True):
            if process.poll() is None:
                process.kill()
                process.wait()
                print(
                    f"{self.setting}: stopped\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr, flush=True
                )

    def metrics(self) -> list[dict[str, float]]:
        """Returns the rows of metrics.csv."""
        with (self.output / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def measured(self, options: argparse.Namespace) -> dict:
        """Returns the run's row of the results."""
        setting, rows = self.setting, self.metrics()
        steady = rows[len(rows) // 2 :]  # compiling is over
        memory = [row["train/memory_gib"] for row in rows if "train/memory_gib" in row]
        mfu = [row["train/mfu"] for row in steady if "train/mfu" in row]
        return {
            **setting.facts(options.length),
            "commit": commit(SCRIPT.parent),
            "date": datetime.date.today().isoformat(),
            "scaling": setting.scaling(max(options.gpus)),
            "tokens_per_s": round(statistics.median(row["train/tokens_per_s"] for row in steady), 1),
            "mfu": round(statistics.median(mfu), 4) if mfu else None,
            "memory_gib": round(max(memory), 2) if memory else None,
            "losses": {str(int(row["step"])): row["train/loss"] for row in rows},
            "beside": self.beside,
            "seconds": round(time.monotonic() - self.start, 1),
        }


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def side_by_side(wanted: list[Setting], text: Path, folder: Path, options: argparse.Namespace) -> Iterator[Run]:
    """Runs all settings, several at once where they fit on the GPUs together, and yields them as they end."""
    free, waiting, running = list(range(max(options.gpus))), list(enumerate(wanted)), list[Run]()
    try:
        while waiting or running:
            for number, setting in list(waiting):
                if setting.gpus <= len(free):
                    devices, free = free[: setting.gpus], free[setting.gpus :]
                    running.append(Run(setting, devices, text, folder / f"run-{number}", options))
                    waiting.remove((number, setting))
            busy = sum(len(run.devices) for run in running)
            for run in running:
                run.beside = max(run.beside, busy - len(run.devices))
            time.sleep(0.1)
            for run in [run for run in running if run.ended()]:
                running.remove(run)
                free = sorted(free + run.devices)
                yield run
    finally:
        for run in running:
            run.kill()


def completed(run: Run) -> Run:
    """Waits for a run that has the machine to itself. Raises RunFailed."""
    try:
        while not run.ended():
            time.sleep(0.1)
    finally:
        run.kill()
    if run.problem:
        raise RunFailed(run.problem)
    return run


def compare(rows: list[dict]) -> None:
    """Adds to each row its efficiency and the difference of its losses, compared with one GPU."""
    for row in rows:
        alone = [r for r in rows if r["method"] == row["method"] and r["gpus"] == 1]
        same = [r for r in alone if r["shape"] == row["shape"]]
        for kind in row["scaling"]:
            share = row["shape"]["B"] // row["gpus"]
            base = same if kind == "strong" else [r for r in alone if r["shape"]["B"] == share]
            if base:
                gain = row["tokens_per_s"] / base[0]["tokens_per_s"]
                row[f"{kind.replace(' ', '_')}_efficiency"] = round(gain / row["gpus"], 4)
        if same and row["gpus"] > 1 and row["losses"].keys() == same[0]["losses"].keys():
            row["loss_difference"] = difference(row["losses"], same[0]["losses"])
            row["losses_agree"] = row["loss_difference"] <= TOLERANCE


def difference(losses: dict[str, float], expected: dict[str, float]) -> float:
    """Returns the largest relative difference. The keys are steps."""
    if losses.keys() != expected.keys():
        raise ValueError(f"losses of steps {list(losses)} and {list(expected)} cannot be compared")
    return max(abs(losses[step] - value) / abs(value) for step, value in expected.items())


def losses_on_one_gpu(preset: str, text: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Returns the losses of the whole batch on one GPU: from `options.alone` if it names a file, else from a new run."""
    batch = batch_of("strong", preset, 1, max(options.gpus))
    setting = Setting(preset, options.strategies[0], 1, batch, options.steps)
    if options.alone is None:
        run = Run(setting, [0], text, folder / f"{preset}-alone", options)
        return completed(run).measured(options)["losses"]
    row = stored(json.loads(options.alone.read_text(encoding="utf-8")), setting, options)
    if row is None:
        raise SystemExit(f"{options.alone} has no run with {setting.facts(options.length)}: leave out --alone")
    return row["losses"]


def resumed(
    preset: str, strategy: str, alone: dict[str, float], text: Path, folder: Path, options: argparse.Namespace
) -> dict:
    """Compares a run that changes, a third on many GPUs, a third on one, a third on many, with one GPU's losses."""
    most, third = max(options.gpus), options.steps // 3
    batch = batch_of("strong", preset, most, most)
    kept = "trainer.checkpoint_every=1000000"  # at the end of each part
    changes = ((most, third), (1, 2 * third), (most, options.steps))
    for gpus, last in changes:
        setting = Setting(preset, strategy, gpus, batch, last)
        run = completed(Run(setting, list(range(gpus)), text, folder / "changed", options, kept))
    losses = {step: loss for step, loss in run.measured(options)["losses"].items() if step in alone}
    found = difference(losses, alone)
    return {
        "method": preset,
        "strategy": strategy,
        "shape": {"B": batch, "T": options.length},
        "gpus_until_step": {str(last): gpus for gpus, last in changes},
        "losses_of_one_gpu": alone,
        "losses": losses,
        "loss_difference": found,
        "losses_agree": found <= TOLERANCE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--presets", nargs="+", default=list(ROWS), choices=list(presets()), metavar="PRESET")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--scaling", nargs="+", default=list(SCALINGS), choices=SCALINGS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=5, help="steps between two figures")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--resume", action="store_true", help="change the number of GPUs on the way instead")
    parser.add_argument("--alone", type=Path, help="with --resume: results of this script that have the run on one GPU")
    parser.add_argument("--keep", action="store_true", help="do not repeat the runs that the output file already has")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU (gloo) instead of GPUs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if min(options.steps, RECIPE_STEPS) < 2 * options.every or (options.resume and options.steps % 3):
        parser.error("expected at least two figures a run (--steps, --every), and with --resume a multiple of 3 steps")
    if min(options.gpus) < 1 or ("weak" in options.scaling and any(RECIPE_BATCH % count for count in options.gpus)):
        parser.error(f"--gpus {options.gpus}: expected numbers from 1 on, for weak scaling divisors of {RECIPE_BATCH}")
    name = "train_resume" if options.resume else "train_scaling"
    path = options.output or RESULTS / f"{name}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the runs are stopped too
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        vocabulary = min(presets()[preset].vocab_rows for preset in options.presets) - 1
        make_text(folder, options.length, min(50257, vocabulary))
        failed = list[str]()
        for rows in (resumes if options.resume else scalings)(folder, failed, options):
            path = write(
                name,
                rows,
                options.output,
                "cpu" if options.cpu else "cuda",
                tolerance=TOLERANCE,
                failed=[text.splitlines()[0] for text in failed],
            )
    if failed:
        raise SystemExit("\n".join(failed))
    print(path)


def scalings(folder: Path, failed: list[str], options: argparse.Namespace) -> Iterator[list[dict]]:
    """Yields the rows so far each time that a run has ended. Problems are added to `failed`."""
    wanted = settings(options)
    found, others = kept(wanted, options)
    for run in side_by_side([setting for setting in wanted if setting not in found], folder, folder, options):
        if run.problem:
            failed.append(run.problem)
        else:
            found[run.setting] = run.measured(options)
            print({key: value for key, value in found[run.setting].items() if key != "losses"}, flush=True)
        rows = [found[setting] for setting in wanted if setting in found]
        compare(rows)
        yield rows + others


def kept(wanted: list[Setting], options: argparse.Namespace) -> tuple[dict[Setting, dict], list[dict]]:
    """Returns the rows that the output file already has, with --keep; and its rows of other runs, which stay."""
    path = options.output or RESULTS / "train_scaling.json"
    if not (options.keep and path.is_file()):
        return {}, []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}): leave out --keep") from error
    device = device_name("cpu" if options.cpu else "cuda")
    if report["device"] != device:
        raise SystemExit(f"{path} was measured on {report['device']}, this is {device}: leave out --keep")
    found = {setting: row for setting in wanted if (row := stored(report, setting, options)) is not None}
    return found, [row for row in report["rows"] if row not in found.values()]


def stored(report: dict, setting: Setting, options: argparse.Namespace) -> dict | None:
    """Returns the run's row in results of this script; None if they have none."""
    facts = setting.facts(options.length)
    return next((row for row in report["rows"] if facts.items() <= row.items()), None)


def resumes(folder: Path, failed: list[str], options: argparse.Namespace) -> Iterator[list[dict]]:
    """As `scalings`, for `--resume`."""
    rows: list[dict] = []
    for preset in options.presets:
        try:
            alone = losses_on_one_gpu(preset, folder, folder, options)
            for strategy in options.strategies:
                place = folder / f"{preset}-{strategy}"
                place.mkdir()
                rows.append(resumed(preset, strategy, alone, folder, place, options))
                print(rows[-1], flush=True)
                yield rows
        except RunFailed as error:
            failed.append(str(error))
            yield rows


if __name__ == "__main__":
    main()
