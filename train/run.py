"""Trains one model: ``python train/run.py experiment=baselines/jrt-1b-50b trainer.devices=8``.

An experiment file (train/configs/experiment) sets a model, its data and its schedule. Hydra adds the other settings;
``--cfg job`` prints them all. The folder ``output`` gets the checkpoints, metrics.csv with a plot, and at the end the
trained model as a Hugging Face folder. The same command, started again, resumes from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The package is found wherever this file is started from.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra  # noqa: E402
import torch  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import InstantiationException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402

import jrt  # noqa: E402
import train as train_package  # noqa: E402
from jrt.config import Config, presets  # noqa: E402
from jrt.model import LanguageModel  # noqa: E402
from jrt.system.locks import only_writer  # noqa: E402
from jrt.system.processes import PARENT, end_with  # noqa: E402
from jrt.system.provenance import code_sha256  # noqa: E402
from jrt.training.objective import Objective, check_objective, prefix_of  # noqa: E402
from jrt.training.settings import check_kind, check_seed, check_whole  # noqa: E402
from train import recall  # noqa: E402
from train.checkpoints import Checkpoint, Checkpoints  # noqa: E402
from train.data.batches import Data  # noqa: E402
from train.data.vocabulary import vocabulary_size  # noqa: E402
from train.distributed import SaidElsewhere, World, build, is_launched, launch, on_first, world  # noqa: E402
from train.export import export  # noqa: E402
from train.loop import Loop, Trainer  # noqa: E402
from train.optimizer import Schedule  # noqa: E402
from train.report import Csv, plot  # noqa: E402

log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds to wait for the processes of a run that was killed
STEPS_LOOKED_AT = 100  # the first steps have batches of all sizes that the data has
IDENTITY = ("preset", "model", "objective", "rate", "seed", "data", "batch", "precision", "ema", "code")


def train(config: DictConfig) -> dict[str, float]:
    """Trains as the configuration says, in this process, and returns the last metrics.

    Raises:
        ValueError: a setting, the data or a checkpoint is wrong; the message says what was expected.
    """
    trainer = _made(config.trainer)
    with world(trainer.accelerator, trainer.devices, trainer.nodes) as place:
        return _train(config, trainer, place)


def _train(config: DictConfig, trainer: Trainer, place: World) -> dict[str, float]:
    torch.set_float32_matmul_precision("high")
    output = Path(str(config.output)).expanduser()
    _check_settings(config)
    model_config = model_of(config)
    schedule: Schedule = _made(config.task.schedule)
    found = _checkpoint_before(config, output, place)
    if found is not None:  # checked here first: another model may not fit the data, and its message would be misleading
        _check_same_run(found, {"preset": config.preset, "model": model_config.to_dict()}, config)
    data: Data = _data(config, place)
    objective, prefix = objective_of(config, model_config, data)
    if config.score_items and data.tokenizer() is None:
        raise ValueError("score_items asks questions, and the data does not say which tokenizer made it")
    rows = trainer.global_batch or data.rows(0) or 0
    for total in {rows if data.rows(0) is None else data.rows(step) or 0 for step in range(STEPS_LOOKED_AT)}:
        trainer.passes(total)
    if trainer.global_batch and data.rows(0) is not None:
        raise ValueError("this data says how many rows each step has: leave out trainer.global_batch")
    if data.windows is not None and data.windows < rows:
        raise ValueError(f"the training text has {data.windows} windows of {data.length} tokens; a batch needs {rows}")
    identity = identity_of(config, model_config, objective, schedule, data)
    if found is not None:
        _check_same_run(found, identity, config)
    logger = on_first(place, lambda: _made(config.logger) if config.logger else None)
    model, module = build(
        model_config,
        objective.kind == "jrt" and objective.masked_share > 0,
        place,
        trainer.strategy,
        config.seed if found is None else None,
        trainer.compile,
        trainer.activation_checkpointing,
    )
    loop = Loop(
        trainer,
        place,
        model,
        module,
        data,
        objective,
        prefix,
        schedule,
        config.seed,
        output,
        identity,
        _probe(config, data),
    )
    with contextlib.ExitStack() as held:
        output.mkdir(parents=True, exist_ok=True)
        on_first(place, lambda: held.enter_context(only_writer(output, PATIENCE)))
        if found is not None:
            loop.resume(found)
        metrics = output / "metrics.csv"
        chosen = on_first(place, lambda: [Csv(metrics, loop.progress.step), *([] if logger is None else [logger])])
        progress = loop.fit(chosen or [])
        if place.is_first:
            plot(metrics, output / "loss.png")
        if config.export:
            export(loop, config, data.tokenizer())
        return progress.metrics


def _check_settings(config: DictConfig) -> None:
    """Raises ValueError for a setting of the configuration's top level that has the wrong kind."""
    check_seed("seed", config.seed)
    check_whole("score_items", config.score_items, 0)
    for name in ("resume", "export"):
        check_kind(name, config[name], bool)


