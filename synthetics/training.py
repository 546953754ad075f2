"""Trains runs of one shape together, as one stack of models (`synthetics.stack`).

The settings are the paper's (appendix B.1): AdamW with weight decay 0.1, a cosine schedule over the epochs, and a loss
on the answers alone. A model's training ends when 99% of its test answers are right; it is then removed from the stack.

Shapes: M models, S seeds, N examples, B examples of a batch, R = M x B rows, T tokens, K answers of an example, V
vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.system.files import write_bytes
from synthetics.data import Examples, generator
from synthetics.graphs import RecordedSteps
from synthetics.optimizer import StackedAdamW
from synthetics.runs import Run
from synthetics.stack import Stack
from synthetics.summary import longest_pair

log = logging.getLogger(__name__)

ENOUGH = 0.99  # test accuracy at which a model's training ends
ORDER = 2  # first number of the generator's key for the order of batches
TEST_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 21}  # most tokens of a test batch, of all models together


@dataclass(frozen=True)
class Segment:
    """Examples of one size, of all seeds, in the order in which the method reads them."""

    name: str
    tokens: Tensor  # (S, N, T)
    asked: Tensor  # (S, N, K), columns of the tokens
    answers: Tensor  # (S, N, K)

    def batch(self, seeds: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns tokens (R, T), asked (R, K) and answers (R, K) of a batch.

        seeds (M,): the index of each model's seed in this segment. part: which examples."""
        tokens, asked, answers = (x[seeds, part].flatten(0, 1) for x in (self.tokens, self.asked, self.answers))
        return tokens, asked, answers


