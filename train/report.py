"""Where a run writes its metrics: metrics.csv, the log, TensorBoard or W&B if asked for, and a plot at the end."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Protocol

from jrt.system.files import write_text

log = logging.getLogger(__name__)

COLUMNS = (
    "step",
    "train/loss",
    "train/next_token",
    "train/masked",
    "train/rate",
    "train/gradient_norm",
    "train/tokens_per_s",
    "train/mfu",
    "train/mfu_with_mixers",
    "train/memory_gib",
    "train/loader_share",
    "train/seconds",
    "validation/loss",
    "validation/perplexity",
    "validation/right",
    "recall/score",
)


class Logger(Protocol):
    """A place that metrics are written to."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Csv:
    """Writes metrics.csv, one row for each report.

    A resumed run first removes the rows after the step it resumes from."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if int(row["step"]) <= step] if path.is_file() else []
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)

    def log(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": step, **{k: repr(v) for k, v in values.items()}})

    def close(self) -> None:
        pass


class TensorBoard:
    """Writes TensorBoard files. Raises ValueError if tensorboard is not installed."""

    def __init__(self, folder: str) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("logger=tensorboard needs the package tensorboard: pip install 'jrt[log]'")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Sends metrics to Weights & Biases. A resumed run goes on with its curve there: its id is in wandb-run.txt.

    Raises ValueError if wandb is not installed, has no key, or cannot begin."""

    def __init__(self, project: str, name: str, folder: str) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("logger=wandb needs the package wandb: pip install 'jrt[wandb]'")
        import wandb

        try:
            if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not _has_key(wandb):
                raise ValueError("no key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
            file = Path(folder) / "wandb-run.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            known = file.read_text(encoding="utf-8").strip() if file.is_file() else None
            self.run = wandb.init(project=project, name=str(name), dir=folder, id=known, resume="allow")
            write_text(file, f"{self.run.id}\n")
        except (wandb.Error, ValueError) as error:
            raise ValueError(f"logger=wandb: {' '.join(str(error).split())}") from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _has_key(wandb: ModuleType) -> bool:
    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False)
    return bool(wandb.api.api_key)  # of versions before 0.31, which warn of it from then on


def console(step: int, last: int, values: dict[str, float], seconds_a_step: float) -> None:
    """Writes one line to the log: step, metrics and the time that is left."""
    left = int(max(0, last - step) * seconds_a_step)
    parts = [f"step {step}/{last}"]
    names = {
        "train/loss": "loss {:.4f}",
        "validation/loss": "validation loss {:.4f}",
        "validation/perplexity": "perplexity {:.2f}",
        "validation/right": "answers right {:.1%}",
        "recall/score": "recall {:.1f}",
        "train/rate": "rate {:.2e}",
        "train/gradient_norm": "gradient {:.2f}",
        "train/tokens_per_s": "{:,.0f} tokens/s",
        "train/mfu": "MFU {:.1%}",
        "train/memory_gib": "{:.1f} GiB",
        "train/loader_share": "loader {:.1%}",
    }
    parts += [form.format(values[name]) for name, form in names.items() if name in values]
    log.info("%s", " | ".join([*parts, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"]))


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a metrics.csv. A last row that a crash cut off is left out.

    Raises ValueError if it is not a run's metrics.csv."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictReader(file)
        if table.fieldnames is not None and tuple(table.fieldnames) != COLUMNS:
            raise ValueError(f"{path} is not the metrics.csv of a run: choose another output, or move it away")
        return [row for row in table if (row["step"] or "").isdigit() and None not in row.values()]


def plot(metrics: Path, picture: Path) -> None:
    """Draws training and validation loss over the steps, and saves them as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics)
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("train/loss", "validation/loss"):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
