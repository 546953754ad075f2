"""Trains one model: ``python train/run.py experiment=mini/jrt [trainer.devices=1 ...]``.

An experiment file names a preset, its data and its schedule; Hydra composes the rest (``--cfg job`` shows the whole).
Everything is written to ``output``: checkpoints (``output=... resume=true`` goes on from the last, bit for bit),
metrics.csv, and at the end the model as a Hugging Face folder with a model card."""

import logging
import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # so that this file finds its package wherever it is started from

import hydra  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from train.data import StepData  # noqa: E402
from train.export import export  # noqa: E402
from train.module import Training  # noqa: E402

log = logging.getLogger(__name__)


def train(config: DictConfig) -> dict[str, float]:
    """Runs a composed configuration and returns the last metrics.

    Raises: ValueError: the output folder holds another run's checkpoint and `resume` is false, or there is nothing to
    resume."""
    output = Path(config.output)
    last = output / "checkpoints" / "last.ckpt"
    if last.exists() and not config.resume:
        raise ValueError(f"{output} holds a run already: resume=true goes on with it, output=FOLDER begins another")
    if config.resume and not last.exists():
        raise ValueError(f"nothing to resume: {last} does not exist")
    torch.set_float32_matmul_precision("high")
    data: StepData = instantiate(config.data)
    task: Training = instantiate(config.task)
    task.initialise(config.seed)
    trainer: pl.Trainer = instantiate(
        config.trainer, logger=instantiate(config.logger), callbacks=list(instantiate(config.callbacks).values())
    )
    trainer.fit(
        task, datamodule=data, ckpt_path=last if config.resume else None, weights_only=True if config.resume else None
    )
    if config.export and trainer.is_global_zero:
        export(task, config, output, metrics(trainer))
    return metrics(trainer)


def metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    try:
        train(config)
    except ValueError as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