class Training:
    """A stack in training. `epoch` trains it for one epoch; `state_dict` returns what a checkpoint needs."""

    def __init__(self, runs: list[Run], device: torch.device) -> None:
        """All runs must have the same shape (`Run.shape`), or ValueError is raised."""
        first = runs[0]
        if any(run.shape != first.shape for run in runs):
            raise ValueError("runs of several shapes cannot be trained together: divide them by synthetics.runs.groups")
        self.runs, self.device = list(runs), device
        self.batch, self.epochs, self.epochs_done = first.batch, first.epochs, 0
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = Stack([run.model() for run in runs], dtype).to(device)
        self.optimizer = StackedAdamW(self.model, [run.rate for run in runs])
        seeds = sorted({run.seed for run in runs})
        self.places = torch.tensor([seeds.index(run.seed) for run in runs], device=device)  # (M,)
        splits = [first.task.draw(seed, device) for seed in seeds]
        self.train = _segments([split.train for split in splits], first)
        self.test = _segments([split.test for split in splits], first)
        self.longest = max(each.tokens.shape[2] for each in (*self.train, *self.test))  # T
        self.steps = RecordedSteps(device)

    def epoch(self) -> list[float]:
        """Trains for one epoch. Returns each model's test accuracy after it, averaged over sizes."""
        progress = self.epochs_done / self.epochs
        self.optimizer.factor.fill_((1 + math.cos(math.pi * progress)) / 2)
        for segment, part in self.order():
            self.steps(self.step, *segment.batch(self.places, part))
        self.epochs_done += 1
        self.accuracy = self.test_accuracy()
        return [sum(each.values()) / len(each) for each in self.accuracy]

    def order(self) -> Iterator[tuple[Segment, slice]]:
        """Yields the batches of the epoch, each of one size. Their order depends on the epoch alone.

        So all models of the stack read examples of the same size at the same time."""
        parts = [
            (segment, slice(start, min(start + self.batch, segment.tokens.shape[1])))
            for segment in self.train
            for start in range(0, segment.tokens.shape[1], self.batch)
        ]
        for index in torch.randperm(len(parts), generator=generator(ORDER, self.epochs_done)).tolist():
            yield parts[index]

    def step(self, tokens: Tensor, asked: Tensor, answers: Tensor) -> None:
        """Does one training step of all models on a batch from `Segment.batch`."""
        logits = self.model(tokens, asked)  # (R, K, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), answers.flatten(), reduction="sum")
        # The sum of the models' mean losses: each model's weights get the gradient of that model's own loss.
        (loss / (answers.numel() // len(self.runs))).backward()
        self.optimizer.step()

    @torch.no_grad()
    def test_accuracy(self) -> list[dict[str, float]]:
        """Returns the test accuracy of each model, by size of the examples."""
        found: list[dict[str, float]] = [{} for _ in self.runs]
        for segment in self.test:
            examples, length = segment.tokens.shape[1:]
            rows = max(1, min(examples, TEST_TOKENS[self.device.type] // (len(self.runs) * length)))
            right = torch.zeros(len(self.runs), device=self.device)
            for start in range(0, examples, rows):
                tokens, asked, answers = segment.batch(self.places, slice(start, start + rows))
                is_right = self.model(tokens, asked).argmax(-1) == answers  # (R, K)
                right += is_right.view(len(self.runs), -1).sum(1)
            for row, share in zip(found, (right / segment.answers[0].numel()).tolist(), strict=True):
                row[segment.name] = share
        return found

    def keep(self, models: list[int]) -> None:
        """Removes all models of the stack except these (their numbers in the stack)."""
        self.runs = [self.runs[index] for index in models]
        if not self.runs:
            return
        self.places = self.places[models]
        self.optimizer.keep(models)
        self.model.keep(torch.tensor(models, device=self.device))
        self.steps.forget()

    def state_dict(self) -> dict:
        return {"epochs_done": self.epochs_done, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.epochs_done = state["epochs_done"]
        self.optimizer.load_state_dict(state["optimizer"])


def _segments(splits: list[list[Examples]], run: Run) -> list[Segment]:
    """Joins the examples of all seeds, one segment for each size."""
    segments = []
    for same in zip(*splits, strict=True):
        tokens = torch.stack([run.method.reading(each) for each in same])
        before = tokens.shape[-1] - same[0].question.shape[1]
        asked = torch.stack([each.asked for each in same]) + before
        segments.append(Segment(same[0].name, tokens, asked, torch.stack([each.answers for each in same])))
    return segments


def train(runs: list[Run], device: torch.device, checkpoint: Path | None, deadline: float | None) -> list[dict] | None:
    """Trains runs of one shape to their ends. Continues from the checkpoint if there is one.

    Args:
        runs: of one shape.
        device: where all of them are trained.
        checkpoint: a file that is written after each epoch; None: no checkpoint.
        deadline: a time of `time.monotonic`, after which no epoch is started, except the first one of this call; None:
            no deadline.

    Returns:
        One row of results for each run, in the order of the runs, or None if the deadline came first.
    """
    rows: dict[str, dict] = {}
    curves: dict[str, list[float]] = {run.name: [] for run in runs}  # test accuracy after each epoch
    seconds, state = 0.0, None
    if checkpoint is not None and checkpoint.exists():
        state = _read(checkpoint, device)
    if state is not None:
        rows, curves, seconds = state["rows"], state["curves"], state["seconds"]
    training = Training(runs, device)  # of the whole group, whose largest feature size sets the shapes of all models
    if state is not None:
        training.keep([index for index, run in enumerate(runs) if run.name not in rows])
        training.load_state_dict(state)
    began = False
    while training.runs:
        if began and deadline is not None and time.monotonic() > deadline:
            return None
        began, start, models = True, time.perf_counter(), len(training.runs)
        means = training.epoch()
        seconds += (time.perf_counter() - start) / models  # of each model still in training
        ends = [mean >= ENOUGH or training.epochs_done == training.epochs for mean in means]
        for run, accuracy, mean, end in zip(training.runs, training.accuracy, means, ends, strict=True):
            curves[run.name].append(round(mean, 4))
            if end:
                rows[run.name] = _row(run, accuracy, curves[run.name], seconds, training.longest)
        if any(ends):
            training.keep([index for index, end in enumerate(ends) if not end])
        if checkpoint is not None:
            content = BytesIO()
            torch.save({**training.state_dict(), "rows": rows, "curves": curves, "seconds": seconds}, content)
            write_bytes(checkpoint, content.getvalue())
    return [rows[run.name] for run in runs]


def _read(checkpoint: Path, device: torch.device) -> dict | None:
    """Returns the content of a checkpoint, or None with a warning if it is damaged."""
    try:
        with ZipFile(checkpoint) as archive:  # PyTorch itself does not compare checksums
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(checkpoint, weights_only=True, map_location=device)
        reason = f"wrong checksum of {damaged}"
    except (BadZipFile, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
    log.warning("%s is damaged (%s): the group begins again", checkpoint, reason)
    return None


def _row(run: Run, accuracy: dict[str, float], curve: list[float], seconds: float, longest: int) -> dict:
    config = run.config
    return {
        "run": run.name,
        "method": run.method.name,
        "pattern": run.method.pattern,
        "reads": run.method.reads,
        "task": run.task.name,
        "width": run.width,
        "feature_dim": run.feature_dim,
        "window": run.window if config.has("S") else None,
        "rate": run.rate,
        "seed": run.seed,
        "epochs": run.epochs,
        "batch": run.batch,
        "epochs_read": len(curve),
        "state_bytes": run.state_bytes(longest - 1),  # before the last token of the longest text
        "parameters": sum(each.numel() for each in run.model().parameters()),
        "seconds": round(seconds, 2),  # the model's share of the device
        "longest_trained": longest_pair(run.task),
        "accuracy": {name: round(share, 4) for name, share in accuracy.items()},
        "curve": curve,  # mean test accuracy after each epoch
    }