def model_of(config: DictConfig) -> Config:
    """Returns the model's configuration: the preset, changed by the fields under `model`.

    Raises:
        ValueError: there is no such preset, or the fields contradict each other.
    """
    fields = {name: value for name, value in _plain(config.model).items() if value is not None}
    known = presets()
    if config.preset is None:
        return Config.from_dict(fields)
    if config.preset not in known:
        raise ValueError(f"unknown preset {config.preset!r}: expected one of {', '.join(known)}")
    return Config.from_dict(known[config.preset].to_dict() | fields)


def objective_of(config: DictConfig, model: Config, data: Data) -> tuple[Objective, int | None]:
    """Returns the training objective, and how many tokens of each sequence are its prefix.

    Both follow from the model unless the configuration gives them. The number is None if each batch has its own prefix
    lengths, and 0 if there is no prefix.

    Raises:
        ValueError: the objective contradicts the model or the data.
    """
    fields = {name: value for name, value in _plain(config.task.objective).items() if value is not None}
    given = fields.pop("prefix_length", None)
    kind = fields.pop("kind", "jrt" if model.has("P") else "causal")
    objective = Objective(kind, fields.pop("mask_token", model.vocab_rows - 1), **fields)
    check_objective(model, kind)
    if data.tells_prefix and given is not None:
        raise ValueError(
            f"objective.prefix_length is {given}, but this data says how long each row's prefix is: leave it out"
        )
    prefix = None if data.tells_prefix else prefix_of(model, kind, data.length, given)
    if data.tells_prefix and model.has("P") and model.enc_length < data.length:
        raise ValueError(
            f"prefixes of this data have up to {data.length} tokens, and the model's encoder reads {model.enc_length}: raise "
            "model.enc_length, or shorten the sequences"
        )
    for name in ("mask_token", "ignored_token"):
        if (getattr(objective, name) or 0) >= model.vocab_rows:
            raise ValueError(
                f"objective.{name} is {getattr(objective, name)}: expected an id below the model's {model.vocab_rows} rows"
            )
    tokenizer = data.tokenizer()
    size = 0 if tokenizer is None else vocabulary_size(tokenizer)
    if size > model.vocab_rows:
        raise ValueError(
            f"the data's tokenizer has {size} entries, the model {model.vocab_rows} rows: raise model.vocab_rows"
        )
    if tokenizer is not None and objective.kind == "jrt" and objective.mask_token < size:
        own = tokenizer.mask_token_id
        if own != objective.mask_token:
            raise ValueError(
                f"the mask token {objective.mask_token} is a word of the data's tokenizer: give task.objective.mask_token "
                f"({'none of its entries is a mask' if own is None else f'its mask is {own}'}) or a larger model.vocab_rows"
            )
    return objective, prefix


def identity_of(
    config: DictConfig, model: Config, objective: Objective, schedule: Schedule, data: Data
) -> dict[str, Any]:
    """Returns the settings that decide what a run computes.

    They are saved in each checkpoint. A run is resumed only if they have not changed (or `accept` names the changed
    ones).
    """
    found = {
        "preset": config.preset,
        "model": model.to_dict(),
        "objective": dataclasses.asdict(objective),
        "rate": dataclasses.asdict(schedule),
        "seed": config.seed if data.seed == config.seed else {"run": config.seed, "data": data.seed},
        "data": data.identity(),
        "batch": config.trainer.global_batch,
        "precision": config.trainer.precision,
        "ema": config.trainer.ema,
        "code": code_version(),
    }
    assert tuple(found) == IDENTITY
    return found


def code_version() -> str:
    """A hash of the source code of model and training, and PyTorch's version."""
    return f"{code_sha256(jrt, train_package)[:12]}, torch {torch.__version__}"


def _checkpoint_before(config: DictConfig, output: Path, place: World) -> Checkpoint | None:
    """Returns the newest complete checkpoint in `output`, or None.

    Raises:
        ValueError: there is one but resume is false, or `accept` has a name that is not in IDENTITY.
    """
    is_list = isinstance(config.accept, ListConfig)
    unknown = sorted({str(name) for name in config.accept} - set(IDENTITY)) if is_list else [str(config.accept)]
    if unknown:
        raise ValueError(
            f"accept={','.join(unknown)}: expected names out of {', '.join(IDENTITY)}, in a list such as [code]"
        )
    found = Checkpoints(output / "checkpoints", place).latest()
    if found is not None and not config.resume:
        raise ValueError(
            f"{output} holds a run already: leave out resume=false to go on with it, or choose another output"
        )
    return found


