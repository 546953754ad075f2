"""The training step of every model: one weighted cross-entropy, AdamW, a cosine schedule.

Shapes: R rows, T tokens, V vocabulary rows.
"""

import math
import time
from dataclasses import asdict, dataclass

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrt.config import presets
from jrt.model import LanguageModel
from train.sequences import Batch


@dataclass(frozen=True)
class Schedule:
    """Optimiser settings; `peak` is reached after `warmup` steps and falls to `floor` as half a cosine over the
    rest."""

    steps: int
    peak: float = 2e-3
    floor: float = 2e-4
    start: float = 1e-6
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0 (original_spec section 6.3)."""
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * done))


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights x cross-entropy in fp32; logits (R, T, V), targets and weights (R, T)."""
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (each * weights.flatten()).sum()


def right_answers(logits: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    """(2,) answers whose every token is the likeliest one, and all answers; `answers` (R, T) numbers each row's
    answers from 1.

    With the right beginning given, the likeliest tokens are all right exactly when greedy decoding gives the answer.
    """
    most = int(answers.max()) + 1
    number = answers + most * torch.arange(len(answers), device=answers.device)[:, None]
    wrong = (logits.argmax(-1) != targets).flatten()
    asked = torch.zeros(most * len(answers), dtype=torch.bool, device=answers.device)
    failed = asked.clone()
    asked[number[answers > 0]] = True
    failed[number.flatten()[wrong & (answers > 0).flatten()]] = True
    return torch.stack([(asked & ~failed).sum(), asked.sum()])


class Training(pl.LightningModule):
    """A preset's model and how it is trained; hyper-parameters are kept as plain numbers and strings.

    Raises ``ValueError`` for an unknown preset.
    """

    def __init__(self, preset: str, schedule: Schedule, compiles: bool) -> None:
        super().__init__()
        known = presets()
        if preset not in known:
            raise ValueError(f"unknown preset {preset!r}: expected one of {', '.join(known)}")
        self.schedule = schedule
        self.save_hyperparameters({"preset": preset, "compiles": compiles, "schedule": _plain(asdict(schedule))})
        self.tokens_read, self.seconds, self._since = 0, 0.0, 0.0
        self.model = LanguageModel(known[preset])
        self.weighted_loss = weighted_loss
        if compiles:
            self._compile()

    def initialise(self, seed: int) -> None:
        """Draws the weights; equal seeds give equal weights."""
        self.model.init_weights(torch.Generator().manual_seed(seed))

    def _compile(self) -> None:
        """Block by block: equal blocks share one graph, so a model costs as many compilations as it has kinds of
        layers."""
        torch._dynamo.config.recompile_limit = 64  # kinds of layers x lengths
        for block, letter in zip(self.model.blocks, self.model.config.pattern, strict=True):
            # The compiler takes minutes over chunked linear attention: only the MLP after it is compiled.
            (block.mlp if letter in "LP" else block).compile(dynamic=False)
        self.weighted_loss = torch.compile(weighted_loss, dynamic=False)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        logits = self.model(batch["input_ids"], batch["prefix_length"])
        loss = self.weighted_loss(logits, batch["targets"], batch["weights"])
        self.tokens_read += batch["input_ids"].numel() * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/seconds", time.monotonic() - self._since)
        return loss

    @torch.compiler.set_stance("force_eager")  # a few batches are not worth graphs without gradients
    def validation_step(self, batch: Batch, index: int) -> None:
        logits = self.model(batch["input_ids"], batch["prefix_length"])
        rows = len(logits)
        self.log(
            "validation/loss", weighted_loss(logits, batch["targets"], batch["weights"]), prog_bar=True, batch_size=rows
        )
        if "answers" in batch:
            right, asked = right_answers(logits, batch["answers"], batch["targets"])
            self.log("validation/right", right / asked.clamp(min=1), prog_bar=True, batch_size=rows)

    def on_train_start(self) -> None:
        self._since = time.monotonic()

    def on_train_end(self) -> None:
        self.seconds += time.monotonic() - self._since

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["read"] = {"tokens": self.tokens_read, "seconds": self.seconds + time.monotonic() - self._since}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.tokens_read, self.seconds = checkpoint["read"]["tokens"], checkpoint["read"]["seconds"]

    def configure_optimizers(self) -> dict:
        schedule = self.schedule
        fused = next(self.parameters()).is_cuda
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, schedule.weight_decay), lr=schedule.peak, betas=schedule.betas, fused=fused
        )
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step) / schedule.peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Lightning's own clipping refuses fused optimisers, for loss scaling that bf16 does not have.
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.schedule.clip)
        self.log("train/gradient_norm", norm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; embeddings, biases, norms, filters and Mamba's A_log and D do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and id(parameter) not in embeddings and not name.endswith("A_log")
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _plain(values: dict) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
