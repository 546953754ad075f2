"""The training loop: read a batch, make its targets, forward and backward, optimiser step, metrics, checkpoint.

A device may split its rows of a step into several *passes* (gradient accumulation), so that a large batch fits into
memory.

Shapes: G rows of a step's whole batch, R rows that a device reads in one pass, T tokens of a row.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from jrt.config import Config
from jrt.model import LanguageModel
from jrt.training.flops import flops_per_token, peak_flops
from jrt.training.loss import loss_of, room_for, split_rows
from jrt.training.objective import Objective, Targets
from jrt.training.settings import check_fields, check_whole
from train.checkpoints import Checkpoint, Checkpoints, Training
from train.data.batches import Batch, Data, Resumable
from train.data.loader import loader, local_part
from train.distributed import World, unsynchronised
from train.optimizer import MovingAverage, Schedule
from train.report import Logger, console

log = logging.getLogger(__name__)
PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Trainer:
    """Settings of how a run is carried out. Only `global_batch`, `precision` and `ema` change what is learnt."""

    max_steps: int  # where to stop; the schedule may be longer
    accelerator: str = "auto"  # auto, cpu or gpu
    devices: int = 1  # of each machine
    nodes: int = 1  # machines
    strategy: str = "ddp"  # or fsdp: weights, gradients and optimiser spread over the devices
    precision: str = "bf16-mixed"  # one of PRECISIONS
    global_batch: int | None = None  # G; None: the data says
    rows: int | None = None  # R; None: the device's whole share, in one pass
    compile: bool = True
    activation_checkpointing: bool = False
    log_every: int = 25
    validate_every: int = 500
    checkpoint_every: int = 1000  # 0: none, for measurements
    keep_last: int = 2
    keep_best: int = 0
    keep_every: int = 0
    probe_every: int = 0  # steps between two measurements of recall on reference pages; 0: none
    ema: float = 0.0  # decay of the weights' moving average (`MovingAverage`); 0: no average

    def __post_init__(self) -> None:
        for name in ("max_steps", "devices", "nodes", "log_every", "validate_every", "keep_last"):
            check_whole(f"trainer.{name}", getattr(self, name), 1)
        for name in ("checkpoint_every", "keep_best", "keep_every", "probe_every"):
            check_whole(f"trainer.{name}", getattr(self, name), 0)
        for name in ("global_batch", "rows"):
            if getattr(self, name) is not None:
                check_whole(f"trainer.{name}", getattr(self, name), 1)
        check_fields(self, "trainer")
        for name in ("keep_best", "keep_every"):
            if getattr(self, name) and not self.checkpoint_every:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}, but trainer.checkpoint_every=0 writes none")
        if self.keep_every and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"trainer.keep_every is {self.keep_every}: expected a multiple of trainer.checkpoint_every, which is "
                f"{self.checkpoint_every}, because no other steps have a checkpoint"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"trainer.precision is {self.precision!r}: expected one of {', '.join(PRECISIONS)}")

    def passes(self, total: int) -> int:
        """Returns the number of passes that each device needs for its share of `total` rows.

        Raises:
            ValueError: devices x rows x passes cannot be `total`.
        """
        world = self.devices * self.nodes
        rows = self.rows or max(1, total // world)
        if total % (world * rows):
            raise ValueError(
                f"a batch of {total} rows cannot be {world} devices x {rows} rows x a whole number of passes: "
                f"choose trainer.global_batch, trainer.devices and trainer.rows so that it can"
            )
        return total // (world * rows)


@dataclass
class Progress:
    """What the run has done so far: steps, tokens, seconds, and the last value of each metric."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict:
        loss = self.metrics.get("validation/loss")
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "validation_loss": loss} | {
            "metrics": self.metrics
        }


