"""Trains one model on set disjointness: ``python synthetics/train.py --method jrt-rnn --width 32 --feature-dim 4``.

Settings are the paper's (appendix B.1): AdamW with weight decay 0.1, a cosine over the epochs, the loss on the answer
alone, an end once 99% of the test answers are right.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # so that this file finds its package wherever it is started

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from jrt.model import LanguageModel  # noqa: E402
from synthetics.data import Examples, Task  # noqa: E402
from synthetics.methods import METHODS  # noqa: E402
from synthetics.tasks import TASKS  # noqa: E402

ENOUGH = 0.99
TEST_BATCH = 200


@dataclass(frozen=True)
class Run:
    """One point of a sweep, before the best learning rate is picked."""

    method: str
    task: str
    width: int
    feature_dim: int
    rate: float
    epochs: int
    batch: int = 128
    seed: int = 123

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("task", TASKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if min(self.width, self.feature_dim, self.epochs, self.batch) < 1 or self.rate <= 0:
            raise ValueError("width, feature size, epochs, batch and rate must be positive")

    @property
    def name(self) -> str:
        return (
            f"{self.method}-{self.task}-w{self.width}-f{self.feature_dim}-{self.rate:g}-e{self.epochs}-"
            f"b{self.batch}-s{self.seed}"
        )


class Segments(pl.LightningDataModule):
    """Batches of one segment each; their order is a function of (seed, epoch), so that a resumed run goes on alike."""

    def __init__(self, task: Task, batch: int, seed: int) -> None:
        super().__init__()
        self.task, self.batch, self.seed = task, batch, seed

    def setup(self, stage: str) -> None:
        train, test = self.task.draw(self.seed)
        self.train = [each for segment in train for each in segment.batches(self.batch)]
        self.test = [each for segment in test for each in segment.batches(TEST_BATCH)]

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed((self.seed << 16) + self.trainer.current_epoch)
        return DataLoader(self.train, batch_size=None, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=None)

    def transfer_batch_to_device(self, batch: Examples, device: torch.device, dataloader_idx: int) -> Examples:
        return Examples(batch.inputs.to(device), batch.labels.to(device), batch.first, batch.second)


class SetDisjointness(pl.LightningModule):
    """Cross-entropy of the shared token after the last separator; accuracy by pair of list lengths."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.method, task = run, METHODS[run.method], TASKS[run.task]
        longest = max(first + second for first, second in (*task.train, *task.test)) + 3
        self.model = LanguageModel(self.method.config(run.width, run.feature_dim, task.vocab_size, longest))
        self.model.init_weights(torch.Generator().manual_seed(run.seed))
        self.accuracy: dict[tuple[int, int], float] = {}
        self._right: dict[tuple[int, int], list[Tensor]] = {}

    def training_step(self, batch: Examples, _: int) -> Tensor:
        loss = F.cross_entropy(self.method.answer(self.model, batch.inputs).float(), batch.labels[:, -1])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.inputs))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._right = {}

    def validation_step(self, batch: Examples, _: int) -> None:
        right = self.method.answer(self.model, batch.inputs).argmax(-1) == batch.labels[:, -1]
        self._right.setdefault((batch.first, batch.second), []).append(right)

    def on_validation_epoch_end(self) -> None:
        self.accuracy = {pair: torch.cat(parts).float().mean().item() for pair, parts in self._right.items()}
        self.log("test/accuracy", sum(self.accuracy.values()) / len(self.accuracy), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.run.rate, weight_decay=0.1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.run.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "epoch"}}


def train(run: Run, folder: Path, accelerator: str, quiet: bool) -> dict:
    """Trains from the last checkpoint in `folder`, if there is one, and returns the result's row."""
    module = SetDisjointness(run)
    last = ModelCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=run.epochs,
        gradient_clip_val=1.0,
        callbacks=[last, EarlyStopping("test/accuracy", mode="max", patience=run.epochs, stopping_threshold=ENOUGH)],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=not quiet,
        enable_model_summary=False,
    )
    checkpoint = folder / "last.ckpt"
    data = Segments(TASKS[run.task], run.batch, run.seed)
    trainer.fit(module, data, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    trainer.validate(module, data, verbose=False)  # the last epoch's figures, also where nothing was left to train
    return {
        **asdict(run),
        "state_bytes": module.model.config.state_bytes(1),
        "parameters": sum(each.numel() for each in module.parameters()),
        "epochs_read": trainer.current_epoch,
        "accuracy": {f"{first}_{second}": round(each, 4) for (first, second), each in module.accuracy.items()},
    }


def provenance() -> dict:
    """What a kept figure depends on."""
    here = Path(__file__).parent
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__},
        "commit": head.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="jrt-rnn", help=", ".join(METHODS))
    parser.add_argument("--task", default="laptop", help=", ".join(TASKS))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--feature-dim", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/synthetics"))
    arguments = vars(parser.parse_args())
    output, accelerator = arguments.pop("output"), arguments.pop("accelerator")
    try:
        run = Run(**arguments)
        row = train(run, output / run.name, accelerator, quiet=False)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