def _check_same_run(found: Checkpoint, now: dict, config: DictConfig) -> None:
    before, now = found.facts["identity"], json.loads(json.dumps(now))
    changed = [name for name in now if before.get(name) != now[name] and name not in config.accept]
    if changed:
        told = "; ".join(f"{name}: {_shown(before.get(name), now[name])}" for name in changed)
        raise ValueError(
            f"{config.output} was begun with another {' and '.join(changed)} ({told}): choose another output, or go on all the same "
            f"with accept=[{','.join(changed)}]"
        )


def _shown(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in now if before.get(name) != now[name]]
        return ", ".join(f"{name} {before.get(name)}, now {now[name]}" for name in names)
    return f"{before}, now {now}"


def _data(config: DictConfig, place: World) -> Data:
    """Opens the data. The first process does so before the others, because it may have to make the data."""
    found = on_first(place, lambda: _made(config.data))
    return found if found is not None else _made(config.data)


def _probe(config: DictConfig, data: Data) -> Callable[[LanguageModel], float] | None:
    tokenizer = data.tokenizer()
    if not config.trainer.probe_every:
        return None
    if config.trainer.strategy != "ddp":
        raise ValueError("trainer.probe_every needs the whole model on each device: use trainer.strategy=ddp")
    if tokenizer is None:
        raise ValueError("trainer.probe_every asks questions, and the data does not say which tokenizer made it")

    def probe(model: LanguageModel) -> float:
        records = recall.score(model, tokenizer, windows=(256,), strategies=("once",), count=64)
        return records[0]["score"]

    return probe


def _made(config: DictConfig) -> Any:
    """Builds the object that a `_target_` names. Hydra's wrapper around a user's error is removed."""
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise ValueError(" ".join(str(error).splitlines()[:2])) from error


def _plain(config: DictConfig) -> dict:
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def _run(config: DictConfig) -> None:
    """Trains in this process, or starts one process for each device."""
    trainer = _made(config.trainer)
    if is_launched() or trainer.devices == 1:
        if is_launched() and not _is_first():
            logging.getLogger().setLevel(logging.WARNING)
        train(config)
        return
    if trainer.nodes > 1:
        raise ValueError(
            "trainer.nodes > 1: start train/run.py with torchrun on each machine, as train/README.md shows"
        )
    trainer.passes(trainer.global_batch or 0)
    code = launch(str(Path(__file__).resolve()), _arguments(config), trainer.devices)
    if code:
        sys.exit(code)


def _arguments(config: DictConfig) -> list[str]:
    """Returns the arguments with which each device's process gets this process's configuration."""
    job = HydraConfig.get()
    places = {source.provider: source.path for source in job.runtime.config_sources if source.schema == "file"}
    options = [f"--config-name={job.job.config_name}", f"--config-path={places['main']}"]
    if "command-line" in places:
        options.append(f"--config-dir={places['command-line']}")
    overrides = [override for override in job.overrides.task if not override.startswith("output=")]
    return [
        *options,
        *overrides,
        f"output={_quoted(config.output)}",
        f"hydra.run.dir={_quoted(job.runtime.output_dir)}",
    ]


def _quoted(value: object) -> str:
    """A value in Hydra's quotes, so that a folder's name may have any characters."""
    return "'" + str(value).replace("'", "\\'") + "'"


def _is_first() -> bool:
    return os.environ.get("RANK") == "0"


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    if not os.environ.get("JRT_HOME", "unset"):
        del os.environ["JRT_HOME"]  # an empty name counts as none: the configuration reads it from here on
    job = HydraConfig.get()
    if not any(override.startswith("output=") for override in job.overrides.task):
        config.output = job.runtime.output_dir
    elif job.mode == RunMode.MULTIRUN:  # each run of a sweep has its own folder
        config.output = f"{config.output}/{job.job.num}"
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
    try:
        if OmegaConf.is_missing(config, "steps"):
            raise ValueError("steps is not set: choose an experiment, such as experiment=debug, or give data and steps")
        _run(config)
    except SaidElsewhere:
        sys.exit(2)
    except KeyboardInterrupt:
        log.info("stopped: the same command goes on from the newest checkpoint")
        sys.exit(130)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