class Loop:
    """One run, as this process sees it.

    Args:
        trainer: how the run is carried out.
        place: this process.
        model: the model.
        module: the same model with its loss (`jrt.training.loss.ModelWithLoss`), spread over the devices.
        data: the batches.
        objective: makes inputs and labels from a batch.
        prefix: how many tokens of each row are its prefix; 0: no prefix; None: each batch says.
        schedule: AdamW's settings.
        seed: of the hidden tokens.
        output: folder of the run.
        identity: the settings that are saved in each checkpoint (`train.run.identity_of`).
        probe: measures recall on reference pages, in percent; None: not measured.
    """

    def __init__(
        self,
        trainer: Trainer,
        place: World,
        model: LanguageModel,
        module: nn.Module,
        data: Data,
        objective: Objective,
        prefix: int | None,
        schedule: Schedule,
        seed: int,
        output: Path,
        identity: dict,
        probe: Callable[[LanguageModel], float] | None = None,
    ) -> None:
        self.trainer, self.place, self.model, self.module = trainer, place, model, module
        self.data, self.objective, self.prefix = data, objective, prefix
        self.schedule, self.seed, self.output, self.identity, self.probe = schedule, seed, output, identity, probe
        self.config: Config = model.config
        optimizer = schedule.optimizer(model, fused=place.device.type == "cuda")
        average = MovingAverage(model.parameters(), trainer.ema) if trainer.ema else None
        self.training = Training(model, optimizer, average)
        self.checkpoints = Checkpoints(
            output / "checkpoints", place, trainer.keep_last, trainer.keep_best, trainer.keep_every
        )
        self.progress = Progress()
        self.generator = torch.Generator(place.device)
        # (3,) loss, gradient norm and weight of the next-token labels of the steps that are not yet checked.
        self._unseen: list[tuple[int, Tensor]] = []
        self._place_in_data: Tensor | None = None  # `resume` of the last batch
        parameters = sum(p.numel() for p in model.parameters())
        self._flops = flops_per_token(self.config, parameters, data.length)

    def resume(self, found: Checkpoint) -> None:
        """Continues from a checkpoint. Later checkpoints, which are damaged, are deleted."""
        self.checkpoints.load(found, self.training)
        self.checkpoints.remove_after(found.step)
        facts = found.facts
        self.progress = Progress(found.step, facts["tokens"], facts["seconds"], facts["metrics"])
        if facts.get("data") is not None:
            if not isinstance(self.data, Resumable):
                raise ValueError(
                    f"{found.folder} holds its place in a stream, and this data is none: choose another output"
                )
            self.data.go_on(facts["data"])
        log.info("going on from step %d (%s)", found.step, found.folder)

    def fit(self, loggers: list[Logger]) -> Progress:
        """Trains until step `max_steps` and returns what was done.

        Raises:
            ValueError: the loss is not finite, ids are beyond the vocabulary, a batch cannot be split, or a checkpoint
                cannot be written.
        """
        trainer, progress = self.trainer, self.progress
        last = trainer.max_steps
        if progress.step >= last:
            log.info("the run has %d steps and trainer.max_steps is %d: nothing to train", progress.step, last)
        batches = loader(self.data, progress.step, last, self.place.rank, self.place.size, trainer.global_batch)
        interval = _Interval(self.place.device, progress.tokens)
        start, before = time.monotonic(), progress.seconds
        saved = progress.step
        while progress.step < last:
            with interval.loading():
                batch = next(batches)
            self._place_in_data = batch.get("resume")
            values = self._step(batch, progress.step)
            progress.step += 1
            progress.tokens += (batch["ids"].shape[1] - 1) * len(batch["ids"]) * self.place.size
            progress.seconds = before + time.monotonic() - start
            found: dict[str, float] = {}
            if progress.step % trainer.log_every == 0 or progress.step == last:
                self._look()
                found |= values() | interval.rates(progress.tokens, self._flops, self.place.size)
                found["train/seconds"] = progress.seconds
            saves = trainer.checkpoint_every and (
                progress.step % trainer.checkpoint_every == 0 or progress.step == last
            )
            asked = progress.step % trainer.validate_every == 0 or progress.step == last
            if asked or (saves and trainer.keep_best):  # the best checkpoint is chosen by its own loss
                self._look()
                found |= self.validate()
                if not math.isfinite(found["validation/loss"]):
                    self._stop(progress.step - 1, "validation loss after", found["validation/loss"])
                interval = _Interval(self.place.device, progress.tokens)
            if self.probe and trainer.probe_every and progress.step % trainer.probe_every == 0:
                found["recall/score"] = self.probe(self.model)
                interval = _Interval(self.place.device, progress.tokens)
            if found:
                progress.metrics |= found
                if self.place.is_first:
                    for logger in loggers:
                        logger.log(progress.step, found)
                    console(progress.step, last, found, (time.monotonic() - start) / max(progress.step - saved, 1))
            if saves:
                self._look()
                self.checkpoints.save(self.training, progress.step, self._facts())
        for logger in loggers if self.place.is_first else ():
            logger.close()
        return progress

    def _facts(self) -> dict:
        """What a checkpoint holds besides the tensors."""
        place = self._place_in_data
        state = None if place is None else json.loads(place.numpy().tobytes())
        return self.progress.facts() | {"identity": self.identity, "data": state}

    def _step(self, batch: Batch, step: int) -> Callable[[], dict[str, float]]:
        """Does one optimiser step. Returns a function that reads its metrics back from the device.

        Reading waits for the GPU, so it is done only when metrics are reported."""
        total = len(batch["ids"]) * self.place.size
        passes = self.trainer.passes(total)
        self._check_ids(batch["ids"], f"step {step}")
        targets = self._targets(batch, self.objective, step, total)
        totals = self.place.sum(targets.totals())  # (2,) over the whole batch
        rows = len(batch["ids"]) // passes
        room = self._room(rows, batch)
        sums = torch.zeros(2, device=self.place.device)
        for number, part in enumerate(split_rows(targets, rows)):
            with unsynchronised(self.module, last=number == passes - 1):
                with self._autocast():
                    arguments = (part.input_ids, part.labels, part.masked, part.prefix_length, part.weights, room)
                    own = self.module(*arguments)[:2]
                # DDP and FSDP average gradients over the devices; the factor turns the average into a sum.
                (loss_of(own, totals, self.objective) * self.place.size).backward()
            sums += own.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        rate = self.schedule.rate(step)
        for group in self.training.optimizer.param_groups:
            group["lr"] = rate
        self.training.optimizer.step()
        self.training.optimizer.zero_grad(set_to_none=True)
        if self.training.average is not None:
            self.training.average.update()
        sums = self.place.sum(sums)
        loss = loss_of(sums, totals, self.objective)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP spreads it over the devices
        self._unseen.append((step, torch.stack([loss, whole, totals[0]])))

        def values() -> dict[str, float]:
            means = (sums / totals.clamp(min=1e-9)).tolist()
            found = {"train/loss": float(loss), "train/next_token": means[0]}
            if self.objective.kind == "jrt" and self.objective.masked_share:
                found["train/masked"] = means[1]
            return found | {"train/rate": rate, "train/gradient_norm": float(whole)}

        return values

    def _targets(self, batch: Batch, objective: Objective, draw: int, total: int) -> Targets:
        ids = batch["ids"].to(self.place.device, non_blocking=True)
        prefix = batch.get("prefix_length")
        if prefix is not None:
            prefix = prefix.to(self.place.device, non_blocking=True)
        elif self.prefix:
            prefix = torch.full((len(ids),), self.prefix, device=self.place.device)
        weights = batch.get("weights")
        if weights is not None:
            weights = weights.to(self.place.device, non_blocking=True)
        self.generator.manual_seed((self.seed * 0x9E3779B1 + draw * 2 + 1) % (1 << 63))
        first = self.place.rank * len(ids)
        return objective(ids, prefix, self.generator, weights=weights, first_row=first, all_rows=total)

    def _room(self, rows: int, batch: Batch) -> tuple[int, int]:
        prefix = None if "prefix_length" in batch else self.prefix
        return room_for(self.objective, rows, batch["ids"].shape[1] - 1, prefix)

    def _autocast(self) -> AbstractContextManager:
        if self.trainer.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.place.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # a few batches are not worth graphs without gradients
    def validate(self) -> dict[str, float]:
        """Returns the mean next-token loss without hidden tokens and its perplexity.

        If the data has questions, it also returns the share of right answers. The devices share the batches."""
        shown = Objective("causal" if self.objective.kind == "causal" else "prefix-lm", self.objective.mask_token)
        if self.objective.predicts_first:
            shown = Objective(shown.kind, shown.mask_token, predicts_first=True)
        sums = torch.zeros(4, dtype=torch.float64, device=self.place.device)  # loss, weight, right answers, answers
        rounds = math.ceil(self.data.validation_batches / self.place.size)
        self.model.eval()
        for number in range(rounds):
            index = number * self.place.size + self.place.rank
            counts = index < self.data.validation_batches
            batch = self.data.validation(index if counts else 0)  # all devices take part in every forward pass
            self._check_ids(batch["ids"], f"validation batch {index}")
            targets = self._targets(batch, shown, 0, len(batch["ids"]) * self.place.size)
            rows, length = targets.input_ids.shape
            answers = batch["answers"].to(self.place.device) if "answers" in batch else None
            with self._autocast():
                found = self.module(
                    targets.input_ids,
                    targets.labels,
                    targets.masked,
                    targets.prefix_length,
                    targets.weights,
                    (rows * length, 0),
                    answers,
                )
            if counts:
                sums += torch.stack([found[0], targets.totals()[0], found[2], found[3]]).double()
        self.model.train()
        loss, weight, right, asked = self.place.sum(sums).tolist()
        mean = loss / max(weight, 1e-9)
        values = {"validation/loss": mean, "validation/perplexity": math.exp(min(mean, 700.0))}
        return values | ({"validation/right": right / asked} if asked else {})

    def _check_ids(self, ids: Tensor, where: str) -> None:
        for id in map(int, ids.aminmax()):
            if not 0 <= id < self.config.vocab_rows:
                raise ValueError(
                    f"{where}: token id {id} is outside the model's vocabulary of {self.config.vocab_rows} rows: were the "
                    "tokens made with another tokenizer, or are they of another type than the file's?"
                )

    def _look(self) -> None:
        """Stops at the first loss or gradient that is not finite: nothing that comes after it may be saved.

        Stops also at a step without a token to predict, from which nothing is learnt."""
        found = torch.stack([values for _, values in self._unseen]).tolist() if self._unseen else []
        for (step, _), (loss, norm, weight) in zip(self._unseen, found, strict=True):
            for name, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    self._stop(step, f"{name} of", value)
            if weight <= 0:
                raise ValueError(f"step {step} has no token to predict: are the sequences too short for this data?")
        self._unseen.clear()

    def _stop(self, step: int, what: str, value: float) -> NoReturn:
        """Saves this device's batch of a step, and raises ValueError."""
        path = self.output / f"not-finite-step-{step}-rank-{self.place.rank}.pt"
        share = (self.data, step, self.place.rank, self.place.size, self.trainer.global_batch)
        torch.save(local_part(*share), path)
        raise ValueError(
            f"the {what} step {step} is {value}: training stopped, the batch is in {path}, and the last "
            "checkpoint is from before; try a lower rate (task.schedule.peak)"
        )


class _Interval:
    """Measures the speed of the steps since the last report."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device, self.tokens = device, tokens
        self.start, self.waited, self._since = time.monotonic(), 0.0, 0.0

    def loading(self) -> AbstractContextManager:
        return self

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.waited += time.monotonic() - self._since

    def rates(self, tokens: int, flops: tuple[int, int], devices: int) -> dict[str, float]:
        """Returns the speed since the last call.

        Args:
            tokens: that the whole run has read so far.
            flops: of a token, without and with those of the mixers (`jrt.training.flops.flops_per_token`).
            devices: of the run.
        """
        elapsed = time.monotonic() - self.start
        speed = (tokens - self.tokens) / elapsed
        peak = peak_flops(self.device) * devices
        found = {"train/tokens_per_s": speed, "train/loader_share": self.waited / elapsed}
        if math.isfinite(peak):
            found |= {"train/mfu": speed * flops[0] / peak, "train/mfu_with_mixers": speed * flops[1] / peak}
        if self.device.type == "cuda":
            found["train/memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.start, self.waited, self.tokens = time.monotonic(), 0.0, tokens
        return found
